"""Study 1: every array of every figure against NumPy loops from the definitions in the figure table."""

import functools
import json

import numpy as np
import pytest
from conftest import BERT, GPT2, arrays_of, changed, random_tensors, write_folder
from helpers.oracles import cosine
from helpers.spoilt import check_spoilt_run

from jaxqkv.cli.main import main

SMALL = changed(GPT2, n_embd=22, n_head=2, n_layer=2, initializer_range=0.2)
NAMES = ("large", "small")
CONFIGS = {"large": changed(GPT2, initializer_range=0.2), "small": SMALL}
LAYER = 1  # of three: the middle, since there is no layer 6


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """All figures of two checkpoints, as `numpy.load` gives them."""
    base = tmp_path_factory.mktemp("study")
    folders = [str(write_folder(base / name, CONFIGS[name])) for name in NAMES]
    assert main(["figures", "qkv-weights", "--arrays-only", "--out", str(base / "out"), "--model", *folders]) == 0
    return {path.stem: arrays_of(path) for path in (base / "out" / "qkv-weights").glob("*.npz")}


@functools.cache
def matrices(name, layer):
    """W_Q, W_K, W_V in float64."""
    wide = random_tensors(CONFIGS[name])[f"h.{layer}.attn.c_attn.weight"].astype(np.float64)
    return np.split(wide, 3, axis=1)


def samples(similarity, n_head):
    """Similarities within and across heads."""
    dim = len(similarity) // n_head
    blocks = similarity.reshape(n_head, dim, n_head, dim).swapaxes(1, 2)
    within = np.concatenate([blocks[i, i][np.triu_indices(dim, 1)] for i in range(n_head)])
    across = np.concatenate([blocks[i, j].ravel() for i in range(n_head) for j in range(i + 1, n_head)])
    return within, across


def test_all_figures_of_the_table_are_there(arrays):
    assert sorted(arrays) == ["1", "2a", "2b", "2c", "2d", "3", "4a", "4b", "5a", "5b", "5c", "6"]


def test_1(arrays):
    assert set(arrays["1"]) == {"model", "n_embd", "n_layer", "n_head", "head_dim", "attention_parameters"}
    assert arrays["1"]["model"].tolist() == list(NAMES)
    for index, name in enumerate(NAMES):
        config, tensors = CONFIGS[name], random_tensors(CONFIGS[name])
        size = sum(tensor.size for key, tensor in tensors.items() if ".attn." in key)
        assert arrays["1"]["attention_parameters"][index] == pytest.approx(size / 1e6, rel=1e-12)
        for field in ("n_embd", "n_layer", "n_head", "head_dim"):
            assert arrays["1"][field][index] == getattr(config, field)


def test_2a_and_4a(arrays):
    wide = random_tensors(CONFIGS["large"])[f"h.{LAYER}.attn.c_attn.weight"]
    np.testing.assert_array_equal(arrays["2a"]["weights"], wide)
    heads = arrays["4a"]["heads"]
    assert heads.shape == (5, 35, 7)
    for head in range(5):
        np.testing.assert_array_equal(heads[head], wide[:, head * 7 : (head + 1) * 7])


def test_2b(arrays):
    for name, matrix in zip("qkv", matrices("large", LAYER), strict=True):
        counts, edges = np.histogram(matrix.astype(np.float32), bins="fd")
        np.testing.assert_array_equal(arrays["2b"][f"counts_{name}"], counts)
        np.testing.assert_array_equal(arrays["2b"][f"edges_{name}"], edges)


def test_2c_2d_and_3(arrays):
    np.testing.assert_array_equal(arrays["2c"]["edges"], np.linspace(-0.8, 0.8, 81))
    assert arrays["2c"]["density"].shape == (3, 3, 80)
    for layer in range(3):
        for index, matrix in enumerate(matrices("large", layer)):
            expected = np.histogram(matrix, np.linspace(-0.8, 0.8, 81), density=True)[0]
            np.testing.assert_allclose(arrays["2c"]["density"][layer, index], expected, rtol=1e-5)
    np.testing.assert_array_equal(arrays["2d"]["mean"], arrays["3"]["mean_large"])
    np.testing.assert_array_equal(arrays["2d"]["std"], arrays["3"]["std_large"])
    for name in NAMES:
        for layer in range(CONFIGS[name].n_layer):
            for index, matrix in enumerate(matrices(name, layer)):
                assert arrays["3"][f"mean_{name}"][layer, index] == pytest.approx(matrix.mean(), abs=1e-7)
                assert arrays["3"][f"std_{name}"][layer, index] == pytest.approx(matrix.std(ddof=1), rel=1e-5)


def test_4b(arrays):
    similarity = cosine(matrices("large", LAYER)[0][:, :7])
    np.testing.assert_allclose(arrays["4b"]["similarity"], similarity, atol=3e-6)
    np.testing.assert_allclose(arrays["4b"]["values"], similarity[np.triu_indices(7, 1)], atol=3e-6)


def test_5a(arrays):
    for name, matrix in zip("qk", matrices("large", LAYER)[:2], strict=True):
        for group, sample in zip(("within", "across"), samples(cosine(matrix), 5), strict=True):
            density, edges = np.histogram(sample.astype(np.float32), bins="fd", density=True)
            np.testing.assert_allclose(arrays["5a"][f"edges_{name}_{group}"], edges, atol=1e-6)
            # A cosine that rounds to the other side of an edge moves one count.
            one = 1 / (sample.size * np.diff(edges)[0])
            np.testing.assert_allclose(arrays["5a"][f"density_{name}_{group}"], density, atol=1.01 * one)


def test_5b_and_5c(arrays):
    edges = np.linspace(-0.4, 0.4, 101)
    np.testing.assert_array_equal(arrays["5b"]["edges"], edges)
    assert arrays["5b"]["density"].shape == (3, 2, 2, 100)
    for layer in range(3):
        for index, matrix in enumerate(matrices("large", layer)[:2]):
            for group, sample in enumerate(samples(cosine(matrix), 5)):
                density = np.histogram(sample, edges, density=True)[0]
                np.testing.assert_allclose(arrays["5b"]["density"][layer, index, group], density, rtol=1e-4)
                assert arrays["5c"]["mean"][layer, index, group] == pytest.approx(sample.mean(), abs=1e-6)
                assert arrays["5c"]["std"][layer, index, group] == pytest.approx(sample.std(), rel=1e-5)


def test_6(arrays):
    for name in NAMES:
        for layer in range(CONFIGS[name].n_layer):
            for index, matrix in enumerate(matrices(name, layer)):
                sample = cosine(matrix)[np.triu_indices(matrix.shape[1], 1)]
                assert arrays["6"][f"mean_{name}"][layer, index] == pytest.approx(sample.mean(), abs=1e-6)
                assert arrays["6"][f"std_{name}"][layer, index] == pytest.approx(sample.std(ddof=1), rel=1e-5)


def test_bert_is_transposed(tmp_path):
    folder = write_folder(tmp_path / "bert", BERT)
    arguments = ["figures", "qkv-weights", "2a", "4a", "--arrays-only", "--layer", "2", "--model", str(folder)]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    tensors = random_tensors(BERT)
    at = "encoder.layer.2.attention.self"
    wide = np.concatenate([tensors[f"{at}.{name}.weight"].T for name in ("query", "key", "value")], axis=1)
    np.testing.assert_array_equal(arrays_of(tmp_path / "out/qkv-weights/2a.npz")["weights"], wide)
    np.testing.assert_array_equal(arrays_of(tmp_path / "out/qkv-weights/4a.npz")["heads"][4], wide[:, 28:35])


def test_two_checkpoints_of_one_name_are_told_apart(tmp_path):
    folders = [str(write_folder(tmp_path / parent / "same", SMALL)) for parent in "ab"]
    main(["figures", "qkv-weights", "3", "--arrays-only", "--out", str(tmp_path / "out"), "--model", *folders])
    assert sorted(arrays_of(tmp_path / "out/qkv-weights/3.npz")) == [
        "mean_same",
        "mean_same-2",
        "std_same",
        "std_same-2",
    ]


def test_the_caption_says_which_layer(tmp_path):
    folder = str(write_folder(tmp_path / "tiny", SMALL))
    captions = []
    for extra in ([], ["--layer", "0"]):
        main(["figures", "qkv-weights", "2a", "--arrays-only", "--out", str(tmp_path), "--model", folder, *extra])
        manifest = json.loads((tmp_path / "qkv-weights" / "manifest.json").read_text())
        captions.append((manifest["layer"], manifest["figures"]["2a"]["caption"]))
    assert captions[0][0] == 1
    assert "layer 1 of tiny" in captions[0][1]
    assert "tiny has no layer 6 as in the original" in captions[0][1]
    assert captions[1][0] == 0
    assert "no layer 6" not in captions[1][1]


def test_a_whole_run_with_weights_that_are_not_finite(tmp_path):
    check_spoilt_run(tmp_path, "qkv-weights", CONFIGS["large"], (), not_drawn={"2b", "4b", "5a"}, bars={"layers": 3})
