"""The comparison of two checkouts' figures: what it calls a difference."""

import json

import compare_checkouts
import numpy as np
import pytest


def write(folder, value=1.0, dtype=np.float32, picture=b"png", caption="c", ids=("1",)):
    folder.mkdir()
    figures = {}
    for id in ids:
        np.savez(folder / f"{id}.npz", x=np.array([0.0, value], dtype), y=np.zeros(3))
        (folder / f"{id}.png").write_bytes(picture)
        figures[id] = {"title": "t", "caption": caption}
    (folder / "manifest.json").write_text(json.dumps({"figures": figures}))
    return folder


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, []),
        ({"value": np.nextafter(np.float32(1), np.float32(2))}, ["1.npz: x"]),
        ({"dtype": np.float64}, ["1.npz: x"]),
        ({"picture": b"another"}, ["1.png"]),
        ({"caption": "d"}, ["caption of 1:\n  - c\n  + d"]),
        ({"ids": ("1", "2")}, ["2.npz: only one has it", "2.png: only one has it", "figures ['1'], ['1', '2']"]),
    ],
    ids=["nothing", "last place", "dtype", "picture", "caption", "another figure"],
)
def test_what_differs(change, found, tmp_path):
    one, other = write(tmp_path / "one"), write(tmp_path / "other", **change)
    assert list(compare_checkouts.differences(one, other)) == found


def test_a_zero_of_the_other_sign_is_a_difference(tmp_path):
    one, other = write(tmp_path / "one", value=0.0), write(tmp_path / "other", value=-0.0)
    assert list(compare_checkouts.differences(one, other)) == ["1.npz: x"]
