"""Study 7: every array of every figure against PyTorch in float64, NumPy and loops."""

import json

import numpy as np
import pytest
from conftest import GPT2, MODEL_LIMIT, ROUNDING, changed, figures_of, write_folder, write_word_tokenizer
from helpers import pytorch
from helpers.checkpoints import WORDS
from helpers.spoilt import check_spoilt_run
from helpers.studies import displayed

import jaxqkv
from jaxqkv.cli.main import main
from jaxqkv.errors import JaxqkvError, NotDrawable
from jaxqkv.studies import adjustment_magnitudes
from jaxqkv.studies.adjustment_magnitudes import STUDY, AdjustmentMagnitudesOptions
from jaxqkv.studies.registry import study

CONFIG = changed(GPT2, initializer_range=0.2)
LENGTHS = (5, 17, 1, 11, 7, 3, 13, 17, 9, 2, 16)
POSITIONS = 13


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_word_tokenizer(write_folder(tmp_path_factory.mktemp("model") / "tiny", CONFIG), WORDS)


@pytest.fixture(scope="module")
def texts():
    generator = np.random.default_rng(0)
    return ["a" + "".join(generator.choice(WORDS[2:], length - 1)) for length in LENGTHS]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("".join(json.dumps({"title": "x", "sentence": text}) + "\n" for text in (*texts, "a home")))
    return str(path)


@pytest.fixture(scope="module")
def options(corpus):
    return ["--corpus", corpus, "--text-column", "sentence", "--batch", "11", "--positions", str(POSITIONS)]


@pytest.fixture(scope="module")
def arrays(folder, options, tmp_path_factory):
    return figures_of("adjustment-magnitudes", tmp_path_factory.mktemp("study"), folder, *options)


@pytest.fixture(scope="module")
def norms(folder, texts):
    """Norms `[layer, pos]` of each text, run alone."""
    model = pytorch.load(folder)
    rows = jaxqkv.load(folder).tokenizer.encode(texts)
    return [np.linalg.norm(pytorch.activations(model, row)["attn_out"], axis=-1) for row in rows]


@pytest.fixture(scope="module")
def limit(norms):
    """Of a log norm: a float32 model's error in the smallest of them."""
    return MODEL_LIMIT * max(each.max() for each in norms) / min(each.min() for each in norms)


def test_all_figures_of_the_table_are_there(arrays):
    assert sorted(arrays) == ["1", "2", "3", "4", "5"] == sorted(study("adjustment-magnitudes").figures)


def test_real_positions(arrays):
    figure = arrays["1"]
    np.testing.assert_array_equal(figure["mask"], [[pos < length for pos in range(17)] for length in LENGTHS])
    np.testing.assert_array_equal(figure["lengths"], LENGTHS)
    counts, edges = np.histogram(LENGTHS, bins="fd")
    np.testing.assert_array_equal(figure["counts"], counts)
    np.testing.assert_array_equal(figure["edges"], edges)


def test_log_norms(arrays, norms, limit):
    figure = arrays["2"]
    assert figure["mean"].dtype == figure["std"].dtype == np.float32
    for layer in range(3):
        values = np.log(np.concatenate([each[layer, 1:] for each in norms]))
        assert figure["mean"][layer] == pytest.approx(values.mean(), abs=limit)
        assert figure["std"][layer] == pytest.approx(values.std(), abs=limit)
        heights, edges = np.histogram(values, bins="fd", density=True)
        np.testing.assert_allclose(figure[f"edges_{layer}"], edges, atol=limit)
        # A value that rounds to the other side of an edge moves one count.
        one = 1 / (values.size * (edges[1] - edges[0]))
        np.testing.assert_allclose(figure[f"density_{layer}"], heights, atol=1.05 * one)


def log_mean(norms):
    """By loops over layers, positions and the texts that reach them."""
    return np.array(
        [
            [np.log(np.mean([each[layer, pos] for each in norms if each.shape[1] > pos])) for pos in range(17)]
            for layer in range(3)
        ]
    )


def test_by_position(arrays, norms, limit):
    figure = arrays["3"]
    assert figure["log_norm"].dtype == np.float32
    np.testing.assert_allclose(figure["log_norm"], log_mean(norms), atol=limit)
    np.testing.assert_array_equal(figure["count"], [sum(length > pos for length in LENGTHS) for pos in range(17)])


def test_regression_on_position(arrays, norms, limit):
    from scipy import stats

    expected = log_mean(norms)[:, 1 : POSITIONS + 1]
    x = np.arange(POSITIONS)
    # Both are weighted sums of the log norms.
    weights = np.abs(x - x.mean()) / ((x - x.mean()) ** 2).sum()
    for layer in range(3):
        fit = stats.linregress(x, expected[layer])
        assert arrays["4"]["slope"][layer] == pytest.approx(fit.slope, abs=limit * weights.sum())
        assert arrays["4"]["intercept"][layer] == pytest.approx(
            fit.intercept, abs=limit * (1 + x.mean() * weights.sum())
        )


def test_regression_on_earlier_positions(arrays, norms, limit):
    beta = arrays["5"]["beta"]
    assert beta.shape == (3, 3)
    for layer in range(3):
        logs = [np.log(each[layer]) for each in norms]
        rows = [(1, each[t - 2], each[t - 1], each[t]) for each in logs for t in range(3, len(each))]
        design, target = np.split(np.array(rows), [3], axis=1)
        assert len(rows) == sum(max(length - 3, 0) for length in LENGTHS)
        expected = np.linalg.lstsq(design, target[:, 0])[0]
        # What the errors of target and regressors do to the solution, and the solver's own.
        error = np.sqrt(len(rows)) * (limit * (1 + np.abs(expected[1:]).sum()) + 20 * ROUNDING * np.abs(rows).max())
        np.testing.assert_allclose(beta[layer], expected, atol=np.linalg.norm(np.linalg.pinv(design), 2) * error)


def test_texts_are_cut_and_positions_named(folder, tmp_path):
    (tmp_path / "texts.txt").write_text("\n\n".join(["a" + " her cat" * 20, *["a cat saw her"] * 10]))
    line = ["figures", "adjustment-magnitudes", "--model", str(folder), "--arrays-only", "--out", str(tmp_path / "out")]
    line += ["--corpus", str(tmp_path / "texts.txt"), "--documents", "paragraphs", "--layer", "2"]
    assert main(line) == 0
    manifest = json.loads((tmp_path / "out/adjustment-magnitudes/manifest.json").read_text())
    assert manifest["texts"] == 11
    assert manifest["notes"] == [
        "every figure shows all layers; --layer changes nothing",
        f"{tmp_path}/texts.txt has 11 texts, fewer than 64, and all are run",
        "cut to the model's 17 positions: 1 of 11 texts",
        "figure 4 ends at position 16, since no text reaches position 30: the longest has 17 tokens",
    ]
    captions = {id: each["caption"] for id, each in manifest["figures"].items()}
    assert captions["1"].endswith("11 texts of 4 to 17 tokens. (Cut to the model's 17 positions: 1 of 11 texts.)")
    assert "at positions 1 to 16," in captions["4"]
    assert captions["4"].endswith("(No text reaches position 30: the longest has 17 tokens.)")


@pytest.mark.parametrize(
    ("text", "there", "missing"),
    [
        ("a", ["1", "3"], {"2": 2, "4": 3, "5": 4}),
        ("a cat", ["2"], {"4": 3, "5": 4}),
        ("a cat saw", ["4"], {"5": 4}),
    ],
)
def test_texts_that_are_too_short(folder, tmp_path, text, there, missing):
    (tmp_path / "texts.txt").write_text(text)
    options = AdjustmentMagnitudesOptions(model=(str(folder),), corpus=(str(tmp_path / "texts.txt"),), batch=1)
    with STUDY.start(options) as run:
        reductions = {"norms": np.random.default_rng(0).random((3, *run.batch.mask.shape)).astype(np.float32)}
        for id in there:
            assert STUDY.figures[id].display(run, reductions).panels
        for id, count in missing.items():
            with pytest.raises(NotDrawable, match=f"^figure {id} needs a text of {count} tokens or more$"):
                STUDY.figures[id].display(run, reductions)


def test_no_text(folder, tmp_path):
    (tmp_path / "texts.txt").write_text(" \n")
    with pytest.raises(JaxqkvError, match="no text in it; give files with text in them"):
        adjustment_magnitudes.figure("1", model=folder, corpus=str(tmp_path / "texts.txt"))


def test_the_hub_out_of_reach(folder, tmp_path, capsys, monkeypatch):
    """One line, with both ways out."""
    line = ["figures", "adjustment-magnitudes", "--model", str(folder), "--out", str(tmp_path)]
    assert main(line) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert "rotten_tomatoes: the hub cannot be reached" in message
    assert "go online, or give local text with --corpus FILE or FOLDER" in message


def test_the_demo_runs_the_packages_sentences():
    figure = displayed(STUDY, "1", demo=True)
    assert figure.arrays["mask"].shape[0] == 54
    assert figure.caption.startswith("Real positions (white) of the texts")


def test_a_whole_run_with_weights_that_are_not_finite(options, tmp_path):
    check_spoilt_run(tmp_path, "adjustment-magnitudes", CONFIG, WORDS, *options, not_drawn={"2"}, bars={"layers": 3})
