"""A whole run of a study with weights that are NaN or infinite: what it computes, names, prints and counts."""

import contextlib
import io
import json

import numpy as np
import pytest
from conftest import arrays_of, random_tensors, write_folder, write_word_tokenizer
from tqdm import tqdm

from jaxqkv.cli.main import main
from jaxqkv.runtime import console
from jaxqkv.studies.registry import study


class Terminal(io.StringIO):
    def isatty(self):
        return True


@contextlib.contextmanager
def bars_of_a_terminal():
    """The bars that are made in the block, as on a terminal."""
    made = []

    def bar(items=None, **options):
        made.append(tqdm(items, delay=1, file=Terminal(), **options))
        return made[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(console, "bar", bar)
        yield made


def check_spoilt_run(base, name, config, words, *line, not_drawn, bars, ids=(), layer=1):
    """Runs figures of a study, all unless `ids` are given, on a spoilt checkpoint, with --json and on a terminal.

    Each study's tests do so with the sizes of their other runs, so that the same programs run it.

    Args:
      base: an empty folder.
      name: of the study.
      config: of a GPT-2.
      words: its tokenizer's; empty for none.
      line: options of the study.
      not_drawn: figures that there are not of such weights.
      bars: description of a bar → its total, or the totals of several.
      ids: figures.
      layer: whose weights are spoilt.

    Returns:
      The lines of the warnings.
    """
    spoilt, out = random_tensors(config), base / "out"
    spoilt[f"h.{layer}.attn.c_attn.weight"][3, 5] = np.nan
    spoilt[f"h.{layer}.attn.c_attn.weight"][4, 40:42] = -np.inf
    folder = write_folder(base / "model", config, spoilt)
    if words:
        write_word_tokenizer(folder, words)
    given = ["figures", name, *ids, *line, "--arrays-only", "--json", "--out", str(out), "--model", "./model"]
    printed, said = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patched, bars_of_a_terminal() as made:
        patched.chdir(base)
        patched.setenv("JAXQKV_CACHE", str(base / "cache"))  # nothing is kept of other runs
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            assert main(given) == 0
    expected = [id for id in study(name).figures if not ids or id in ids]
    manifest = json.loads((out / name / "manifest.json").read_text())
    warnings, document = said.getvalue().splitlines(), json.loads(printed.getvalue())
    assert set(not_drawn) == set(expected) - set(manifest["figures"])
    _check_warnings(warnings, spoilt[f"h.{layer}.attn.c_attn.weight"].size, layer, not_drawn)
    drawn = [id for id in expected if id not in not_drawn]
    _check_document(document, name, out, manifest, drawn, warnings)
    _check_bars(made, bars | {"figures": len(expected)})
    return warnings


def _check_warnings(warnings, size, layer, not_drawn):
    """The weights are named once, and every figure that is left out."""
    first, *others = warnings
    place = f"model/model.safetensors: NaN or infinite values in h.{layer}.attn.c_attn.weight (3 of {size:,})"
    assert first == f"jaxqkv: warning: {place}"
    assert all("are NaN or infinite" in line for line in others)
    assert {line.split()[1] for line in others} == set(not_drawn)


def _check_document(document, name, out, manifest, drawn, warnings):
    """It is the manifest with the files."""
    folder, manifest = out / name, dict(manifest)
    figures, reasons = document.pop("figures"), document.pop("not drawn")
    until_the_last, seconds = manifest.pop("seconds"), document.pop("seconds")
    assert until_the_last.keys() == seconds.keys()
    assert all(seconds[each] >= until_the_last[each] for each in seconds)
    assert document.pop("manifest") == str(folder / "manifest.json")
    assert document.pop("page") == str(out / "index.html")
    described = manifest.pop("figures")
    assert document == manifest
    assert [f"jaxqkv: {id} is not drawn: {reason}" for id, reason in reasons.items()] == warnings[1:]
    assert list(figures) == drawn
    for id, figure in figures.items():
        assert figure == {
            "title": study(name).figures[id].title,
            "caption": described[id]["caption"],
            "files": [str(folder / f"{id}.npz")],
            "command": described[id]["command"],
            "arrays": described[id]["arrays"],
        }
        arrays = arrays_of(folder / f"{id}.npz")
        assert len(arrays) > 0
        axes = {each: len(names) for each, names in figure["arrays"].items()}
        assert {each: np.ndim(values) for each, values in arrays.items()} == axes


def _check_bars(made, expected):
    """Every long loop has a total and gets there."""
    totals = {desc: sorted(bar.total for bar in made if bar.desc == desc) for desc in {bar.desc for bar in made}}
    expected = {desc: each if isinstance(each, list) else [each] for desc, each in expected.items()}
    assert totals == expected
    for bar in made:
        reached = bar.n if bar.desc != "tokens" else min(bar.n, bar.total)  # whole documents are counted
        assert reached == bar.total, bar.desc
