"""`--significance` of the studies whose originals compare by eye: p against loops over the same permutations."""

import functools
import itertools
import json

import jax
import numpy as np
import pytest
from conftest import GPT2, ROUNDING, changed, figures_of, random_tensors, write_folder, write_word_tokenizer
from helpers.checkpoints import WORDS
from helpers.oracles import cosine

from jaxqkv import kernels, load
from jaxqkv.studies import qkv_weights, token_frequency
from jaxqkv.studies.significance import q_values

CONFIG = changed(GPT2, initializer_range=0.2)
PERMUTATIONS, EMBED, HEADS, HEAD_DIM = 127, 35, 5, 7
KEY = jax.random.key(0)


@functools.cache
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
def models(tensors, tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("model") / "tiny", CONFIG, tensors)
    return [folder, f"random:{folder}"]


@pytest.fixture(scope="module")
def of_heads(models):
    options = {"significance": True, "permutations": PERMUTATIONS}
    return qkv_weights.figure(["5c", "6"], model=models, dpi=40, **options)


@pytest.fixture(scope="module")
def expected(tensors):
    """A function: null and observed difference of the mean cosines, by masks of pairs."""
    head = np.arange(EMBED) // HEAD_DIM
    one, other = np.triu_indices(EMBED, 1)

    @functools.cache
    def expected(layer, matrix):
        wide = tensors[f"h.{layer}.attn.c_attn.weight"]
        values = cosine(wide[:, matrix * EMBED : (matrix + 1) * EMBED])[one, other]

        def difference(head):
            same = head[one] == head[other]
            return values[same].mean() - values[~same].mean()

        return np.array([difference(head[order]) for order in orders(EMBED)]), difference(head)

    return expected


class TestOfHeads:
    # Sums of 35 unit columns, over the 105 pairs within heads.
    LIMIT = 2 * EMBED**2 * ROUNDING / 105

    def test_within_and_across(self, of_heads, expected):
        figure = of_heads[0].arrays
        assert figure["p"].shape == figure["q_value"].shape == (3, 2)
        for layer, matrix in itertools.product(range(3), range(2)):
            assert_p(figure["p"][layer, matrix], *expected(layer, matrix), self.LIMIT)
        assert_q((figure["p"], figure["q_value"]))
        assert figure["p"][1, 0] == pytest.approx(1 / (PERMUTATIONS + 1))  # the planted one
        assert (figure["q_value"] < 0.05).sum() == 1

    def test_every_model(self, of_heads, expected):
        figure = of_heads[1].arrays
        for layer, matrix in itertools.product(range(3), range(3)):
            assert_p(figure["p_tiny"][layer, matrix], *expected(layer, matrix), self.LIMIT)
        names = ("tiny", "random:tiny")
        assert_q(*((figure[f"p_{name}"], figure[f"q_value_{name}"]) for name in names))

    def test_only_where_it_is_asked_for(self, models, of_heads):
        """Then a star on each curve of the planted layer too, and the caption that says what it is."""
        plain = qkv_weights.figure(["5c", "6"], model=models, dpi=40)
        assert sorted(plain[0].arrays) == ["mean", "std"]
        assert sorted(plain[1].arrays) == ["mean_random:tiny", "mean_tiny", "std_random:tiny", "std_tiny"]
        for figure, without in zip(of_heads, plain, strict=True):
            for name, values in without.arrays.items():
                np.testing.assert_array_equal(figure.arrays[name], values)
        lines = [[*each.figure.axes[0].lines] for each in (of_heads[0], plain[0])]
        starred = [[line.get_xdata().tolist() for line in each if line.get_marker() == "*"] for each in lines]
        assert starred == [[[1], [1], [], []], []]
        assert of_heads[0].caption.removeprefix(plain[0].caption) == (
            " Stars: the means within and across heads differ, q < 0.05 of two-sided tests in which the columns are "
            f"permuted over the heads ({PERMUTATIONS} times, seed 0)."
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


@pytest.fixture(scope="module")
def sides(word_folder):
    """Q, K and V of the targets and of the tokens before them, `[two, layer, sentence, three_embed]`."""
    model = load(word_folder)
    acts = model.run(model.tokenize(list(SENTENCES)), capture={"q", "k", "v"})
    wide = np.concatenate([np.asarray(x).swapaxes(2, 3).reshape(3, 7, -1, EMBED) for x in (acts.q, acts.k, acts.v)], 3)
    places = np.array([sentence.split().index("her", 1) for sentence in SENTENCES])
    return np.stack([wide[:, np.arange(7), places - shift] for shift in (0, 1)]).astype(np.float64)


@pytest.fixture(scope="module")
def exchanges():
    """Those that a test makes, and that of none."""
    how = {"n_unit": 7, "statistic": lambda exchanged, _: exchanged, "permutations": PERMUTATIONS}
    made = np.asarray(kernels.exchange_null((), KEY, **how))
    assert made.shape == (PERMUTATIONS, 7)
    return np.concatenate([made, np.zeros((1, 7), bool)])


def means(x, centred):
    """Mean similarities of the groups, `[exchange, group]`, of samples `[exchange, sentence, three_embed]`."""
    x = x - x.mean(axis=1, keepdims=True) if centred else x
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    blocks = (unit.swapaxes(1, 2) @ unit).reshape(-1, 3, EMBED, 3, EMBED)
    one, other = np.triu_indices(EMBED, 1)
    groups = (blocks[:, a, :, b][:, one, other] if a == b else blocks[:, a, :, b] for a, b in GROUPS.values())
    return np.stack([each.reshape(len(x), -1).mean(axis=1) for each in groups], axis=1)


class TestOfTargets:
    @pytest.mark.parametrize("measure", ["correlation", "cosine"])
    def test_every_group(self, word_folder, sentences, sides, exchanges, tmp_path, measure):
        more = ["--sentences", sentences, "--measure", measure, "--significance", "--permutations", str(PERMUTATIONS)]
        arrays = figures_of("token-similarity", tmp_path, word_folder, "distributions", "laminar", *more)
        for layer in range(3):
            target, other = sides[:, layer]
            swapped, centred = exchanges[:, :, None], measure == "correlation"
            one, two = (np.where(swapped, *pair) for pair in ((other, target), (target, other)))
            differences = means(one, centred) - means(two, centred)
            for group in range(6):
                *null, observed = differences[:, group]
                assert_p(arrays["laminar"]["p"][layer, group], np.array(null), observed, 1e-5)
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
            ours = jax.jit(functools.partial(group_means, centred=centred))(x)
            np.testing.assert_allclose(np.asarray(ours), expected, atol=15 * ROUNDING)

    def test_only_where_it_is_asked_for(self, word_folder, sentences, tmp_path):
        ids = ("distributions", "laminar")
        plain = figures_of("token-similarity", tmp_path, word_folder, *ids, "--sentences", sentences)
        assert not {"p", "q_value"} & {*plain["distributions"], *plain["laminar"]}
        captions = json.loads((tmp_path / "out/token-similarity/manifest.json").read_text())["figures"]
        assert "exchanged" not in captions["distributions"]["caption"] + captions["laminar"]["caption"]


BATCH, LENGTH, BINS = 5, 17, 40


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """In layer 0 the scores of a key rise with its token's frequency: W_K reads a direction of the embeddings."""
    tensors = random_tensors(CONFIG)
    generator = np.random.default_rng(5)
    direction, answer = generator.normal(size=(2, EMBED)).astype(np.float32)
    direction -= direction.mean()
    rank = np.linspace(2, -2, 43, dtype=np.float32)
    tensors["wte.weight"][:43] += rank[:, None] * direction
    tensors["h.0.attn.c_attn.weight"][:, EMBED : 2 * EMBED] += np.outer(direction, answer) / EMBED
    tensors["h.0.attn.c_attn.bias"][:EMBED] = answer
    folder = write_folder(tmp_path_factory.mktemp("model") / "tiny", CONFIG, tensors)
    return write_word_tokenizer(folder, [f" w{index}" for index in range(43)])


@pytest.fixture(scope="module")
def about(planted, tmp_path_factory):
    """Options of a run of a corpus of which not all tokens are counted."""
    generator = np.random.default_rng(0)
    chances = np.arange(1, 44) ** -1.0
    texts = ["".join(f" w{i}" for i in generator.choice(43, 31, p=chances / chances.sum())) for _ in range(7)]
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n\n".join(texts))
    return {"model": planted, "corpus": path, "documents": "paragraphs", "tokens": 93, "no_cache": True,
            "batch": BATCH, "length": LENGTH, "dpi": 20}  # fmt: skip


@pytest.fixture(scope="module")
def of_frequencies(about):
    options = about | {"significance": True, "permutations": PERMUTATIONS}
    return {figure.id: figure for figure in token_frequency.figure(["1", "2", "4a", "4b", "6"], **options)}


@pytest.fixture(scope="module")
def plain(about):
    return {figure.id: figure for figure in token_frequency.figure(["4b", "6"], **about)}


class TestOfFrequencies:
    def test_every_layer(self, of_frequencies, plain):
        """Against correlations over all occurrences, each token with the log frequency of another."""
        figure, all_layers = of_frequencies["4b"].arrays, of_frequencies["4a"].arrays
        assert all_layers["layers"].tolist() == [0, 1, 2]
        assert figure["left_out"] > 0  # tokens of the batch that were never counted
        x, ids = all_layers["log_frequency"][:, 1:].ravel(), of_frequencies["2"].arrays["ids"][:, 1:].ravel()
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
        tested = f"the frequencies of the batch's distinct tokens are permuted ({PERMUTATIONS} times"
        assert tested in of_frequencies["4b"].caption
        assert tested not in plain["4b"].caption
        assert sorted(plain["4b"].arrays) == ["left_out", "r"]
        np.testing.assert_array_equal(plain["4b"].arrays["r"], figure["r"])


class TestOfBins:
    """Figure 6 of token-frequency: everything is binned anew with permuted frequencies."""

    def correlations(self, score, ids, log_frequency):
        """r of means and of standard deviations, `[2, layer]`, from the definition."""
        sums = np.zeros((4, 3, BINS))
        for row in range(BATCH):
            x = log_frequency[ids[row]]
            x = (x[:, None] + x).ravel()
            edges = np.percentile(x[~np.isnan(x)], np.linspace(0, 100, BINS + 1))
            inside = (x[:, None] >= edges[:-1]) & (x[:, None] < edges[1:])
            inside[:, -1] |= x == edges[-1]
            there = inside.any(axis=0)
            inside, centre = inside[:, there], (edges[:-1] + edges[1:])[there] / 2
            mean = score[:, row] @ inside / inside.sum(axis=0)
            squares = ((score[:, row, :, None] - mean[:, None]) ** 2 * inside).sum(axis=1)
            moments = mean, np.sqrt(squares / inside.sum(axis=0))
            sums[:, :, there] += [np.ones(mean.shape), np.broadcast_to(centre, mean.shape), *moments]
        there = sums[0, 0] > 0
        _, centre, *moments = sums[:, :, there] / sums[0, :, there].T
        return np.array([[np.corrcoef(*pair)[0, 1] for pair in zip(centre, y, strict=True)] for y in moments])

    def test_every_layer(self, planted, of_frequencies):
        arrays = {id: figure.arrays for id, figure in of_frequencies.items()}
        figure, ids, log_frequency = arrays["6"], arrays["2"]["ids"], arrays["1"]["log_frequency"].astype(np.float64)
        acts = load(planted).run(ids, capture={"q", "k"})
        q, k = (np.asarray(each, np.float64) for each in (acts.q, acts.k))
        score = (q @ k.swapaxes(-1, -2)).mean(axis=2) / HEAD_DIM**0.5
        score = score.reshape(3, BATCH, -1)
        assert figure["left_out"] > 0  # tokens that were never counted
        tokens = np.unique(ids)
        tokens = tokens[~np.isnan(log_frequency[tokens])]
        assert len(tokens) < len(np.unique(ids))
        observed = self.correlations(score, ids, log_frequency)
        np.testing.assert_allclose([figure["r_mean"], figure["r_std"]], observed, atol=1e-5)
        null = []
        for order in orders(len(tokens)):
            permuted = np.full_like(log_frequency, np.nan)
            permuted[tokens] = log_frequency[tokens[order]]
            null.append(self.correlations(score, ids, permuted))
        for name, values, each in zip(("mean", "std"), np.moveaxis(null, 1, 0), observed, strict=True):
            assert figure[f"p_{name}"].shape == (3,)
            for layer in range(3):
                assert_p(figure[f"p_{name}"][layer], values[:, layer], each[layer], 1e-5)
        assert figure["p_mean"][0] == pytest.approx(1 / (PERMUTATIONS + 1))
        assert figure["q_value_mean"][0] < 0.05
        assert_q(*((figure[f"p_{name}"], figure[f"q_value_{name}"]) for name in ("mean", "std")))

    def test_only_where_it_is_asked_for(self, of_frequencies, plain):
        """Then a star in panel C at the planted layer too, and the caption that says what it is."""
        figure, without = of_frequencies["6"], plain["6"]
        assert sorted(without.arrays) == ["centres", "left_out", "mean", "r_mean", "r_std", "std"]
        for name, values in without.arrays.items():
            np.testing.assert_array_equal(figure.arrays[name], values)
        for suffix, label in (("mean", "C)"), ("std", "D)")):
            lines = [[*axes.lines] for axes in figure.figure.axes if axes.get_title(loc="center").startswith(label)]
            starred = [line.get_xdata().tolist() for line in lines[0] if line.get_marker() == "*"]
            assert starred == [np.flatnonzero(figure.arrays[f"q_value_{suffix}"] < 0.05).tolist()]
        assert not any(line.get_marker() == "*" for axes in without.figure.axes for line in axes.lines)
        assert figure.caption.removeprefix(without.caption) == (
            " Stars: q < 0.05 of two-sided tests in which the frequencies of the batch's distinct tokens are permuted, "
            f"and all pairs binned anew ({PERMUTATIONS} times, seed 0)."
        )

    @pytest.mark.parametrize("counts", [(1, 2, 3, 4, 6, 9, 12), (5, 5, 5, 5, 5, 5, 5), (1, 1, 1, 1, 1, 1, 700)])
    def test_bins_of_a_sequence_are_those_of_all_its_pairs(self, counts):
        """Edges to the last place, where sums of frequencies are equal; and large scores that are almost the same."""
        from jaxqkv.studies.token_frequency import permuted_bins, reductions

        generator = np.random.default_rng(0)
        log_frequency = np.log(np.array([*counts, np.nan]) / 1000)
        ids = generator.permutation(np.repeat(np.arange(8), (1, 1, 2, 3, 5, 11, 1, 3)))[None]
        score = generator.normal(30, 0.1, (3, 27, 27)).astype(np.float32)
        score[1] = score[1, ids[0]][:, ids[0]] + generator.normal(0, 1e-3, (27, 27)).astype(np.float32)
        token, occurrences = reductions.distinct_tokens(ids, log_frequency[ids])
        sums_by_tokens = jax.jit(reductions.sums_by_tokens)
        sums = [np.asarray(sums_by_tokens(each[None], token, occurrences)) for each in score]
        cut = permuted_bins.cut_sums(np.stack(sums), occurrences)
        (pairs,) = permuted_bins.token_pairs(ids, cut, np.arange(7))
        there, centres, moments = permuted_bins.binned_pairs_of_tokens(pairs, log_frequency[:7])
        x = reductions.pair_sums(log_frequency[ids[0]]).ravel()
        edges = kernels.percentile_edges(x, n_bin=40)
        np.testing.assert_array_equal(centres, (edges[1:] + edges[:-1]) / 2)
        index = kernels.bin_index(x, edges)
        assert there.tolist() == [(index == b).any() for b in range(40)]
        for b in np.flatnonzero(there):
            values = score.astype(np.float64).reshape(3, -1)[:, index == b]
            # Sums of up to 121 scores of 30 in float32.
            np.testing.assert_allclose(moments[b, :3], values.mean(axis=1), rtol=16 * ROUNDING)
            np.testing.assert_allclose(moments[b, 3:], values.std(axis=1), rtol=1e-4, atol=1e-5)

    def test_sequences_without_a_counted_token(self):
        from jaxqkv.studies.token_frequency import permuted_bins, reductions

        log_frequency, ids = np.full(11, np.nan), np.arange(10).reshape(2, 5)
        token, occurrences = reductions.distinct_tokens(ids, log_frequency[ids])
        sums = permuted_bins.cut_sums(np.zeros((3, 2, 2, 15), np.float32), occurrences)
        assert (token == -1).all()
        assert sums.shape == (0, 2, 3)
        null = permuted_bins.correlation_null(ids, sums, log_frequency, seed=0, permutations=7)
        assert null.shape == (2, 7, 3)
        assert np.isnan(null).all()

    def test_what_is_undefined(self):
        """No correlation has no test, and a permutation without one is no sign of an effect."""
        from jaxqkv.studies.token_frequency.permuted_bins import bin_tests

        null = np.full((2, 9, 3), np.nan)
        null[0, :7] = 0.1
        tests = bin_tests(null, np.array([0.5, np.nan, 0.05], np.float32), np.array([0.9, 0.9, np.nan], np.float32))
        np.testing.assert_allclose(tests["p_mean"], [0.3, np.nan, 1], rtol=1e-6)
        np.testing.assert_allclose(tests["p_std"], [1, 1, np.nan], rtol=1e-6)


def test_q_values_share_all_tests_and_leave_nan_out():
    from scipy.stats import false_discovery_control

    one, two = np.array([[0.01, np.nan], [0.5, 0.02]], np.float32), np.array([0.001, 0.9, 0.04], np.float32)
    q = q_values(one, two)
    together = np.array([0.01, 0.5, 0.02, 0.001, 0.9, 0.04], np.float32).astype(np.float64)
    expected = false_discovery_control(together)
    np.testing.assert_allclose(q[0], [[expected[0], np.nan], expected[1:3]], rtol=1e-6)
    np.testing.assert_allclose(q[1], expected[3:], rtol=1e-6)
    assert np.isnan(q_values(np.full(3, np.nan, np.float32))[0]).all()
