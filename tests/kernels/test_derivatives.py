"""Derivatives of kernels, in compiled programs: also beside columns, rows and heads that are 0 or constant."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxqkv import kernels

GENERATOR = np.random.default_rng(0)
MATRIX, OTHER = GENERATOR.normal(size=(2, 11, 15))
LEFT, RIGHT, OTHER_LEFT, OTHER_RIGHT = GENERATOR.normal(size=(4, 3, 13, 5))
PATTERN, V, OUTPUT = (GENERATOR.random(shape) for shape in ((3, 7, 7), (3, 7, 5), (3, 5, 11)))
EDGES = np.linspace(-1, 1, 8)
BINS = np.arange(11, dtype=np.int32) % 5 - 1
UPPER = np.triu_indices(11, 1)

# --- definitions in float64; where something has no direction, it is 0 or left out ---


def unit(x, axes):
    norm = np.sqrt((x**2).sum(axis=axes, keepdims=True))
    return x / np.where(norm > 0, norm, np.inf)


def cosines(x):
    return unit(x, 0).T @ unit(x, 0)


def of_pairs(x):
    """Returns mean and standard deviation of the cosines of columns within and across 3 heads."""
    head = np.arange(x.shape[1]) // 5
    kinds = [np.triu(head[:, None] == head, 1), head[:, None] < head]
    return np.array([[f(cosines(x)[kind]) for kind in kinds] for f in (np.mean, np.std)])


def neighbours(x):
    x = unit(x - x.mean(axis=1, keepdims=True), 1)
    return (x[:-1] * x[1:]).sum(axis=1)


def regression(x, y):
    return np.linalg.lstsq(np.c_[np.ones(len(x)), x[:, :3]], y[:, 0], rcond=None)[0]


def binned(x):
    parts = [x[:, 0][index == BINS] for index in range(4)]
    return np.array([[f(part) for part in parts] for f in (np.mean, np.std)])


def composed(left, right, other_left, other_right):
    one, other = (a @ b.swapaxes(1, 2) for a, b in ((left, right), (other_left, other_right)))
    return np.linalg.norm(unit(one, (1, 2))[:, None] @ unit(other, (1, 2))[None], axis=(2, 3))


def alike(left, right, other_left, other_right):
    one, other = (unit(a @ b.swapaxes(1, 2), (1, 2)) for a, b in ((left, right), (other_left, other_right)))
    return np.einsum("hef,gef->hg", one, other)


def overlap(weights, other):
    one, two = (np.stack([np.linalg.qr(x)[0] if x.any() else x for x in each]) for each in (weights, other))
    return (np.einsum("hed,gef->hgdf", one, two) ** 2).sum(axis=(2, 3)) / 5


def moved(pattern, v, output):
    return np.linalg.norm(pattern[..., None] * (v @ output)[:, None], axis=-1)


# Name → kernel, its definition, and the arrays by which derivatives are taken.
KERNELS = {
    "distribution_shape": (
        kernels.distribution_shape,
        lambda x: np.array([x.mean(), x.std(), stats.skew(x, axis=None), stats.kurtosis(x, axis=None)]),
        [MATRIX],
    ),
    "moments": (kernels.moments, lambda x: np.array([x.mean(), x.std()]), [MATRIX]),
    "binned_moments": (lambda x: kernels.binned_moments(x[:, 0], BINS, n_bin=4)[1:], binned, [MATRIX]),
    "pearson": (kernels.pearson, lambda x, y: np.corrcoef(x.ravel(), y.ravel())[0, 1], [MATRIX, OTHER]),
    "representational_similarity": (
        lambda x, y: kernels.representational_similarity(x @ x.T, y @ y.T),
        lambda x, y: np.corrcoef((x @ x.T)[UPPER], (y @ y.T)[UPPER])[0, 1],
        [MATRIX, OTHER],
    ),
    "student_t": (
        lambda x, y: kernels.student_t(x, y)[0],
        lambda x, y: stats.ttest_ind(x, y, axis=None)[0],
        [MATRIX, OTHER],
    ),
    "welch_t": (
        lambda x, y: kernels.welch_t(x, y)[0],
        lambda x, y: stats.ttest_ind(x, y, axis=None, equal_var=False)[0],
        [MATRIX, OTHER],
    ),
    "linear_regression": (lambda x, y: kernels.linear_regression(x[:, :3], y[:, 0]), regression, [MATRIX, OTHER]),
    "neighbour_correlations": (kernels.neighbour_correlations, neighbours, [MATRIX]),
    "column_cosine": (kernels.column_cosine, cosines, [MATRIX]),
    "column_cosine_moments": (
        kernels.column_cosine_moments,
        lambda x: np.array([f(cosines(x)[np.triu_indices(15, 1)]) for f in (np.mean, lambda c: c.std(ddof=1))]),
        [MATRIX],
    ),
    "column_correlation": (kernels.column_correlation, lambda x: cosines(x - x.mean(axis=0)), [MATRIX]),
    "head_pair_densities": (lambda x: kernels.head_pair_densities(x, EDGES, n_head=3)[1:], of_pairs, [MATRIX]),
    "composition": (kernels.composition, composed, [LEFT, RIGHT, OTHER_LEFT, OTHER_RIGHT]),
    "head_similarity": (kernels.head_similarity, alike, [LEFT, RIGHT, OTHER_LEFT, OTHER_RIGHT]),
    "subspace_overlap": (kernels.subspace_overlap, overlap, [LEFT, OTHER_LEFT]),
    "weighted_attention": (kernels.weighted_attention, moved, [PATTERN, V, OUTPUT]),
}
# Name, and what is 0 or constant: the number of the array, the place in it, and the value.
SPOILT = [
    ("moments", 0, np.s_[:], 0.75),
    ("distribution_shape", 0, np.s_[:], 0),
    ("binned_moments", 0, np.s_[BINS == 2], 0.75),
    ("pearson", 1, np.s_[:], 0.75),
    ("representational_similarity", 1, np.s_[:], 0),
    ("student_t", 1, np.s_[:], 0.75),
    ("welch_t", 1, np.s_[:], 0.75),
    ("neighbour_correlations", 0, np.s_[4], 0.75),
    ("column_cosine", 0, np.s_[:, 4], 0),
    ("column_cosine_moments", 0, np.s_[:, 4], 0),
    ("column_correlation", 0, np.s_[:, 4], 0.75),
    ("head_pair_densities", 0, np.s_[:, 4], 0),
    ("composition", 0, np.s_[1], 0),
    ("composition", 3, np.s_[1], 0),
    ("head_similarity", 0, np.s_[1], 0),
    ("head_similarity", 3, np.s_[1], 0),
    ("subspace_overlap", 1, np.s_[1], 0),
    ("weighted_attention", 1, np.s_[1, 4], 0),
    ("weighted_attention", 2, np.s_[1], 0),
]
CASES = [(name, None, None, None) for name in KERNELS] + SPOILT
STEP = 1e-5


@functools.cache
def slopes_of(kernel):
    """Returns a program of the derivatives of all results, weighted and added, by each array."""

    def weighted(arrays, weights):
        values = jnp.concatenate([x.ravel() for x in jax.tree.leaves(kernel(*arrays))])
        return jnp.where(jnp.isnan(values), 0, values) @ weights

    return jax.jit(lambda weights, *arrays: jax.grad(weighted)(arrays, weights))


@pytest.mark.parametrize(("name", "number", "place", "value"), CASES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the definitions, where they are 0/0
def test_derivatives(name, number, place, value):
    """Are finite, and agree with differences of the definition in float64; NaN results are left out.

    Compiled, because only a compiled program may compute a maximum twice and round it differently.
    """
    kernel, definition, given = KERNELS[name]
    generator = np.random.default_rng(3)
    given, steps = [x.copy() for x in given], [generator.normal(size=x.shape) for x in given]
    if number is not None:
        given[number][place], steps[number][place] = value, 0
    up, down = (
        np.nan_to_num(definition(*(x + step * h for x, step in zip(given, steps, strict=True)))) for h in (STEP, -STEP)
    )
    expected = (up - down) / (2 * STEP)

    weights = generator.normal(size=expected.size)
    slopes = slopes_of(kernel)(jnp.float32(weights), *map(jnp.float32, given))
    assert all(np.isfinite(each).all() for each in slopes)
    actual = sum((np.float64(slope) * step).sum() for slope, step in zip(slopes, steps, strict=True))
    scale = sum((np.float64(slope) ** 2 * step**2).sum() for slope, step in zip(slopes, steps, strict=True)) ** 0.5
    np.testing.assert_allclose(actual, expected.ravel() @ weights, rtol=0, atol=1e-4 * scale + 1e-6)


@pytest.mark.parametrize("kernel", [kernels.moments, lambda x: kernels.distribution_shape(x)[:2]])
def test_derivatives_of_a_constant_are_those_of_its_mean(kernel):
    x = np.full((11, 15), 0.75, np.float32)
    slope = jax.jit(jax.grad(lambda x: jnp.vdot(jnp.stack(kernel(x)), jnp.array([3.0, 5.0]))))(x)
    np.testing.assert_allclose(slope, 3 / x.size, rtol=1e-6)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("kernel", [kernels.composition, kernels.head_similarity])
def test_a_head_with_nan_leaves_the_derivatives_by_other_heads_finite(kernel, number):
    def slopes(value):
        given = [np.float32(each) for each in (LEFT, RIGHT, OTHER_LEFT, OTHER_RIGHT)]
        given[number][1, 3, 2] = value
        return slopes_of(kernel)(weights, *given)

    weights = jnp.float32(np.random.default_rng(5).normal(size=9))
    spoilt, whole = slopes(np.nan), slopes(0.5)
    sides = (0, 1) if number < 2 else (2, 3)
    for place, (ours, theirs) in enumerate(zip(spoilt, whole, strict=True)):
        heads = [0, 2] if place in sides else [0, 1, 2]
        assert np.isfinite(ours[np.array(heads)]).all()
        if place in sides:  # each head's derivatives depend on the heads of the other side only
            np.testing.assert_allclose(ours[np.array(heads)], theirs[np.array(heads)], rtol=0, atol=1e-5)


def test_derivatives_by_a_column_of_zeros_are_0():
    x = MATRIX.astype(np.float32)
    x[:, 4] = 0
    slope = jax.grad(lambda x: jnp.cos(kernels.column_cosine(x) + 1).sum())(x)
    assert not np.asarray(slope[:, 4]).any()
    assert np.asarray(slope[:, 3]).all()
