"""`--significance` of the studies whose originals compare by eye: p against loops over the same permutations."""

import itertools
import json

import jax
import numpy as np
import pytest
from conftest import GPT2, ROUNDING, changed, figures_of, random_tensors, write_folder, write_word_tokenizer
from helpers.checkpoints import WORDS
from helpers.oracles import cosine

from jaxqkv import kernels
from jaxqkv.studies import qkv_weights, token_similarity
from jaxqkv.studies.significance import q_values

CONFIG = changed(GPT2, initializer_range=0.2)
PERMUTATIONS, EMBED, HEADS, HEAD_DIM = 199, 35, 5, 7
OPTIONS = ["--significance", "--permutations", str(PERMUTATIONS)]
KEY = jax.random.key(0)


def orders(size):
    """The permutations that a test makes of so many labels."""
    names = np.arange(size, dtype=np.int32)
    how = {"statistic": lambda labels, _: labels, "permutations": PERMUTATIONS}
    return np.asarray(kernels.permutation_null(names, (), KEY, **how))


def assert_p(p, null, observed, limit):
    """p counts the null, two-sided, give or take what only rounding tells from the observed value."""
    low, high = ((np.abs(null) >= abs(observed) + sign * limit).sum() for sign in (1, -1))
    assert 1 + low - 1e-3 <= p * (1 + PERMUTATIONS) <= 1 + high + 1e-3


def assert_q(*pairs):
    """All tests of a figure together."""
    from scipy.stats import false_discovery_control

    p, q = (np.concatenate([each.ravel() for each in side]) for side in zip(*pairs, strict=True))
    np.testing.assert_allclose(q, false_discovery_control(p.astype(np.float64)), rtol=1e-6)


@pytest.fixture(scope="module")
def tensors():
    """Of W_Q in layer 1 the columns of a head have a direction in common."""
    tensors = random_tensors(CONFIG)
    directions = np.random.default_rng(7).normal(0, 0.15, (EMBED, HEADS)).repeat(HEAD_DIM, axis=1)
    tensors["h.1.attn.c_attn.weight"][:, :EMBED] += directions.astype(np.float32)
    return tensors


@pytest.fixture(scope="module")
def folder(tensors, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model") / "tiny", CONFIG, tensors)


@pytest.fixture(scope="module")
def arrays(folder, tmp_path_factory):
    base = tmp_path_factory.mktemp("study")
    return figures_of("qkv-weights", base, folder, "--model", str(folder), f"random:{folder}", *OPTIONS)


class TestOfHeads:
    def expected(self, tensors, layer, matrix):
        """Null and observed difference of the mean cosines, by masks of pairs."""
        wide = tensors[f"h.{layer}.attn.c_attn.weight"]
        values = cosine(wide[:, matrix * EMBED : (matrix + 1) * EMBED])[np.triu_indices(EMBED, 1)]
        head = np.arange(EMBED) // HEAD_DIM
        one, other = np.triu_indices(EMBED, 1)

        def difference(head):
            same = head[one] == head[other]
            return values[same].mean() - values[~same].mean()

        return np.array([difference(head[order]) for order in orders(EMBED)]), difference(head)

    # Sums of 35 unit columns, over the 105 pairs within heads.
    LIMIT = 2 * EMBED**2 * ROUNDING / 105

    def test_within_and_across(self, arrays, tensors):
        figure = arrays["5c"]
        assert figure["p"].shape == figure["q_value"].shape == (3, 2)
        for layer, matrix in itertools.product(range(3), range(2)):
            assert_p(figure["p"][layer, matrix], *self.expected(tensors, layer, matrix), self.LIMIT)
        assert_q((figure["p"], figure["q_value"]))
        assert figure["p"][1, 0] == pytest.approx(1 / (PERMUTATIONS + 1))  # the planted one
        assert (figure["q_value"] < 0.05).sum() == 1

    def test_every_model(self, arrays, tensors):
        figure = arrays["6"]
        for layer, matrix in itertools.product(range(3), range(3)):
            assert_p(figure["p_tiny"][layer, matrix], *self.expected(tensors, layer, matrix), self.LIMIT)
        names = ("tiny", "random:tiny")
        assert_q(*((figure[f"p_{name}"], figure[f"q_value_{name}"]) for name in names))

    def test_only_where_it_is_asked_for(self, folder, arrays, tmp_path):
        plain = figures_of("qkv-weights", tmp_path, folder, "5c", "6", "--layer", "1")
        assert sorted(plain["5c"]) == ["mean", "std"]
        assert sorted(plain["6"]) == ["mean_tiny", "std_tiny"]
        for id in ("5c", "6"):
            for name, values in plain[id].items():
                np.testing.assert_array_equal(arrays[id][name], values)

    def test_the_picture(self, folder):
        """A star on each curve of the planted layer, and the caption that says what it is."""
        options = {"model": folder, "permutations": PERMUTATIONS, "dpi": 40}
        figure = qkv_weights.figure("5c", significance=True, **options)
        plain = qkv_weights.figure("5c", **options)
        count = [sum(line.get_marker() == "*" for line in each.figure.axes[0].lines) for each in (figure, plain)]
        assert count == [4, 0]
        starred = [line.get_xdata().tolist() for line in figure.figure.axes[0].lines if line.get_marker() == "*"]
        assert starred == [[1], [1], [], []]
        assert figure.caption.removeprefix(plain.caption) == (
            " Stars: the means within and across heads differ, q < 0.05 of two-sided tests in which the columns are "
            "permuted over the heads (199 times, seed 0)."
        )


SENTENCES = ("a cat saw her run home", "her cat saw her", "a cat saw her home", "home run her a her", "a a a her cat",
             "run home saw her a cat her", "a run her")  # fmt: skip
GROUPS = {"QQ": (0, 0), "KK": (1, 1), "VV": (2, 2), "QK": (0, 1), "QV": (0, 2), "KV": (1, 2)}


@pytest.fixture(scope="module")
def word_folder(tmp_path_factory):
    return write_word_tokenizer(write_folder(tmp_path_factory.mktemp("model") / "tiny", CONFIG), WORDS)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    path = tmp_path_factory.mktemp("sentences") / "sentences.txt"
    path.write_text("\n".join(SENTENCES))
    return str(path)


class TestOfTargets:
    @pytest.mark.parametrize("measure", ["correlation", "cosine"])
    def test_every_group(self, word_folder, sentences, tmp_path, measure):
        from jaxqkv import load

        more = ["--sentences", sentences, "--measure", measure]
        arrays = figures_of("token-similarity", tmp_path, word_folder, "distributions", "laminar", *more, *OPTIONS)
        model = load(word_folder)
        batch = model.tokenize(list(SENTENCES))
        acts = model.run(batch)
        places = [sentence.split().index("her", 1) for sentence in SENTENCES]
        how = {"n_unit": 7, "statistic": lambda exchanged, _: exchanged, "permutations": PERMUTATIONS}
        exchanges = np.asarray(kernels.exchange_null((), KEY, **how))
        assert exchanges.shape == (PERMUTATIONS, 7)
        for layer in range(3):
            wide = [np.asarray(x[layer]).swapaxes(1, 2).reshape(7, -1, EMBED) for x in (acts.q, acts.k, acts.v)]
            wide = np.concatenate(wide, axis=2).astype(np.float64)
            rows = np.arange(7)
            pair = wide[rows, places], wide[rows, np.array(places) - 1]

            def means(x, measure=measure):
                x = x - x.mean(axis=0) if measure == "correlation" else x
                unit = x / np.linalg.norm(x, axis=0)
                blocks = (unit.T @ unit).reshape(3, EMBED, 3, EMBED)
                upper = np.triu_indices(EMBED, 1)
                return np.array([blocks[a, :, b][upper if a == b else ...].mean() for a, b in GROUPS.values()])

            def difference(exchanged, pair=pair, means=means):
                swapped = [np.where(exchanged[:, None], b, a) for a, b in (pair, pair[::-1])]
                return means(swapped[0]) - means(swapped[1])

            null, observed = np.array([difference(each) for each in exchanges]), difference(np.zeros(7, bool))
            for group in range(6):
                assert_p(arrays["laminar"]["p"][layer, group], null[:, group], observed[group], 1e-5)
        np.testing.assert_array_equal(arrays["distributions"]["p"], arrays["laminar"]["p"][1])
        assert_q((arrays["laminar"]["p"], arrays["laminar"]["q_value"]))
        assert_q((arrays["distributions"]["p"], arrays["distributions"]["q_value"]))

    def test_means_of_groups(self):
        from jaxqkv.studies.token_similarity.exchanges import group_means

        x = np.random.default_rng(0).normal(size=(13, 3 * 5)).astype(np.float32)
        for centred in (False, True):
            similarity = cosine(x - x.mean(axis=0) if centred else x).reshape(3, 5, 3, 5)
            upper = np.triu_indices(5, 1)
            expected = [similarity[a, :, b][upper if a == b else ...].mean() for a, b in GROUPS.values()]
            np.testing.assert_allclose(group_means(x, centred=centred), expected, atol=15 * ROUNDING)

    def test_only_where_it_is_asked_for(self, word_folder, sentences, tmp_path):
        plain = token_similarity.figure(["distributions", "laminar"], model=word_folder, sentences=sentences, dpi=20)
        assert not {"p", "q_value"} & {*plain[0].arrays, *plain[1].arrays}
        assert "exchanged" not in plain[0].caption + plain[1].caption


class TestOfFrequencies:
    def test_every_layer(self, tmp_path):
        """Against correlations over all occurrences, each token with the log frequency of another."""
        folder = write_word_tokenizer(write_folder(tmp_path / "tiny", CONFIG), [f" w{index}" for index in range(43)])
        generator = np.random.default_rng(0)
        chances = np.arange(1, 44) ** -1.0
        documents = ["".join(f" w{i}" for i in generator.choice(43, 31, p=chances / chances.sum())) for _ in range(7)]
        (tmp_path / "corpus.txt").write_text("\n\n".join(documents))
        line = ["--corpus", str(tmp_path / "corpus.txt"), "--documents", "paragraphs", "--tokens", "93", "--no-cache"]
        line += ["--batch", "5", "--length", "17"]
        arrays = figures_of("token-frequency", tmp_path, folder, "2", "4a", "4b", *line, *OPTIONS)
        figure, all_layers = arrays["4b"], arrays["4a"]
        assert all_layers["layers"].tolist() == [0, 1, 2]
        assert figure["left_out"] > 0  # tokens of the batch that were never counted
        x, ids = all_layers["log_frequency"][:, 1:].ravel(), arrays["2"]["ids"][:, 1:].ravel()
        known = ~np.isnan(x)
        tokens, place = np.unique(ids[known], return_inverse=True)
        frequency = np.array([x[known][place == index][0] for index in range(len(tokens))])
        for layer in range(3):
            y = all_layers["adjustment"][layer][:, 1:].ravel()[known].astype(np.float64)
            null = [np.corrcoef(frequency[order][place], y)[0, 1] for order in orders(len(tokens))]
            observed = np.corrcoef(frequency[place], y)[0, 1]
            assert figure["r"][layer] == pytest.approx(observed, abs=1e-5)
            assert_p(figure["p"][layer], np.array(null), observed, 1e-5)
        assert_q((figure["p"], figure["q_value"]))
        captions = json.loads((tmp_path / "out/token-frequency/manifest.json").read_text())["figures"]
        assert "the frequencies of the batch's distinct tokens are permuted (199 times" in captions["4b"]["caption"]
        plain = figures_of("token-frequency", tmp_path / "plain", folder, "4b", *line)
        assert sorted(plain["4b"]) == ["left_out", "r"]
        np.testing.assert_array_equal(plain["4b"]["r"], figure["r"])


def test_q_values_share_all_tests_and_leave_nan_out():
    from scipy.stats import false_discovery_control

    one, two = np.array([[0.01, np.nan], [0.5, 0.02]], np.float32), np.array([0.001, 0.9, 0.04], np.float32)
    q = q_values(one, two)
    together = np.array([0.01, 0.5, 0.02, 0.001, 0.9, 0.04], np.float32).astype(np.float64)
    expected = false_discovery_control(together)
    np.testing.assert_allclose(q[0], [[expected[0], np.nan], expected[1:3]], rtol=1e-6)
    np.testing.assert_allclose(q[1], expected[3:], rtol=1e-6)
    assert np.isnan(q_values(np.full(3, np.nan, np.float32))[0]).all()
