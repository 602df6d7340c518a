"""Study 6: every array of every figure against PyTorch in float64, NumPy and loops."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import GPT2, MODEL_LIMIT, changed, figures_of, write_folder, write_word_tokenizer
from helpers import pytorch
from helpers.spoilt import check_spoilt_run
from helpers.studies import displayed

from jaxqkv.cli.main import main
from jaxqkv.errors import JaxqkvError
from jaxqkv.studies import qkv_activations
from jaxqkv.studies.qkv_activations import STUDY, QkvActivationsOptions
from jaxqkv.studies.registry import study

CONFIG = changed(GPT2, initializer_range=0.3)
TOKENS = ["?", *(f" w{index}" for index in range(41)), " like"]
LIKE, CONTEXT, LAYER, EMBED, HEADS, ROWS, SAMPLES = 42, 11, 1, 35, 5, 11, 97


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_word_tokenizer(write_folder(tmp_path_factory.mktemp("model") / "tiny", CONFIG), TOKENS)


@pytest.fixture(scope="module")
def ids():
    """A text in which one token of eight is the target; one of its occurrences comes too early."""
    generator = np.random.default_rng(0)
    ids = np.where(generator.random(71) < 1 / 8, LIKE, generator.integers(1, 42, 71))
    ids[[5, 11, 60, 70]] = LIKE
    return ids.tolist()


@pytest.fixture(scope="module")
def text_file(ids, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(TOKENS[each] for each in ids))
    return str(path)


@pytest.fixture(scope="module")
def options(text_file):
    return ["--text-file", text_file, "--context", str(CONTEXT), "--permutations", str(SAMPLES)]


@pytest.fixture(scope="module")
def arrays(folder, options, tmp_path_factory):
    return figures_of("qkv-activations", tmp_path_factory.mktemp("study"), folder, *options)


@pytest.fixture(scope="module")
def samples(folder, ids):
    """Q, K and V `[layer, qkv, row, pos, embed]`, each row run alone by PyTorch."""
    model = pytorch.load(folder)
    rows = [ids[end - CONTEXT : end + 1] for end in range(CONTEXT, len(ids)) if ids[end] == LIKE]
    assert len(rows) == ROWS
    found = [pytorch.activations(model, row) for row in rows]
    return np.stack([np.stack([each[name] for each in found], axis=1) for name in "qkv"], axis=1)


@pytest.fixture(scope="module")
def limit(samples):
    return MODEL_LIMIT * np.abs(samples).max()


def test_all_figures_of_the_table_are_there(arrays):
    expected = ["1", "2a", "2b", "3a", "3b", "4", "5a", "5b"]
    assert sorted(arrays) == expected == list(study("qkv-activations").figures)


def test_activations(arrays, samples, limit):
    activations = arrays["1"]["activations"]
    assert activations.shape == (ROWS, 3 * EMBED)
    assert activations.dtype == np.float32
    np.testing.assert_allclose(activations, np.concatenate(list(samples[LAYER, :, :, -1]), axis=1), atol=limit)
    q = samples[LAYER, 0, 0].reshape(CONTEXT + 1, HEADS, 7).swapaxes(0, 1)
    np.testing.assert_allclose(arrays["5a"]["q"], q, atol=limit)


def measures(samples, layer, index, side):
    """Mean, mean of absolute values and variance of each row's vector: side 0 the target, 1 the token before."""
    rows = samples[layer, index, :, -1 - side]
    return np.array([[row.mean(), np.abs(row).mean(), row.var(ddof=1)] for row in rows])


def test_measures(arrays, samples, limit):
    # A variance errs by twice the deviation's error.
    limits = {"mean": limit, "l1": limit, "variance": 4 * limit * np.abs(samples).max()}
    for layer in range(3):
        for index in range(3):
            for side in range(2):
                expected = measures(samples, layer, index, side).mean(axis=0)
                for (name, each), value in zip(limits.items(), expected, strict=True):
                    assert arrays["3a"][name][layer, index, side] == pytest.approx(value, abs=each)
                    if layer == LAYER:
                        assert arrays["2a"][name][index, side] == pytest.approx(value, abs=each)
    assert arrays["2a"]["mean"].shape == (3, 2)


def test_differences(arrays, samples, limit):
    figure = arrays["3b"]
    keys = jax.random.split(jax.random.key(0), SAMPLES)
    taken = np.asarray(jax.jit(jax.vmap(lambda key: jax.random.randint(key, (ROWS,), 0, ROWS)))(keys))
    weights = np.array([np.bincount(each, minlength=ROWS) for each in taken])
    scale = np.array([1, 1, 4 * np.abs(samples).max()]) * 2 * limit
    for layer in range(3):
        for index in range(3):
            rows = measures(samples, layer, index, 0) - measures(samples, layer, index, 1)
            low, high = np.percentile(weights @ rows / ROWS, [2.5, 97.5], axis=0)
            for name, expected in (("difference", rows.mean(axis=0)), ("low", low), ("high", high)):
                assert (np.abs(figure[name][layer, index] - expected) <= scale).all(), name


@pytest.mark.parametrize(("id", "edges"), [("2b", np.linspace(-7, 7, 234)), ("4", np.linspace(-4, 4, 101))])
def test_densities(arrays, samples, id, edges):
    figure = arrays[id]
    np.testing.assert_array_equal(figure["edges"], edges)
    density = figure["density"] if id == "4" else figure["density"][None]
    for layer, three in enumerate(samples if id == "4" else samples[LAYER : LAYER + 1]):
        for index in range(3):
            for side in range(2):
                values = three[index, :, -1 - side].ravel()
                expected = np.histogram(values, edges, density=True)[0]
                # A value that rounds to the other side of an edge moves one count.
                one = 1 / (np.histogram(values, edges)[0].sum() * (edges[1] - edges[0]))
                np.testing.assert_allclose(density[layer, index, side], expected, atol=1.05 * one)


def test_deviation_over_positions(arrays, samples, limit):
    expected = [[np.mean([row.std(axis=0, ddof=1) for row in rows]) for rows in three] for three in samples]
    np.testing.assert_allclose(arrays["5b"]["std"], expected, atol=2 * limit)


def test_documents_of_a_corpus_are_read_apart(folder, tmp_path, ids, samples, limit):
    """Windows stay inside a document, and the first rows alone are run where there are more than are asked for."""
    ends = [end for end in range(CONTEXT, len(ids)) if ids[end] == LIKE]
    five_rows, text = ("".join(TOKENS[each] for each in part) for part in (ids[: ends[4] + 1], ids))
    lines = [" w3 like", five_rows, " w5" * CONTEXT, " like w7 like", text]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    given = {"corpus": str(tmp_path / "texts.jsonl"), "text_column": "body", "context": CONTEXT, "rows": ROWS}
    figure = displayed(STUDY, "1", model=folder, **given)
    rows = np.concatenate(list(samples[LAYER, :, :, -1]), axis=1)
    np.testing.assert_allclose(figure.arrays["activations"], np.concatenate([rows[:5], rows[: ROWS - 5]]), atol=limit)
    assert f"(The first {ROWS} occurrences of ' like' are run; --rows takes more.)" in figure.caption


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target", " w3 w4"], "' w3 w4' is not one token of"),
        (["--context", "17"], "--context 17: tiny has 17 positions, so 16 at most"),
        (["--target", "?"], "text.txt: 0 occurrences of '?' with 16 tokens before, and two or more are needed; give"),
        (["--corpus", "python-docs"], "--text-file and --corpus exclude each other"),
    ],
)
def test_what_is_refused(folder, text_file, tmp_path, capsys, more, message):
    line = ["figures", "qkv-activations", "--model", str(folder), "--text-file", text_file, "--out", str(tmp_path)]
    assert main([*line, *more]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error


def test_one_occurrence_is_too_few(folder, tmp_path):
    (tmp_path / "text.txt").write_text(" w1 w2 w3 like")
    with pytest.raises(JaxqkvError, match="1 occurrence of ' like' with 3 tokens before, and two or more are needed"):
        qkv_activations.figure("1", model=folder, text_file=tmp_path / "text.txt", context=3)


def test_a_smaller_model_takes_what_it_can(folder, text_file, ids):
    with STUDY.start(QkvActivationsOptions(model=(str(folder),), text_file=Path(text_file))) as run:
        expected = [ids[end - 16 : end + 1] for end in range(16, len(ids)) if ids[end] == LIKE]
        np.testing.assert_array_equal(run.ids, expected)
    assert run.of_rows.endswith(
        "with the 16 tokens before each. (tiny takes 16 tokens before the target, not 50 as in the original.)"
    )


def test_the_studys_own_text():
    with STUDY.start(QkvActivationsOptions(demo=True)) as run:
        tokens = run.model.tokenizer.tokens([int(row[-1]) for row in run.ids])
    assert run.ids.shape == (84, 51)
    assert set(tokens) == {" like"}
    assert run.of_rows == (
        " 84 occurrences of ' like' in Alice's Adventures in Wonderland, with the 50 tokens before each."
    )


def test_a_whole_run_with_weights_that_are_not_finite(options, tmp_path):
    check_spoilt_run(tmp_path, "qkv-activations", CONFIG, TOKENS, *options, not_drawn=(), bars={"layers": 3})
