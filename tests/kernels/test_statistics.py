"""Tests, intervals and distances between distributions: against SciPy, NumPy and loops, and over many seeds."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROUNDING

from jaxqkv import kernels


def samples(seed, *sizes, shift=0.0):
    generator = np.random.default_rng(seed)
    return [generator.normal(shift * index, 1 + index, size).astype(np.float32) for index, size in enumerate(sizes)]


class TestJensenShannon:
    # Two roundings of each share and of each of its logarithm's terms; shares add up to 2, terms are at most ln 2.
    LIMIT = 2 * 6 * ROUNDING

    @pytest.mark.parametrize("seed", range(5))
    def test_as_scipy_has_it(self, seed):
        from scipy.spatial.distance import jensenshannon

        p, q = np.random.default_rng(seed).integers(0, 9, (2, 31))
        assert kernels.jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q) ** 2, abs=self.LIMIT)

    def test_definition(self):
        p, q = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.0, 0.75])
        m = (p + q) / 2
        expected = 0.5 * sum(a * math.log(a / c) for a, c in zip(p, m, strict=True) if a)
        expected += 0.5 * sum(b * math.log(b / c) for b, c in zip(q, m, strict=True) if b)
        assert kernels.jensen_shannon(p, q) == pytest.approx(expected, abs=self.LIMIT)

    def test_range(self):
        p, q = np.array([3, 4, 0, 0]), np.array([0, 0, 5, 1])
        assert kernels.jensen_shannon(p, p) == 0
        assert kernels.jensen_shannon(p, 7 * p) < self.LIMIT
        assert kernels.jensen_shannon(p, q) == pytest.approx(math.log(2), abs=self.LIMIT)
        assert np.isnan(kernels.jensen_shannon(p, 0 * p))

    def test_nearly_equal_distributions_keep_their_digits(self):
        """From the second order, Σ (p − q)² / (8 m), of differences that float32 holds."""
        p, q = np.full(4, 2.0**12), 2.0**12 + np.array([1, -1, 2, -2])
        expected = ((p - q) ** 2 / (8 * (p + q) / 2)).sum() / p.sum()
        assert kernels.jensen_shannon(p, q) == pytest.approx(expected, rel=1e-3)


class TestT:
    @pytest.mark.parametrize(("name", "equal"), [("student_t", True), ("welch_t", False)])
    @pytest.mark.parametrize("shift", [0.0, 1e4])
    def test_as_scipy_has_it(self, name, equal, shift):
        from scipy import stats

        x, y = samples(1, 23, 37)
        x, y = x + np.float32(shift), y + np.float32(shift)
        expected = stats.ttest_ind(x.astype(np.float64), y.astype(np.float64), equal_var=equal)
        t, freedom = getattr(kernels, name)(x, y)
        # Sums of 60 terms, of which each errs by at most 60 roundings of its magnitude; |x| / |x̄ − ȳ| is 10 or less.
        assert t == pytest.approx(expected.statistic, rel=600 * ROUNDING)
        assert freedom == pytest.approx(expected.df, rel=600 * ROUNDING)

    @pytest.mark.parametrize("kernel", [kernels.student_t, kernels.welch_t])
    def test_values_that_do_not_count_may_hold_anything(self, kernel):
        from scipy import stats

        (x,) = samples(2, (7, 13))
        first, second = x > 0.5, x < 0.1
        for mask in (first, second):
            assert mask.sum() > 20
        theirs = stats.ttest_ind(*(x[mask].astype(np.float64) for mask in (first, second)),
                                 equal_var=kernel is kernels.student_t)  # fmt: skip
        expected = theirs.statistic, theirs.df
        np.testing.assert_allclose(kernel(x, x, first, second), expected, rtol=200 * ROUNDING)
        holed = np.where(first | second, x, np.nan)
        np.testing.assert_allclose(kernel(holed, holed, first, second), expected, rtol=200 * ROUNDING)

    def test_sizes_and_scales(self):
        x, y = samples(3, 23, 37, shift=2.0)
        t, _ = kernels.student_t(x, y)
        assert kernels.student_t(y, x)[0] == pytest.approx(-float(t), rel=100 * ROUNDING)
        assert kernels.student_t(x * np.float32(1e30), y * np.float32(1e30))[0] == pytest.approx(float(t), rel=1e-5)
        assert np.isnan(kernels.student_t(np.ones_like(x), np.ones_like(y))[0])
        assert np.isnan(kernels.student_t(x[:1], y[:1])[0])


def by_numpy(x, y):
    wide = np.column_stack([np.ones(len(x)), x]).astype(np.float64)
    return np.linalg.lstsq(wide, y.astype(np.float64))[0]


class TestRegression:
    def test_as_numpy_has_it(self):
        generator = np.random.default_rng(0)
        x = generator.normal(size=(41, 3)).astype(np.float32)
        y = (2 + x @ [1, -3, 0.5] + generator.normal(size=41)).astype(np.float32)
        # Backward stable: of the order of 41 roundings times the condition number of the unit columns.
        np.testing.assert_allclose(kernels.linear_regression(x, y), by_numpy(x, y), atol=41 * 5 * ROUNDING)

    def test_nearly_collinear_columns_far_from_zero(self):
        """The normal equations in float32 have no digit left here."""
        generator = np.random.default_rng(1)
        a = generator.normal(1000, 1, 1009)
        x = np.column_stack([a, a + generator.normal(0, 0.05, 1009)]).astype(np.float32)
        y = (3 + 2 * x[:, 0] - x[:, 1] + generator.normal(0, 0.1, 1009)).astype(np.float32)
        expected = by_numpy(x, y)
        centred = x - x.mean(axis=0, dtype=np.float64)
        condition = np.linalg.cond(centred / np.linalg.norm(centred, axis=0))
        found = kernels.linear_regression(x, y)
        np.testing.assert_allclose(found[1:], expected[1:], rtol=30 * condition * ROUNDING)
        assert found[0] == pytest.approx(expected[0], abs=1000 * 60 * condition * ROUNDING)

    def test_observations_that_do_not_count_may_hold_anything(self):
        generator = np.random.default_rng(2)
        x, y = generator.normal(size=(29, 2)).astype(np.float32), generator.normal(size=29).astype(np.float32)
        where = np.arange(29) % 4 > 0
        expected = by_numpy(x[where], y[where])
        x[~where], y[~where] = np.nan, np.inf
        np.testing.assert_allclose(kernels.linear_regression(x, y, where), expected, atol=29 * ROUNDING)

    def test_a_line(self):
        """The constant is the mean minus the slope times the other mean, both of size 29 and less."""
        x = np.arange(30, dtype=np.float32)
        np.testing.assert_allclose(kernels.linear_regression(x[:, None], 5 - 2 * x), [5, -2], atol=29 * 2 * ROUNDING)

    @pytest.mark.parametrize(
        "x",
        [
            np.ones((30, 1)),
            np.arange(90).reshape(30, 3)[:, [0]] * [[1, 0]],
            np.outer(np.arange(30), [1, 3]),
            np.arange(4).reshape(2, 2) ** 2,
        ],
        ids=["constant", "zeros", "collinear", "too few"],
    )
    def test_undetermined_coefficients_are_nan(self, x):
        y = np.arange(len(x), dtype=np.float32)
        assert np.isnan(kernels.linear_regression(x.astype(np.float32), y)).all()

    def test_vmapped_over_layers(self):
        (x,) = samples(4, (3, 19, 2))
        y = x.sum(axis=2) ** 2
        together = jax.vmap(kernels.linear_regression)(x, y)
        alone = [by_numpy(*layer) for layer in zip(x, y, strict=True)]
        np.testing.assert_allclose(together, alone, atol=50 * ROUNDING * np.abs(y).max())


def symmetric(seed, n):
    x = np.random.default_rng(seed).normal(size=(n, n))
    return (x + x.T).astype(np.float32)


class TestSimilarityOfMatrices:
    def test_definition(self):
        x, y = symmetric(0, 13), symmetric(1, 13)
        upper = np.triu_indices(13, 1)
        expected = np.corrcoef(x[upper], y[upper])[0, 1]
        assert kernels.representational_similarity(x, y) == pytest.approx(expected, abs=20 * ROUNDING)
        assert kernels.representational_similarity(x, 3 * x + 7) == pytest.approx(1, abs=20 * ROUNDING)
        assert np.isnan(kernels.representational_similarity(x, np.ones_like(x)))

    def test_diagonal_and_lower_triangle_do_not_count(self):
        x, y = symmetric(2, 13), symmetric(3, 13)
        expected = kernels.representational_similarity(x, y)
        assert kernels.representational_similarity(np.triu(x, 1), y + 9 * np.eye(13, dtype=np.float32)) == expected

    def test_copies_of_an_item(self):
        """As the matrices of a resample, of which the pairs of two copies are left out."""
        x, y = symmetric(4, 11), symmetric(5, 11)
        taken = np.random.default_rng(6).integers(0, 11, 11)
        pairs = [(a, b) for a, b in itertools.combinations(taken, 2) if a != b]
        first, second = ([each[a, b] for a, b in pairs] for each in (x, y))
        weights = np.bincount(taken, minlength=11).astype(np.float32)
        found = kernels.representational_similarity(x, y, weights)
        # Second moments are differences of sums of magnitudes at most 1.
        assert found == pytest.approx(np.corrcoef(first, second)[0, 1], abs=55 * ROUNDING)

    def test_fisher_z(self):
        r = np.linspace(-0.999, 0.999, 41, dtype=np.float32)
        np.testing.assert_allclose(kernels.fisher_z(r), np.arctanh(r.astype(np.float64)), rtol=8 * ROUNDING)
        ends = kernels.fisher_z(np.array([-1.0000001, -1, 1, 1.0000001], np.float32))
        largest = np.arctanh(1 - 2.0**-24)
        np.testing.assert_allclose(ends, largest * np.array([-1, -1, 1, 1]), rtol=8 * ROUNDING)
        assert largest == pytest.approx(8.66, abs=5e-3)


# --- permutations and resamples ---


def difference_of_means(labels, values):
    n = labels.sum()
    return labels @ values / n - (1 - labels) @ values / (labels.size - n)


class TestPermutationNull:
    labels = (np.arange(23) < 9).astype(np.float32)

    def test_each_value_is_the_statistic_of_a_permutation(self):
        """Permutations show themselves as such when the statistic returns them."""
        names = np.arange(11)
        null = kernels.permutation_null(names, (), jax.random.key(3), statistic=lambda labels, _: labels)
        assert null.shape == (1000, 11)
        np.testing.assert_array_equal(np.sort(null, axis=1), np.tile(names, (1000, 1)))
        # Every label is as often at every place: 91 ± 9 times, by a binomial distribution.
        table = np.stack([np.bincount(column, minlength=11) for column in np.asarray(null).T])
        assert np.abs(table - 1000 / 11).max() < 5 * math.sqrt(1000 / 11)

    def test_values_are_those_of_a_loop(self):
        """Takes a tree of arrays as data, however many permutations are in memory."""
        data = dict(zip("xy", samples(0, 23, (23, 3)), strict=True))

        def labels_and_means(labels, data):
            of_x, of_y = (difference_of_means(labels, data[name]) for name in "xy")
            return jnp.concatenate([labels, of_x[None], of_y])

        how = {"statistic": labels_and_means, "permutations": 19}
        for together in (19, 7, 1):
            null = np.asarray(kernels.permutation_null(self.labels, data, jax.random.key(1), **how, together=together))
            assert null.shape == (19, 27)
            if together == 19:
                first = null
            np.testing.assert_array_equal(null[:, :23], first[:, :23])
            for labels, values in zip(null[:, :23].astype(bool), null[:, 23:], strict=True):
                x = np.column_stack([data["x"], data["y"]])
                expected = x[labels].mean(axis=0, dtype=np.float64) - x[~labels].mean(axis=0, dtype=np.float64)
                np.testing.assert_allclose(values, expected, atol=23 * ROUNDING)

    def null(self, x, seed=0):
        key = jax.random.key(seed)
        return kernels.permutation_null(self.labels, x, key, statistic=difference_of_means, permutations=17)

    def test_vmapped_over_layers(self):
        (x,) = samples(0, (5, 23))
        alone = np.stack([self.null(layer) for layer in x])
        np.testing.assert_allclose(jax.vmap(self.null)(x), alone, atol=23 * ROUNDING)

    def test_keys(self):
        (x,) = samples(0, 23)
        one, same, other = (self.null(x, seed) for seed in (0, 0, 1))
        np.testing.assert_array_equal(one, same)
        assert (np.asarray(one) != np.asarray(other)).any()

    def test_one_program_for_all_labels_and_values(self, monkeypatch):
        traced = []

        def counted(labels, values):
            traced.append(1)
            return difference_of_means(labels, values)

        for seed in range(3):
            (x,) = samples(seed, 23)
            kernels.permutation_null(self.labels, x, jax.random.key(seed), statistic=counted, permutations=17)
        assert len(traced) == 1


class TestP:
    def test_definition(self):
        null = np.array([[-3.0], [-1], [0], [2], [5]])
        for observed, two, one in ((2.0, 4, 3), (-2.0, 4, 5), (6.0, 1, 1), (0.0, 6, 4), (5.0, 2, 2)):
            observed = np.array([observed])
            assert kernels.permutation_p(null, observed).tolist() == pytest.approx([two / 6])
            assert kernels.permutation_p(null, observed, two_sided=False).tolist() == pytest.approx([one / 6])

    def test_it_is_never_zero_and_of_nothing_nan(self):
        null = np.zeros((999, 2), np.float32)
        p = kernels.permutation_p(null, np.array([1e30, np.nan], np.float32))
        assert p[0] == pytest.approx(1e-3)
        assert np.isnan(p[1])

    def test_values_that_differ_by_rounding_are_equal(self):
        observed = np.array(0.3, np.float32)
        null = np.array([np.nextafter(observed, np.float32(0)), observed, 0.29], np.float32)
        assert kernels.permutation_p(null, observed) == 0.75


SEEDS, PERMUTATIONS = 400, 99
# As many more with an effect, in the same program.
EFFECTS = np.arange(SEEDS + 100) >= SEEDS


def assert_uniform(p):
    """p is k / 100 with equal probability: by Kolmogorov and Smirnov's test with the steps' width added."""
    from scipy import stats

    assert set(np.rint(p * (PERMUTATIONS + 1)).astype(int)) <= set(range(1, PERMUTATIONS + 2))
    jittered = p - np.random.default_rng(0).uniform(0, 1 / (PERMUTATIONS + 1), p.size)
    assert stats.kstest(jittered, "uniform").pvalue > 0.01


GROUPS = (np.arange(31) < 14).astype(np.float32)


def p_of_difference(seed, effect):
    """p of the difference of two groups' means."""
    data, null = jax.random.split(jax.random.key(seed))
    values = jax.random.exponential(data, (31,)) + effect * GROUPS
    values_of_null = kernels.permutation_null(
        GROUPS, values, null, statistic=difference_of_means, permutations=PERMUTATIONS
    )
    return kernels.permutation_p(values_of_null, difference_of_means(GROUPS, values))


def test_p_is_uniform_without_an_effect_and_small_with_one():
    """The effect is of 1.5 standard deviations, with 31 values: the power of the t-test is 0.98."""
    p = np.asarray(jax.jit(jax.vmap(p_of_difference))(np.arange(len(EFFECTS)), np.float32(1.5) * EFFECTS))
    assert_uniform(p[~EFFECTS])
    assert (p[EFFECTS] < 0.05).mean() > 0.9
    assert p.min() == pytest.approx(1 / (PERMUTATIONS + 1))


class TestBootstrap:
    def test_ends_are_the_percentiles_of_the_resampled_means(self):
        """With weights that the statistic returns, the resamples can be looped over."""
        (x,) = samples(0, (13, 3))
        key = jax.random.key(2)

        @jax.jit
        def all_three(key):
            draws = jax.vmap(lambda key: jax.random.randint(key, (13,), 0, 13))(jax.random.split(key, 501))
            wide = kernels.bootstrap_interval(x, key, n_unit=13, samples=501)
            return draws, wide, kernels.bootstrap_interval(x, key, n_unit=13, samples=501, level=0.5, together=100)

        draws, wide, narrow = all_three(key)
        weights = np.stack([np.bincount(each, minlength=13) for each in np.asarray(draws)])
        means = weights @ x.astype(np.float64) / 13
        np.testing.assert_allclose(wide, np.percentile(means, [2.5, 97.5], axis=0), atol=13 * ROUNDING)
        np.testing.assert_allclose(narrow, np.percentile(means, [25, 75], axis=0), atol=13 * ROUNDING)

    def test_as_numpy_has_it(self):
        (x,) = samples(1, 41)
        low, high = kernels.bootstrap_interval(x, jax.random.key(0), n_unit=41, samples=9999)
        resamples = np.random.default_rng(0).integers(0, 41, (9999, 41))
        theirs = np.percentile(x.astype(np.float64)[resamples].mean(axis=1), [2.5, 97.5])
        # Ends vary from key to key by √(0.025 · 0.975 / 9999) / density of the normal distribution at 1.96, 2.7 %.
        deviation = x.std() / math.sqrt(41)
        np.testing.assert_allclose([low, high], theirs, atol=6 * 0.027 * deviation)

    def test_most_intervals_hold_the_true_mean(self):
        """Counts as many as Student's t gives for 1.96 standard deviations of 17 values, which divide by 17."""
        from scipy import stats

        x = np.random.default_rng(0).normal(size=(500, 17)).astype(np.float32)

        @jax.jit
        def of_all(x, key):
            one = lambda x, key: kernels.bootstrap_interval(x, key, n_unit=17, samples=300)  # noqa: E731
            return jax.vmap(one)(x, jax.random.split(key, 500))

        low, high = map(np.asarray, of_all(x, jax.random.key(0)))
        expected = 2 * stats.t.cdf(1.96 * math.sqrt(16 / 17), 16) - 1  # 0.925
        # Percentiles of 300 resamples lie 0.003 of them further inside.
        error = 4 * math.sqrt(expected * (1 - expected) / 500)
        assert ((low < 0) & (high > 0)).mean() == pytest.approx(expected, abs=error + 0.01)

    def test_undefined_resamples_are_left_out(self):
        def over_the_first(weights, data):
            return jnp.where(weights[0] > 0, data.sum(), jnp.nan)

        ends = kernels.bootstrap_interval(np.ones(3, np.float32), jax.random.key(0), n_unit=3, statistic=over_the_first)
        assert ends == (3, 3)

    def test_of_a_correlation_of_matrices(self):
        """The interval of unrelated matrices holds 0, of related ones it does not."""
        x, noise = symmetric(0, 31), symmetric(1, 31)

        def statistic(weights, data):
            return kernels.representational_similarity(*data, weights)

        upper, key = np.triu_indices(31, 1), jax.random.key(0)
        for y, related in ((noise, False), (x + noise, True)):
            ends = kernels.bootstrap_interval((x, y), key, n_unit=31, statistic=statistic, samples=499)
            low, high = map(float, ends)
            assert (low > 0) == related
            assert low < np.corrcoef(x[upper], y[upper])[0, 1] < high


def paired_difference(exchanged, data):
    return (jnp.where(exchanged, -data, data)).mean()


class TestExchangeNull:
    def test_values_are_those_of_a_loop(self):
        (x,) = samples(0, 13)
        both = lambda e, x: jnp.append(e.astype(x.dtype), paired_difference(e, x))  # noqa: E731
        null = kernels.exchange_null(x, jax.random.key(1), n_unit=13, permutations=1009, together=97, statistic=both)
        exchanged, values = np.split(np.asarray(null), [13], axis=1)
        assert set(exchanged.ravel()) == {0, 1}
        expected = [np.where(each == 1, -x, x).mean(dtype=np.float64) for each in exchanged]
        np.testing.assert_allclose(values[:, 0], expected, atol=13 * ROUNDING)
        assert exchanged.mean() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(13 * 1009))

    def test_p_is_uniform_without_an_effect_and_small_with_one(self):
        """2 is 1.4 standard deviations of each difference, and six standard errors of their mean."""

        def p(seed, shift):
            data, null = jax.random.split(jax.random.key(seed))
            x = jax.random.laplace(data, (17,)) + shift
            values = kernels.exchange_null(x, null, n_unit=17, statistic=paired_difference, permutations=PERMUTATIONS)
            return kernels.permutation_p(values, x.mean())

        found = np.asarray(jax.jit(jax.vmap(p))(np.arange(len(EFFECTS)), np.float32(2) * EFFECTS))
        assert_uniform(found[~EFFECTS])
        assert (found[EFFECTS] < 0.05).mean() > 0.95
