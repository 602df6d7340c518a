"""Study 9: every array of every figure against PyTorch in float64, SciPy and loops."""

import itertools
import json

import jax
import numpy as np
import pytest
from conftest import BERT, GPT2, MODEL_LIMIT, ROUNDING, changed, figures_of, write_folder, write_word_tokenizer
from helpers import pytorch
from helpers.oracles import cosine
from helpers.spoilt import check_spoilt_run

import jaxqkv
from jaxqkv import kernels
from jaxqkv.cli.main import main
from jaxqkv.errors import JaxqkvError
from jaxqkv.studies.category_selectivity import STUDY, CategorySelectivityOptions
from jaxqkv.studies.category_selectivity.words import of_lines, read_words
from jaxqkv.studies.registry import study

CONFIG = changed(GPT2, initializer_range=0.2)
TOKENS = ["?", "The", " next", " word", " is", *(f" w{index}" for index in range(38))]
LINES = ("b w3", "a w5", "a w7", "c w11", "b w2 w13", "a w17", "c w19", "c w23", "a w29", "b w31", "a w37")
WORDS = ("w3", "w2 w13", "w31", "w5", "w7", "w17", "w29", "w37", "w11", "w19", "w23")
LABEL = np.repeat([0, 1, 2], [3, 5, 3])
LAYER, EMBED, PERMUTATIONS = 1, 35, 97
PAIRS = ((0, 1), (0, 2), (1, 2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_word_tokenizer(write_folder(tmp_path_factory.mktemp("model") / "tiny", CONFIG), TOKENS)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("\n".join(LINES))
    return ["--words", str(path), "--permutations", str(PERMUTATIONS)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def arrays(folder, options, base):
    return figures_of("category-selectivity", base, folder, *options)


@pytest.fixture(scope="module")
def samples(folder):
    """Q, K and V `[layer, qkv, word, embed]` of the last and of the second token, each text run alone by PyTorch."""
    model, tokenizer = pytorch.load(folder), jaxqkv.load(folder).tokenizer
    last, second = [], []
    for word in WORDS:
        (ids,) = tokenizer.encode([f"The next word is {word}"])
        found = pytorch.activations(model, ids)
        wide = np.stack([found[name] for name in "qkv"], axis=1)
        last.append(wide[:, :, len(ids) - 1])
        second.append(wide[:, :, 1])
    return np.stack(last, axis=2), np.stack(second, axis=2)


@pytest.fixture(scope="module")
def similarity(samples):
    return np.array([[cosine(x.T) for x in layer] for layer in samples[0]])


# Of a cosine: both vectors err by the model's limit, relative to their largest value, which is less than their length.
LIMIT = 2 * np.sqrt(EMBED) * MODEL_LIMIT / 3


def sides(matrix):
    """The two samples, pair by pair."""
    within, across = [], []
    for i, j in itertools.combinations(range(len(WORDS)), 2):
        (within if LABEL[i] == LABEL[j] else across).append(matrix[i, j])
    return np.array(within), np.array(across)


def upper(matrix):
    return matrix[np.triu_indices(len(matrix), 1)]


def test_all_figures_of_the_table_are_there(arrays):
    expected = ["1", "2a", "2b", "3a", "3b", "4", "5", "6a", "6b", "7a", "7b"]
    assert sorted(arrays) == expected == list(study("category-selectivity").figures)


def test_masks(arrays):
    for i, j in itertools.product(range(len(WORDS)), repeat=2):
        same, above = LABEL[i] == LABEL[j], i < j
        expected = {"same": same, "upper": above, "within": same and above, "across": not same and above}
        assert {name: mask[i, j] for name, mask in arrays["1"].items()} == expected


def test_correlations_of_activations(arrays, samples):
    last, _ = samples
    np.testing.assert_allclose(arrays["2a"]["activations"], last[LAYER], atol=MODEL_LIMIT * np.abs(last).max())
    for layer, wide in enumerate(last):
        expected = [np.corrcoef(wide[a].ravel(), wide[b].ravel())[0, 1] for a, b in PAIRS]
        np.testing.assert_allclose(arrays["2b"]["r"][layer], expected, atol=5 * MODEL_LIMIT)
        if layer == LAYER:
            np.testing.assert_array_equal(arrays["2a"]["r"], arrays["2b"]["r"][layer])


def test_similarities(arrays, similarity):
    np.testing.assert_allclose(arrays["3a"]["similarity"], similarity[LAYER], atol=LIMIT)
    values = np.array([upper(each) for each in similarity[LAYER]])
    np.testing.assert_allclose(arrays["3b"]["values"], values, atol=LIMIT)
    expected = [np.corrcoef(values[a], values[b])[0, 1] for a, b in PAIRS]
    np.testing.assert_allclose(arrays["3b"]["r"], expected, atol=4 * LIMIT / values.std(axis=1).min())


def weighted_r(x, y, weights):
    """Correlation of the pairs of a resample, by copies."""
    taken = np.repeat(np.arange(len(weights)), weights)
    pairs = [(i, j) for i, j in itertools.combinations(taken, 2) if i != j]
    return np.corrcoef([x[pair] for pair in pairs], [y[pair] for pair in pairs])[0, 1]


def test_rsa_by_layer(arrays, similarity):
    figure = arrays["4"]
    keys = jax.random.split(jax.random.key(0), PERMUTATIONS)
    taken = jax.jit(jax.vmap(lambda key: jax.random.randint(key, (11,), 0, 11)))(keys)
    weights = [np.bincount(each, minlength=11) for each in np.asarray(taken)]
    for layer, three in enumerate(similarity):
        limit = 8 * LIMIT / min(upper(each).std() for each in three)
        for index, (a, b) in enumerate(PAIRS):
            expected = np.corrcoef(upper(three[a]), upper(three[b]))[0, 1]
            assert figure["rsa"][layer, index] == pytest.approx(expected, abs=limit)
            resampled = [weighted_r(three[a], three[b], each) for each in weights]
            ends = np.percentile(resampled, [2.5, 97.5])
            assert figure["low"][layer, index] == pytest.approx(ends[0], abs=2 * limit)
            assert figure["high"][layer, index] == pytest.approx(ends[1], abs=2 * limit)


def test_within_and_across(arrays, similarity):
    from scipy.stats import ttest_ind

    figure = arrays["5"]
    for index, (name, matrix) in enumerate(zip("qkv", similarity[LAYER], strict=True)):
        samples = sides(matrix)
        spread = min(each.std() for each in samples)
        assert figure["t"][index] == pytest.approx(ttest_ind(*samples).statistic, abs=40 * LIMIT / spread)
        for kind, values in zip(("within", "across"), samples, strict=True):
            heights, edges = np.histogram(values, bins="fd", density=True)
            np.testing.assert_allclose(figure[f"edges_{kind}_{name}"], edges, atol=LIMIT)
            np.testing.assert_allclose(figure[f"density_{kind}_{name}"], heights, rtol=1e-3)


def check_selectivity(figure, matrices, limit):
    from scipy.stats import ttest_ind

    for layer, index in itertools.product(range(3), range(3)):
        within, across = sides(matrices[layer, index])
        place = layer, index
        assert figure["difference"][place] == pytest.approx(within.mean() - across.mean(), abs=2 * limit)
        assert figure["average"][place] == pytest.approx((within.mean() + across.mean()) / 2, abs=limit)
        spread = min(within.std(), across.std())
        assert figure["t"][place] == pytest.approx(ttest_ind(within, across).statistic, abs=40 * limit / spread)


def test_selectivity(arrays, similarity):
    check_selectivity(arrays["6a"], similarity, LIMIT)
    for name, values in arrays["6a"].items():
        np.testing.assert_array_equal(arrays["6b"][name], values)


def test_selectivity_in_fishers_z(arrays, similarity):
    assert sorted(arrays["7b"]) == ["average", "difference", "t"]
    matrices = np.arctanh(similarity * (1 - np.eye(len(WORDS))))
    largest = max(np.abs(upper(each)).max() for layer in similarity for each in layer)
    check_selectivity(arrays["7b"], matrices, LIMIT / (1 - largest**2))


def test_permuted_categories(arrays, similarity):
    from scipy.stats import false_discovery_control

    figure = arrays["6a"]
    labels = kernels.permutation_null(
        LABEL.astype(np.int32), (), jax.random.key(0), statistic=lambda labels, _: labels, permutations=PERMUTATIONS
    )
    for layer, index in itertools.product(range(3), range(3)):
        values = upper(similarity[layer, index])
        one, other = np.triu_indices(len(WORDS), 1)

        def difference(label, values=values, one=one, other=other):
            within = label[one] == label[other]
            return values[within].mean() - values[~within].mean()

        null = np.array([difference(each) for each in np.asarray(labels)])
        observed = difference(LABEL)
        low, high = ((null >= observed + sign * 2 * LIMIT).sum() for sign in (1, -1))
        assert 1 + low - 1e-3 <= figure["p"][layer, index] * (1 + PERMUTATIONS) <= 1 + high + 1e-3
    q = false_discovery_control(figure["p"].astype(np.float64).ravel())
    np.testing.assert_allclose(figure["q_value"].ravel(), q, rtol=1e-6)


def test_fishers_z(arrays):
    figure = arrays["7a"]
    assert figure["cosine"].shape == (10_000,)
    assert -1 <= figure["cosine"].min() < -0.99
    assert 0.99 < figure["cosine"].max() < 1
    assert figure["cosine"].mean() == pytest.approx(0, abs=4 / np.sqrt(3 * 10_000))
    np.testing.assert_allclose(figure["z"], np.arctanh(figure["cosine"].astype(np.float64)), rtol=16 * ROUNDING)
    for name in ("cosine", "z"):
        counts, edges = np.histogram(figure[name], bins="fd")
        np.testing.assert_array_equal(figure[f"counts_{name}"], counts)
        np.testing.assert_array_equal(figure[f"edges_{name}"], edges)


def test_as_published_looks_at_the_second_token(folder, options, arrays, samples, tmp_path):
    theirs = figures_of("category-selectivity", tmp_path, folder, "2a", "2b", "3a", *options, "--as-published")
    _, second = samples
    np.testing.assert_allclose(theirs["2a"]["activations"], second[LAYER], atol=MODEL_LIMIT * np.abs(second).max())
    assert np.ptp(theirs["2a"]["activations"], axis=1).max() < MODEL_LIMIT * np.abs(second).max()
    for layer, wide in enumerate(second):
        expected = [np.corrcoef(wide[a].ravel(), wide[b].ravel())[0, 1] for a, b in PAIRS]
        np.testing.assert_allclose(theirs["2b"]["r"][layer], expected, atol=5 * MODEL_LIMIT)
    np.testing.assert_array_equal(theirs["3a"]["similarity"], arrays["3a"]["similarity"])
    captions = json.loads((tmp_path / "out/category-selectivity/manifest.json").read_text())["figures"]
    assert "as published: of the second token, the same in every text" in captions["2b"]["caption"]


def test_what_captions_and_manifest_say(arrays, base):
    manifest = json.loads((base / "out/category-selectivity/manifest.json").read_text())
    assert manifest["words"] == dict(zip(WORDS, ["b"] * 3 + ["a"] * 5 + ["c"] * 3, strict=True))
    ends = " 11 words of 3 categories. Words of several tokens, whose last one is used: w2 w13."
    assert manifest["figures"]["6a"]["caption"].endswith(ends)
    assert (
        f"in layer 1 of tiny, colours from 0.3 to 1, dashed lines between categories.{ends} (tiny has no layer 6"
        in (manifest["figures"]["3a"]["caption"])
    )


def test_a_checkpoint_that_sees_both_ways(tmp_path, monkeypatch):
    """The word is looked at, not the special token after it."""
    folder = write_folder(tmp_path / "bert", BERT)
    words = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "the", "next", "word", "is", "sun", "moon", "pear"]
    (folder / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "words.txt").write_text("space sun\nspace moon\nfruit pear\n")
    options = CategorySelectivityOptions(model=(str(folder),), words=tmp_path / "words.txt")
    seen, of_layer = [], {"similarity": (3, 3, 3), "activations": (3, 3, EMBED), "r": (3,)}

    def run_model(self, batch, *, inputs, layers, **options):
        seen.extend((np.asarray(batch.ids), np.asarray(inputs)))
        return {name: np.zeros((len(layers), *shape)) for name, shape in of_layer.items()}

    monkeypatch.setattr(jaxqkv.Model, "run", run_model)
    with STUDY.start(options) as run:
        run.compute({"shown"})
    ids, positions = seen
    assert ids.tolist() == [[1, 5, 6, 7, 8, word, 2] for word in (9, 10, 11)]
    assert positions.tolist() == [[5, 5]] * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a x\na y\n", "all words are of the category 'a'; two or more are needed"),
        ("a x\nb\n", "words.txt, line 2: 'b' has no word; a line is a category and a word"),
        ("a x\nb x\na y\n", "'x' is there 2 times; list each word once"),
        ("a x\nb y\n", "every category has a single word; at least one needs two"),
        ("\n", "words.txt: no sentence in it"),
    ],
)
def test_words_that_are_refused(folder, tmp_path, capsys, text, message):
    (tmp_path / "words.txt").write_text(text)
    line = ["figures", "category-selectivity", "1", "--model", str(folder), "--words", str(tmp_path / "words.txt")]
    assert main([*line, "--out", str(tmp_path / "out")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error


def test_the_studys_own_words():
    words = read_words(None)
    assert words.categories == ["space", "furniture", "fruit"]
    assert np.bincount(words.label).tolist() == [10, 13, 11]
    assert words.words[0] == "galaxy"
    assert words.words[-1] == "fruit"
    assert words.ends == [9.5, 22.5]
    with pytest.raises(JaxqkvError, match="here, line 1: 'a' has no word"):
        of_lines(["a "], "here")


def test_a_whole_run_with_weights_that_are_not_finite(options, tmp_path):
    check_spoilt_run(tmp_path, "category-selectivity", CONFIG, TOKENS, *options, not_drawn={"5"}, bars={"layers": 3})
