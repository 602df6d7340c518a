"""Each kernel against plain NumPy written from its definition, with and without jit, and by invariants."""

import ast
import inspect
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROUNDING
from helpers.oracles import cosine

from jaxqkv import kernels
from jaxqkv.errors import JaxqkvError, KernelError

ROWS, HEADS, HEAD_DIM = 23, 3, 7
COLUMNS = HEADS * HEAD_DIM


@pytest.fixture
def matrix():
    return np.random.default_rng(0).normal(0.1, 0.3, (ROWS, COLUMNS)).astype(np.float32)


def within_and_across(similarity):
    """The two samples, by loops over pairs of heads."""
    within, across = [], []
    for i in range(HEADS):
        for j in range(i, HEADS):
            block = similarity[i * HEAD_DIM : (i + 1) * HEAD_DIM, j * HEAD_DIM : (j + 1) * HEAD_DIM]
            if i == j:
                within += [block[a, b] for a in range(HEAD_DIM) for b in range(a + 1, HEAD_DIM)]
            else:
                across += block.ravel().tolist()
    return np.array(within), np.array(across)


class TestMoments:
    @pytest.mark.parametrize("ddof", [0, 1])
    def test_definition(self, matrix, ddof):
        mean, std = kernels.moments(matrix, ddof=ddof)
        # A sum rounds by its terms, which are larger than the mean.
        assert mean == pytest.approx(matrix.mean(dtype=np.float64), abs=10 * ROUNDING)
        assert std == pytest.approx(matrix.std(dtype=np.float64, ddof=ddof), rel=1e-6)

    def test_masked(self, matrix):
        where = matrix > 0.2
        mean, std = kernels.moments(matrix, where, ddof=1)
        assert mean == pytest.approx(matrix[where].mean(dtype=np.float64), rel=1e-6)
        assert std == pytest.approx(matrix[where].std(dtype=np.float64, ddof=1), rel=1e-6)

    def test_empty_and_single(self):
        assert kernels.moments(np.ones((2, 3), np.float32), np.zeros((2, 3), bool)) == (0, 0)
        assert kernels.moments(np.full(1, 5.0, np.float32), ddof=1) == (5, 0)

    def test_half_precision_values_are_summed_in_full(self):
        # In bfloat16 a sum of ones stays at 256. XLA converts it on any CPU, float16 only where there is F16C.
        assert kernels.moments(np.ones((300, 300), jnp.bfloat16)) == (1, 0)

    def test_far_from_zero(self):
        values = (1000 + np.random.default_rng(1).normal(size=10_007)).astype(np.float32)
        assert kernels.moments(values)[1] == pytest.approx(values.std(dtype=np.float64), rel=1e-5)


EDGES = [np.linspace(-0.8, 0.8, 81), np.linspace(-0.4, 0.4, 101), np.linspace(0, 1, 91), np.linspace(-15, 15, 201)]


class TestHistograms:
    @pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int64])
    def test_groups_of_any_whole_numbers(self, dtype):
        """The number of a group times that of bins is more than the dtype of the groups has."""
        edges = np.linspace(0, 1, 102)
        group = np.array([0, 3, 1, 2, 3], dtype)
        values = np.array([0.1, 0.3, 0.5, 0.7, 0.9], np.float32)
        density = np.asarray(kernels.density_by_group(values, edges, group, n_group=4))
        expected = [np.histogram(values[group == each], edges, density=True)[0] for each in range(4)]
        np.testing.assert_allclose(density, expected, rtol=1e-6)

    @pytest.mark.parametrize(
        ("edges", "fewer"),
        [
            ((1e6, 1e6 + 0.5, 17), (1e6, 1e6 + 2, 9)),  # values are a sixteenth apart
            ((-3e38, 3e38, 7), (-1e38, 1e38, 7)),
            ((1.1e-38, 2.1e-38, 9), (1.1e-36, 2.1e-36, 9)),
        ],
    )
    def test_bins_that_float32_does_not_tell_apart_are_refused(self, edges, fewer):
        with pytest.raises(KernelError, match=f"float32 cannot tell {edges[2] - 1} bins from"):
            kernels.counts(np.ones(3, np.float32), np.linspace(*edges))
        edges = np.linspace(*fewer)
        values = np.random.default_rng(0).uniform(edges[0], edges[-1], 997).astype(np.float32)
        np.testing.assert_array_equal(kernels.counts(values, edges), np.histogram(values, edges)[0])

    @pytest.mark.parametrize("edges", EDGES, ids=len)
    def test_counts_are_numpys_to_the_last_one(self, edges):
        spread = (edges[-1] - edges[0]) * 0.6
        values = np.random.default_rng(2).normal(edges.mean(), spread, 20_011).astype(np.float32)
        # Values on the edges, and right beside them, are where rounding would show.
        on = edges.astype(np.float32)
        hard = [on, np.nextafter(on, np.float32(-np.inf)), np.nextafter(on, np.float32(np.inf))]
        values = np.concatenate([values, *hard])
        values = values[(values == 0) | (np.abs(values) >= np.finfo(np.float32).tiny)]  # XLA flushes subnormals
        expected = np.histogram(values.astype(np.float64), edges)[0]
        np.testing.assert_array_equal(kernels.counts(values, edges), expected)

    def test_density_integrates_to_one_inside_the_edges(self, matrix):
        edges = np.linspace(-0.2, 0.5, 12)
        density = np.asarray(kernels.density(matrix, edges))
        assert (density * np.diff(edges)).sum() == pytest.approx(1, rel=1e-5)
        np.testing.assert_allclose(density, np.histogram(matrix, edges, density=True)[0], rtol=1e-6)

    def test_masked(self, matrix):
        where = np.arange(COLUMNS) % 3 == 1
        edges = np.linspace(-1, 1, 12)
        expected = np.histogram(matrix[:, where], edges)[0]
        np.testing.assert_array_equal(kernels.counts(matrix, edges, where[None]), expected)

    def test_several_samples_in_one_pass(self, matrix):
        edges = np.linspace(-0.7, 0.6, 12)
        group = np.random.default_rng(6).integers(-1, 4, matrix.shape)  # -1 and 3 are no groups
        densities = np.asarray(kernels.density_by_group(matrix, edges, group, n_group=3))
        for index in range(3):
            expected = np.histogram(matrix[group == index], edges, density=True)[0]
            np.testing.assert_allclose(densities[index], expected, rtol=1e-6)
        by_column = np.asarray(kernels.density_by_group(matrix, edges, np.arange(COLUMNS)[None] % 3, n_group=3))
        np.testing.assert_allclose(by_column[1], np.histogram(matrix[:, 1::3], edges, density=True)[0], rtol=1e-6)

    def test_empty_sample_gives_zeros(self):
        outside = np.full((ROWS, COLUMNS), 9.0, np.float32)
        np.testing.assert_array_equal(kernels.density(outside, np.linspace(0, 1, 12)), np.zeros(11))

    def test_nan_and_infinity_fall_in_no_bin(self):
        values = np.array([np.nan, np.inf, -np.inf, 0.5], np.float32)
        np.testing.assert_array_equal(kernels.counts(values, np.linspace(0, 1, 4)), [0, 1, 0])

    def test_edges_on_the_device(self, matrix):
        edges = jnp.asarray(np.linspace(-0.5, 0.5, 12, dtype=np.float32))
        np.testing.assert_array_equal(kernels.counts(matrix, edges), np.histogram(matrix, np.asarray(edges))[0])

    def test_vmapped_over_layers(self):
        layers = np.random.default_rng(3).normal(size=(5, 11, 13)).astype(np.float32)
        edges = np.linspace(-2, 2, 18)
        mapped = np.asarray(jax.jit(jax.vmap(lambda layer: kernels.counts(layer, edges)))(layers))
        for layer, counted in zip(layers, mapped, strict=True):
            np.testing.assert_array_equal(counted, np.histogram(layer, edges)[0])

    def test_freedman_diaconis(self, matrix):
        sample = matrix.astype(np.float64).ravel()
        quartiles = np.percentile(sample, [25, 75])
        width = 2 * (quartiles[1] - quartiles[0]) / sample.size ** (1 / 3)
        bins = int(np.ceil((sample.max() - sample.min()) / width))
        edges = np.linspace(sample.min(), sample.max(), bins + 1)
        for density in (False, True):
            heights, found = kernels.freedman_diaconis_histogram(sample, density=density)
            np.testing.assert_allclose(found, edges)
            np.testing.assert_allclose(heights, np.histogram(sample, edges, density=density)[0])
        far = np.concatenate([sample, [1e9]])
        heights, found = kernels.freedman_diaconis_histogram(far)
        assert heights.size == 100_000
        assert heights.sum() == far.size
        with pytest.raises(JaxqkvError, match="2 of 3 values are NaN or infinite"):
            kernels.freedman_diaconis_histogram(np.array([1, np.nan, np.inf]))
        heights, found = kernels.freedman_diaconis_histogram(np.zeros(0, np.float32), density=True)
        np.testing.assert_array_equal(heights, [0])
        np.testing.assert_array_equal(found, [0, 1])


class TestSimilarity:
    def test_column_cosine(self, matrix):
        similarity = np.asarray(kernels.column_cosine(matrix))
        limit = 2 * ROWS * ROUNDING  # of the product and of the two norms, all sums over rows
        np.testing.assert_allclose(similarity, cosine(matrix), atol=limit)
        np.testing.assert_allclose(np.diagonal(similarity), 1, atol=limit)
        np.testing.assert_allclose(kernels.column_cosine(-2.5 * matrix), similarity, atol=limit)

    def test_columns_of_any_magnitude(self, matrix):
        """Checks columns whose squares overflow or vanish: powers of two change no bit of the cosines."""
        powers = np.ldexp(np.float32(1), np.resize([0, 100, -100, 60, -70], COLUMNS))
        extreme = (matrix * powers).astype(np.float32)
        np.testing.assert_array_equal(kernels.column_cosine(extreme), kernels.column_cosine(matrix))
        np.testing.assert_array_equal(kernels.column_cosine_moments(extreme), kernels.column_cosine_moments(matrix))

    def test_a_column_of_zeros_resembles_nothing(self, matrix):
        matrix[:, 4] = 0
        similarity = np.asarray(kernels.column_cosine(matrix))
        assert (similarity[4] == 0).all()
        assert np.isfinite(similarity).all()

    @pytest.mark.parametrize(("strips", "ddof"), [(1, 1), (2, 0), (3, 1)])
    def test_moments_without_the_matrix(self, matrix, strips, ddof):
        sample = cosine(matrix)[np.triu_indices(COLUMNS, 1)]
        mean, std = kernels.column_cosine_moments(matrix, ddof=ddof, strips=strips)
        assert mean == pytest.approx(sample.mean(), rel=1e-5)
        assert std == pytest.approx(sample.std(ddof=ddof), rel=1e-5)

    def test_more_strips_than_columns(self, matrix):
        sample = cosine(matrix[:, :5])[np.triu_indices(5, 1)]
        mean, std = kernels.column_cosine_moments(matrix[:, :5], strips=50)
        assert mean == pytest.approx(sample.mean(), rel=1e-5)
        assert std == pytest.approx(sample.std(ddof=1), rel=1e-5)

    def test_moments_of_nearly_parallel_columns(self):
        """All cosines close to 1: the squares are summed about the mean, so nothing cancels."""
        generator = np.random.default_rng(4)
        x = (generator.normal(size=(101, 1)) + 0.05 * generator.normal(size=(101, 37))).astype(np.float32)
        sample = cosine(x)[np.triu_indices(37, 1)]
        mean, std = kernels.column_cosine_moments(x)
        assert mean == pytest.approx(sample.mean(), rel=1e-6)
        assert std == pytest.approx(sample.std(ddof=1), rel=1e-3)

    def test_pair_masks_hold_each_pair_once(self):
        within, across = np.asarray(kernels.head_pair_masks(n_head=HEADS, head_dim=HEAD_DIM))
        assert within.sum() == HEADS * HEAD_DIM * (HEAD_DIM - 1) / 2
        assert across.sum() == HEADS * (HEADS - 1) / 2 * HEAD_DIM**2
        np.testing.assert_array_equal(within | across, np.triu(np.ones((COLUMNS, COLUMNS), bool), 1))
        assert not (within & across).any()
        similarity = np.random.default_rng(5).normal(size=(COLUMNS, COLUMNS))
        for mask, sample in zip((within, across), within_and_across(similarity), strict=True):
            np.testing.assert_array_equal(np.sort(similarity[mask]), np.sort(sample))

    def test_head_pair_densities(self, matrix):
        edges = np.linspace(-0.6, 0.6, 18)
        density, mean, std = map(np.asarray, kernels.head_pair_densities(matrix, edges, n_head=HEADS))
        for index, sample in enumerate(within_and_across(cosine(matrix))):
            np.testing.assert_allclose(density[index], np.histogram(sample, edges, density=True)[0], rtol=1e-5)
            assert mean[index] == pytest.approx(sample.mean(), rel=1e-5)
            assert std[index] == pytest.approx(sample.std(), rel=1e-5)


class TestPearson:
    def test_definition(self, matrix):
        x, y = matrix[:, 0], matrix[:, 1] + 0.5 * matrix[:, 0]
        assert kernels.pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
        wide = np.corrcoef(matrix.ravel(), matrix[::-1].ravel())[0, 1]
        assert kernels.pearson(matrix, matrix[::-1]) == pytest.approx(wide, abs=1e-6)

    def test_pairs_that_do_not_count_may_hold_anything(self, matrix):
        x, y = matrix[:, 0].copy(), matrix[:, 1].copy()
        where = np.arange(ROWS) % 3 > 0
        x[~where], y[~where] = np.nan, np.inf
        assert kernels.pearson(x, y, where) == pytest.approx(np.corrcoef(x[where], y[where])[0, 1], abs=1e-6)

    def test_shift_and_scale_change_nothing_but_the_sign(self, matrix):
        x, y = matrix[:, 0], matrix[:, 1]
        r = float(kernels.pearson(x, y))
        assert kernels.pearson(1e-20 * x, 1e20 * y) == pytest.approx(r, abs=1e-6)
        assert kernels.pearson(-x, y + 7) == pytest.approx(-r, abs=1e-5)
        assert kernels.pearson(x, x) == pytest.approx(1, abs=1e-6)

    @pytest.mark.parametrize("constant", [0.0, 0.1, -1e6])
    def test_undefined_for_a_constant(self, matrix, constant):
        x = np.full(ROWS, constant, np.float32)
        assert np.isnan(kernels.pearson(x, matrix[:, 0]))
        assert np.isnan(kernels.pearson(matrix[:, 0], x))

    def test_undefined_for_fewer_than_two_pairs(self, matrix):
        for count in (0, 1):
            assert np.isnan(kernels.pearson(matrix[:, 0], matrix[:, 1], np.arange(ROWS) < count))


class TestBins:
    """Against loops, and against SciPy where it does not raise."""

    @pytest.fixture
    def x(self):
        return np.random.default_rng(3).normal(size=(31, 29))

    def test_percentile_edges(self, x):
        np.testing.assert_array_equal(kernels.percentile_edges(x, n_bin=7), np.percentile(x, np.linspace(0, 100, 8)))
        holed = np.where(x > 1, np.nan, x)
        np.testing.assert_array_equal(
            kernels.percentile_edges(holed, n_bin=7), np.percentile(x[x <= 1], np.linspace(0, 100, 8))
        )
        assert np.isnan(kernels.percentile_edges(np.full(5, np.nan), n_bin=7)).tolist() == [True] * 8

    def test_bins_hold_their_left_edge_and_the_last_one_both(self):
        edges = np.array([0.0, 1, 4, 9])
        values = np.array([-0.1, 0, 0.5, 1, 3.9, 4, 9, 9.1, np.nan])
        assert kernels.bin_index(values, edges).tolist() == [-1, 0, 0, 1, 1, 2, 2, -1, -1]
        assert kernels.bin_index(values, np.full(4, np.nan)).tolist() == [-1] * 9

    def test_repeated_edges_make_empty_bins_and_no_exception(self):
        values = np.array([1.0, 1, 1, 1, 2, 3, 3, 3])
        edges = np.array([1.0, 1, 1, 2, 3, 3])
        index = kernels.bin_index(values, edges)
        assert index.tolist() == [2, 2, 2, 2, 3, 4, 4, 4]
        count, mean, std = kernels.binned_moments(np.arange(8, dtype=np.float32), index, n_bin=5)
        assert count.tolist() == [0, 0, 4, 1, 3]
        np.testing.assert_array_equal(mean, [np.nan, np.nan, 1.5, 4, 6])
        np.testing.assert_allclose(std, [np.nan, np.nan, np.sqrt(1.25), 0, np.sqrt(2 / 3)], rtol=1e-6)

    @pytest.mark.parametrize("size", [1, 5, 899])  # of fewer values than parts, and of parts that are not full
    def test_moments_by_loops(self, size):
        generator = np.random.default_rng(size)
        values = generator.normal(100, 3, size).astype(np.float32)
        index = generator.integers(-1, 8, size)  # −1 and 7 are outside
        count, mean, std = kernels.binned_moments(values, index, n_bin=7)
        for b in range(7):
            chosen = values[index == b].astype(np.float64)
            assert count[b] == chosen.size
            if chosen.size:
                assert mean[b] == pytest.approx(chosen.mean(), rel=1e-6)
                assert std[b] == pytest.approx(chosen.std(), rel=1e-4, abs=1e-5)
            else:
                assert np.isnan(mean[b])
                assert np.isnan(std[b])

    def test_moments_as_scipy_has_them(self, x):
        from scipy.stats import binned_statistic

        y = (x + np.random.default_rng(4).normal(size=x.shape)).ravel().astype(np.float32)
        x = x.ravel()
        edges = kernels.percentile_edges(x, n_bin=11)
        count, mean, std = kernels.binned_moments(y, kernels.bin_index(x, edges), n_bin=11)
        for name, ours in (("count", count), ("mean", mean), ("std", std)):
            np.testing.assert_allclose(ours, binned_statistic(x, y, name, bins=edges)[0], rtol=2e-6, atol=1e-6)

    def test_large_samples_lose_no_accuracy(self):
        generator = np.random.default_rng(5)
        values = (50 + generator.normal(size=262_144)).astype(np.float32)
        index = generator.integers(0, 3, values.size)
        _, mean, std = kernels.binned_moments(values, index, n_bin=3)
        for b in range(3):
            chosen = values[index == b].astype(np.float64)
            assert mean[b] == pytest.approx(chosen.mean(), rel=1e-6)
            assert std[b] == pytest.approx(chosen.std(), rel=1e-5)


class TestWeights:
    def test_shape_of_a_distribution(self, matrix):
        from scipy import stats

        values = np.exp(3 * matrix)  # skewed
        shape = kernels.distribution_shape(values)
        assert shape.mean == pytest.approx(values.mean(dtype=np.float64), rel=1e-6)
        assert shape.std == pytest.approx(values.std(dtype=np.float64), rel=1e-6)
        assert shape.skewness == pytest.approx(stats.skew(values.ravel()), rel=1e-5)
        assert shape.kurtosis == pytest.approx(stats.kurtosis(values.ravel()), rel=1e-5)
        shifted = kernels.distribution_shape(-1e15 * values)
        assert shifted.skewness == pytest.approx(-float(shape.skewness), rel=1e-4)

    @pytest.mark.parametrize("size", [1, 7, 10_007])
    def test_distance_from_normal(self, size):
        """Takes the steps of the empirical distribution from below and from above."""
        from scipy import special

        values = np.random.default_rng(size).standard_t(4, size).astype(np.float32)
        limit = 0.5 / kernels.weights.KS_CELLS + 8 * ROUNDING  # half a cell; of Φ, of the share and of their difference
        steps = np.arange(size + 1) / size
        for mean, std in ((0.0, 1.0), (0.3, 2.5), (50.0, 0.1)):
            normal = special.ndtr((np.sort(values.astype(np.float64)) - mean) / std)
            expected = max((steps[1:] - normal).max(), (normal - steps[:-1]).max())
            assert kernels.ks_normal(values, np.float32(mean), np.float32(std)) == pytest.approx(expected, abs=limit)
        assert kernels.ks_normal(values, np.float32(0), np.float32(0)) == 1
        values[-1] = np.nan
        assert np.isnan(kernels.ks_normal(values, np.float32(0), np.float32(1)))
        assert np.isnan(kernels.ks_normal(values[:0], np.float32(0), np.float32(1)))

    def test_neighbours(self, matrix):
        expected = [np.corrcoef(a, b)[0, 1] for a, b in itertools.pairwise(matrix)]
        np.testing.assert_allclose(kernels.neighbour_correlations(matrix), expected, atol=1e-6)

    @pytest.mark.parametrize("transposed", [False, True], ids=["high", "wide"])
    def test_principal_components(self, matrix, transposed):
        """By the singular values of the standardised matrix; in tests of the benchmark, by scikit-learn."""
        x = matrix.T if transposed else matrix
        x = x * np.linspace(1, 9, x.shape[1], dtype=np.float32)[None] + 5
        z = x.astype(np.float64)
        z = (z - z.mean(axis=0)) / z.std(axis=0)
        left, sigma, right = np.linalg.svd(z, full_matrices=False)
        signs = np.sign(np.take_along_axis(right, np.abs(right).argmax(axis=1)[:, None], axis=1))[:, 0]
        scores = left * sigma * signs
        explained, ours = kernels.principal_components(x)
        np.testing.assert_allclose(explained, sigma**2 / (sigma**2).sum(), atol=1e-6)
        # Components turn by the Gram matrix's rounding, at most 21 · ROUNDING · λ₁, over the gap λ₂ − λ₃ = λ₁ / 14.
        np.testing.assert_allclose(ours, scores[:, :2], atol=21 * ROUNDING * 14 * np.abs(scores).max())
        assert explained.sum() == pytest.approx(1, abs=1e-6)

    @pytest.mark.parametrize("constant", [0.0, 0.1, -0.3, 1.7, 1e20])
    @pytest.mark.parametrize("shape", [(128, 384), (7,)])
    def test_a_constant_has_no_spread(self, constant, shape):
        values = np.full(shape, constant, np.float32)
        result = kernels.distribution_shape(values)
        # In whatever order they are added, a sum of n numbers of one sign errs by at most n roundings.
        assert result.mean == pytest.approx(constant, rel=values.size * ROUNDING)
        assert result.std == 0
        assert np.isnan([result.skewness, result.kurtosis]).all()
        assert kernels.ks_normal(values, result.mean, result.std) == 1

    @pytest.mark.parametrize("constant", [0.1, -0.3, 1.7])
    @pytest.mark.parametrize("shape", [(ROWS, COLUMNS), (COLUMNS, ROWS)], ids=["high", "wide"])
    def test_a_constant_column_adds_nothing_to_principal_components(self, constant, shape):
        matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        matrix[:, -1] = constant
        explained, scores = map(np.asarray, kernels.principal_components(matrix))
        assert np.isfinite(scores).all()
        others = matrix[:, :-1].astype(np.float64)
        sigma = np.linalg.svd((others - others.mean(axis=0)) / others.std(axis=0), compute_uv=False)
        expected = sigma**2 / (sigma**2).sum()
        np.testing.assert_allclose(explained[: len(expected)], expected[: len(explained)], atol=1e-6)

    def test_spectrum(self, matrix):
        sigma = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
        p = sigma / sigma.sum()
        rank, largest = kernels.spectrum(matrix)
        assert rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
        assert largest == pytest.approx(sigma[0], rel=1e-6)

    def test_effective_rank_of_known_matrices(self):
        identity = np.eye(13, dtype=np.float32)
        assert kernels.spectrum(7 * identity)[0] == pytest.approx(13, rel=1e-6)
        assert kernels.spectrum(np.outer(np.arange(1, 4), np.ones(5)).astype(np.float32))[0] == pytest.approx(
            1, rel=1e-4
        )
        assert kernels.spectrum(np.zeros((3, 5), np.float32)) == (0, 0)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_no_rank_of_what_is_not_finite(self, value):
        matrix = np.eye(3, 5, dtype=np.float32)
        matrix[1, 2] = value
        assert np.isnan(kernels.spectrum(matrix)).all()


@pytest.mark.parametrize("edges", [[1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0, 5.0], [0.0, np.nan]])
def test_edges_that_are_none(edges):
    for given in (np.array(edges), jax.numpy.asarray(edges)):
        with pytest.raises(KernelError, match="two or more, equally spaced and increasing"):
            kernels.density(np.zeros(3, np.float32), given)


def test_edges_as_rounded_as_float32_is():
    values = np.random.default_rng(5).normal(1000.5, 0.2, 997).astype(np.float32)
    edges = np.linspace(1000, 1001, 201, dtype=np.float32)
    expected = np.histogram(values, edges)[0]
    for given in (edges, jax.numpy.asarray(edges)):
        np.testing.assert_array_equal(kernels.counts(values, given), expected)


@pytest.mark.parametrize("heads", [0, 4])
def test_columns_that_are_no_heads(heads):
    with pytest.raises(KernelError, match=rf"columns are {heads} heads side by side, got \[7, 15\]"):
        kernels.head_pair_densities(np.ones((7, 15), np.float32), np.linspace(-1, 1, 11), n_head=heads)


def test_kernels_of_weights_vmap_over_layers():
    layers = np.random.default_rng(6).normal(size=(3, ROWS, COLUMNS)).astype(np.float32)
    zero, one = np.float32(0), np.float32(1)

    def all_of(x):
        of_weights = (kernels.distribution_shape, kernels.neighbour_correlations, kernels.principal_components)
        return [kernel(x) for kernel in (*of_weights, kernels.spectrum)] + [kernels.ks_normal(x, zero, one)]

    together = jax.tree.leaves(jax.jit(jax.vmap(all_of))(layers))
    alone = zip(*(jax.tree.leaves(all_of(layer)) for layer in layers), strict=True)
    for batch, each in zip(together, alone, strict=True):
        np.testing.assert_allclose(batch, np.stack(each), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "name", [n for n in kernels.__all__ if callable(f := getattr(kernels, n)) and not inspect.isclass(f)]
)
def test_calling_convention(name):
    """Arrays come first and by position; settings that are no arrays follow, by keyword alone."""
    for parameter in inspect.signature(getattr(kernels, name)).parameters.values():
        is_array = any(word in str(parameter.annotation) for word in ("ndarray", "ArrayLike", "jaxtyping"))
        kind = parameter.POSITIONAL_OR_KEYWORD if is_array else parameter.KEYWORD_ONLY
        assert parameter.kind is kind, parameter.name


def test_kernels_raise_one_kind_of_error():
    raised = set()
    for path in Path(kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise):
                raised.add(ast.unparse(node.exc.func))
    assert raised == {"KernelError"}
