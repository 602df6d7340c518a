"""Study 8: every array of every figure against PyTorch in float64, SciPy and loops."""

import json

import jax
import numpy as np
import pytest
from conftest import BERT, GPT2, MODEL_LIMIT, ROUNDING, changed, figures_of, write_folder, write_word_tokenizer
from helpers import pytorch
from helpers.spoilt import check_spoilt_run
from helpers.studies import displayed

import jaxqkv
from jaxqkv import kernels
from jaxqkv.cli.main import main
from jaxqkv.errors import JaxqkvError
from jaxqkv.studies import prediction_divergence
from jaxqkv.studies.prediction_divergence import STUDY, PredictionDivergenceOptions
from jaxqkv.studies.registry import study

POSITIONS, LAYER, PERMUTATIONS = 101, 1, 103
CONFIG = changed(GPT2, n_positions=POSITIONS)
WORDS = [f" {'w' * (1 + index % 7)}{index}" for index in range(GPT2.vocab_size)]
START = 102


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_word_tokenizer(write_folder(tmp_path_factory.mktemp("model") / "tiny", CONFIG), WORDS)


@pytest.fixture(scope="module")
def torch_model(folder):
    return pytorch.load(folder)


def written(torch_model, count, choose):
    """So many tokens, each chosen by what the model predicts after those before it."""
    import torch

    tokens, threads = [3], torch.get_num_threads()
    torch.set_num_threads(1)  # for products this small, several only wait for each other
    with torch.no_grad():
        while len(tokens) < count:
            tokens.append(choose(torch_model(torch.tensor([tokens])).logits[0, -1].argmax().item()))
    torch.set_num_threads(threads)
    return tokens


@pytest.fixture(scope="module")
def ids(torch_model):
    """Tokens of a text whose second half the model predicts in two of five places."""
    generator = np.random.default_rng(1)

    def choose(predicted):
        return predicted if generator.random() < 0.4 else int(generator.integers(0, len(WORDS)))

    half = written(torch_model, POSITIONS + 1, choose)
    return [*generator.integers(0, len(WORDS), START).tolist(), *half, 7]


@pytest.fixture(scope="module")
def text_file(ids, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(WORDS[each] for each in ids) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def options(text_file):
    return ["--text-file", text_file, "--permutations", str(PERMUTATIONS)]


@pytest.fixture(scope="module")
def arrays(folder, options, tmp_path_factory):
    return figures_of("prediction-divergence", tmp_path_factory.mktemp("study"), folder, *options)


@pytest.fixture(scope="module")
def expected(torch_model, ids):
    """Flags and log norms, by PyTorch."""
    found = pytorch.activations(torch_model, ids[START : START + POSITIONS])
    correct = found["logits"].argmax(axis=-1) == ids[START + 1 : START + POSITIONS + 1]
    assert 30 < correct.sum() < 60
    norms = np.linalg.norm(found["attn_out"], axis=-1)
    limit = MODEL_LIMIT * norms.max() / norms.min()
    return correct, np.log(norms), limit


def shares(norm, correct, count):
    """Shares of correct and of incorrect positions in the bins, and the edges."""
    edges = np.linspace(norm.min(), norm.max(), count)
    counts = [np.histogram(norm[chosen], edges)[0] for chosen in (correct, ~correct)]
    return edges, *(each / each.sum() for each in counts)


def divergence(norm, correct, count=31):
    from scipy.spatial.distance import jensenshannon

    _, c, i = shares(norm, correct, count)
    return jensenshannon(c, i) ** 2


def published(norm, correct, count=31):
    """The original's, bin by bin."""
    _, c, i = shares(norm, correct, count)
    m = (c + i) / 2
    to_c, to_i = (sum(a * np.log(a / (b + 1e-15)) for a, b in zip(m, each, strict=True) if a) for each in (c, i))
    return (to_c + to_i) / 2 / (count - 1)


# The divergence's own rounding; shares are at most 1, logarithms at most ln 2, and at most 35 as published.
DIVERGENCE_LIMIT, PUBLISHED_LIMIT = 12 * ROUNDING, 35 * 4 * ROUNDING


def test_all_figures_of_the_table_are_there(arrays):
    assert sorted(arrays) == ["2a", "2b", "3", "4", "5", "6"] == sorted(study("prediction-divergence").figures)


def test_predictions(arrays, expected):
    correct = expected[0]
    np.testing.assert_array_equal(arrays["2a"]["correct"], correct)
    loop = [np.mean(correct[max(pos - 49, 0) : pos + 1]) for pos in range(POSITIONS)]
    np.testing.assert_allclose(arrays["2a"]["share"], loop, rtol=2 * ROUNDING)


def test_lengths(arrays, expected, ids):
    correct, figure = expected[0], arrays["2b"]
    length = np.array([len(WORDS[each]) for each in ids[START + 1 : START + POSITIONS + 1]])
    np.testing.assert_array_equal(figure["length"], length)
    for index, (name, chosen) in enumerate((("correct", correct), ("incorrect", ~correct))):
        heights, edges = np.histogram(length[chosen], bins="fd", density=True)
        np.testing.assert_allclose(figure[f"edges_{name}"], edges, rtol=1e-12)
        np.testing.assert_allclose(figure[f"density_{name}"], heights, rtol=1e-12)
        assert figure["mean"][index] == pytest.approx(length[chosen].mean(), rel=2 * ROUNDING)


def test_histograms(arrays, expected):
    correct, norms, limit = expected
    edges, c, i = shares(norms[LAYER], correct, 31)
    np.testing.assert_allclose(arrays["3"]["edges"], edges, atol=limit)
    np.testing.assert_allclose(arrays["3"]["correct_probability"], c, rtol=2 * ROUNDING)
    np.testing.assert_allclose(arrays["3"]["incorrect_probability"], i, rtol=2 * ROUNDING)


def test_number_of_bins(arrays, expected):
    correct, norms, _ = expected
    np.testing.assert_array_equal(arrays["4"]["edges_count"], np.arange(10, 51))
    loop = [divergence(norms[LAYER], correct, count) for count in range(10, 51)]
    np.testing.assert_allclose(arrays["4"]["divergence"], loop, atol=DIVERGENCE_LIMIT)


@pytest.fixture(scope="module")
def permuted(expected):
    """The flags as they are permuted: a permutation depends on nothing but the key."""
    key, _ = jax.random.split(jax.random.key(0))
    return np.asarray(
        kernels.permutation_null(expected[0], (), key, statistic=lambda labels, _: labels, permutations=PERMUTATIONS)
    )


def is_p(p, null, observed, limit):
    """Whether p counts the null, give or take values that only rounding tells from the observed one."""
    low, high = ((null >= observed + sign * limit).sum() for sign in (1, -1))
    return 1 + low - 1e-3 <= p * (1 + len(null)) <= 1 + high + 1e-3


def test_null_of_one_layer(arrays, expected, permuted):
    correct, norms, _ = expected
    figure = arrays["5"]
    null = np.array([divergence(norms[LAYER], flags) for flags in permuted])
    np.testing.assert_allclose(figure["null"], null, atol=DIVERGENCE_LIMIT)
    assert figure["observed"].shape == figure["p"].shape == ()
    assert figure["observed"] == pytest.approx(divergence(norms[LAYER], correct), abs=DIVERGENCE_LIMIT)
    assert is_p(figure["p"], null, figure["observed"], DIVERGENCE_LIMIT)
    counts, edges = np.histogram(figure["null"], bins="fd")
    np.testing.assert_array_equal(figure["counts"], counts)
    np.testing.assert_array_equal(figure["edges"], edges)


def test_every_layer(arrays, expected, permuted):
    from scipy.stats import false_discovery_control

    correct, norms, limit = expected
    figure = arrays["6"]
    for layer, norm in enumerate(norms):
        means = [norm[correct].mean(), norm[~correct].mean()]
        np.testing.assert_allclose(figure["mean"][layer], means, atol=limit)
        null = np.array([divergence(norm, flags) for flags in permuted])
        observed = divergence(norm, correct)
        assert figure["divergence"][layer] == pytest.approx(observed, abs=DIVERGENCE_LIMIT)
        for name, value in (("mean", null.mean()), ("low", null.min()), ("high", null.max())):
            assert figure[f"null_{name}"][layer] == pytest.approx(value, abs=2 * DIVERGENCE_LIMIT)
        assert is_p(figure["p"][layer], null, observed, DIVERGENCE_LIMIT)
        shifted = np.array([divergence(norm, np.roll(correct, shift)) for shift in range(1, POSITIONS)])
        assert is_p(figure["p_shift"][layer], shifted, observed, DIVERGENCE_LIMIT)
        assert figure["difference"][layer] == pytest.approx(means[0] - means[1], abs=2 * limit)
        differences = np.array([norm[flags].mean() - norm[~flags].mean() for flags in permuted])
        assert is_p(figure["difference_p"][layer], np.abs(differences), abs(means[0] - means[1]), 2 * limit)
    q = false_discovery_control(np.concatenate([figure["p"], figure["difference_p"]]).astype(np.float64))
    np.testing.assert_allclose(np.concatenate([figure["q_value"], figure["difference_q_value"]]), q, rtol=1e-6)
    assert figure["p"].min() >= np.float32(1 / (PERMUTATIONS + 1))


def test_as_published(folder, options, expected, permuted, tmp_path, arrays):
    correct, norms, _ = expected
    theirs = figures_of("prediction-divergence", tmp_path, folder, "4", "5", "6", *options, "--as-published")
    loop = [published(norms[LAYER], correct, count) for count in range(10, 51)]
    np.testing.assert_allclose(theirs["4"]["divergence"], loop, atol=PUBLISHED_LIMIT)
    null = np.array([published(norms[LAYER], flags) for flags in permuted])
    np.testing.assert_allclose(theirs["5"]["null"], null, atol=PUBLISHED_LIMIT)
    observed = [published(norm, correct) for norm in norms]
    np.testing.assert_allclose(theirs["6"]["divergence"], observed, atol=PUBLISHED_LIMIT)
    assert is_p(theirs["5"]["p"], null, observed[LAYER], PUBLISHED_LIMIT)
    for name in ("mean", "difference", "difference_p"):
        np.testing.assert_array_equal(theirs["6"][name], arrays["6"][name])
    captions = json.loads((tmp_path / "out/prediction-divergence/manifest.json").read_text())["figures"]
    assert "½ KL(M‖C) + ½ KL(M‖I)" in captions["6"]["caption"]
    assert "Filled: p < 0.05 in B, in C too." in captions["6"]["caption"]


def test_the_first_position_can_be_left_out(folder, text_file, expected, tmp_path, arrays):
    """With fewer permutations than positions: then as many shifts, each another one."""
    correct, norms, limit = expected
    more = ["--text-file", text_file, "--permutations", "37", "--skip-first"]
    later = figures_of("prediction-divergence", tmp_path, folder, "2a", "2b", "6", *more)
    np.testing.assert_array_equal(later["2a"]["correct"], correct[1:])
    assert later["2a"]["share"][0] == correct[1]
    np.testing.assert_array_equal(later["2b"]["length"], arrays["2b"]["length"][1:])
    observed = [divergence(norm[1:], correct[1:]) for norm in norms]
    np.testing.assert_allclose(later["6"]["divergence"], observed, atol=DIVERGENCE_LIMIT)
    assert later["6"]["mean"][2, 0] == pytest.approx(norms[2, 1:][correct[1:]].mean(), abs=limit)
    times = later["6"]["p_shift"] * 38
    np.testing.assert_allclose(times, np.rint(times), atol=1e-4)


def test_a_part_of_a_text_and_a_short_one_which_is_noted(folder, text_file, ids, expected, tmp_path):
    """The same twenty tokens."""
    path = tmp_path / "short.txt"
    path.write_text("".join(WORDS[each] for each in ids[START - 20 : START + 21]))
    for given, source, first, note in (
        ({"text_file": text_file, "length": 20}, text_file, 102, ""),
        ({"text_file": path}, path, 20, f" ({path} has no more from its middle on.)"),
    ):
        figures = [displayed(STUDY, id, model=folder, **given) for id in ("3", "2a")]
        assert f" 20 tokens of {source} from token {first} on, the first, at which" in figures[0].caption
        assert "(tiny has no layer 4 as in the original; the middle one is drawn.)" in figures[0].caption
        assert figures[1].caption.endswith(f" are predicted correctly.{note}")
        np.testing.assert_array_equal(figures[1].arrays["correct"], expected[0][:20])


@pytest.mark.parametrize(
    ("words", "more", "message"),
    [
        (2, {}, "has 2 tokens, of which 0 from the middle on have a next one; 2 or more are needed: give a longer"),
        (41, {"length": 31}, "has 41 tokens, of which 20 from the middle on have a next one; 31 or more are needed"),
        (41, {"length": 102}, "--length 102: tiny has 101 positions"),
    ],
)
def test_texts_that_are_too_short(folder, tmp_path, words, more, message):
    path = tmp_path / "short.txt"
    path.write_text("".join(WORDS[:words]))
    with pytest.raises(JaxqkvError) as error:
        prediction_divergence.figure("3", model=folder, text_file=path, **more)
    assert message in str(error.value)


def test_one_kind_of_positions(folder, tmp_path, capsys, torch_model):
    """Nothing is predicted: there is nothing to compare, and the others are drawn."""
    half = written(torch_model, 21, lambda predicted: (predicted + 1) % len(WORDS))
    (tmp_path / "text.txt").write_text("".join(WORDS[each] for each in [*[1] * 22, *half, 5]))
    line = ["figures", "prediction-divergence", "--model", str(folder), "--text-file", str(tmp_path / "text.txt")]
    assert main([*line, "--length", "20", "--arrays-only", "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"jaxqkv: {id} is not drawn: figure {id} compares correct and incorrect predictions, and no prediction is "
        "correct"
        for id in ("2b", "3", "4", "5", "6")
    ]


def test_checkpoints_without_predictions(tmp_path):
    folder = write_folder(tmp_path / "bert", BERT)
    with pytest.raises(JaxqkvError, match="bert does not predict next tokens; prediction-divergence takes GPT-2"):
        prediction_divergence.figure("3", model=folder)


def test_the_studys_own_text():
    (ids,) = jaxqkv.load("demo-gpt2").tokenizer.encode([jaxqkv.studies.stimuli.alice()], special_tokens=False)
    start = len(ids) // 2
    with STUDY.start(PredictionDivergenceOptions(demo=True)) as run:
        run.predicted = run.next
    np.testing.assert_array_equal([run.ids, run.next], [ids[start : start + 256], ids[start + 1 : start + 257]])
    assert run.of_text.startswith(f" 256 tokens of Alice's Adventures in Wonderland from token {start:,} on")


def test_a_whole_run_with_weights_that_are_not_finite(options, tmp_path):
    check_spoilt_run(
        tmp_path,
        "prediction-divergence",
        CONFIG,
        WORDS,
        *options,
        not_drawn={"2b", "3", "4", "5", "6"},
        bars={"layers": 3},
    )
