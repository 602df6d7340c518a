"""Divergences between the norms at correct and incorrect positions, and their permutation tests."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxqkv.kernels import bin_index, jensen_shannon, permutation_null, permutation_p
from jaxqkv.runtime.devices import jit
from jaxqkv.studies.significance import q_values
from jaxqkv.typing import AnyArray

# Number of bins between the smallest and the largest norm, and the numbers of edges that figure 4 compares.
BINS = 30
EDGE_COUNTS = np.arange(10, 51)
# Offset that the original adds inside logarithms.
PUBLISHED_OFFSET = 1e-15


def edges_between(values: Float[np.ndarray, "pos"], count: int) -> Float[np.ndarray, "edge"]:
    """Returns `count` equally spaced edges from the smallest to the largest value."""
    return np.linspace(float(values.min()), float(values.max()), count)


def one_hot(values: Float[np.ndarray, "pos"], n_bin: int) -> Float[np.ndarray, "pos bin"]:
    """Returns 1 at the bin of each value, 0 elsewhere; bins are equally wide, from the smallest to the largest value.

    A histogram of some of the values is then the product of their flags and this matrix.
    """
    index = bin_index(values, edges_between(values, n_bin + 1))
    return (index[:, None] == np.arange(n_bin)).astype(np.float32)


def published_divergence(p: Float[Array, "bin"], q: Float[Array, "bin"], bins: Float[Array, ""]) -> Float[Array, ""]:
    """Returns the original's divergence: ½ KL(m ‖ p) + ½ KL(m ‖ q), with an offset, divided by the number of bins."""
    p, q = p / p.sum(), q / q.sum()
    m = (p + q) / 2
    terms = sum(jnp.log(jnp.where(m > 0, m, 1) / (each + PUBLISHED_OFFSET)) for each in (p, q))
    return jnp.where(m > 0, m * terms, 0).sum() / 2 / bins


def right_divergence(p: Float[Array, "bin"], q: Float[Array, "bin"], bins: Float[Array, ""]) -> Float[Array, ""]:
    """Returns Jensen and Shannon's divergence."""
    return jensen_shannon(p, q)


Divergence = Callable[..., Array]


class Norms(NamedTuple):
    """Norms by layer, and their bins.

    Attributes:
      hot: 1 at the bin of each norm, 0 elsewhere.
      norm: the norms minus their layer's mean, so that sums keep their digits.
    """

    hot: Float[AnyArray, "layer pos bin"]
    norm: Float[AnyArray, "layer pos"]

    @classmethod
    def of(cls, norms: Float[np.ndarray, "layer pos"]) -> "Norms":
        """Returns norms with their bins, `BINS` in each layer."""
        hot = np.stack([one_hot(layer, BINS) for layer in norms])
        return cls(hot, norms - norms.mean(axis=1, keepdims=True))


def _statistics(flags: Float[Array, "pos"], data: Norms, *, divergence: Divergence) -> Float[Array, "two layer"]:
    """Returns the divergence and the difference of means between correct and incorrect norms, by products only."""
    correct = jnp.einsum("p,lpb->lb", flags, data.hot)
    incorrect = data.hot.sum(axis=1) - correct
    size = jnp.float32(data.hot.shape[2])
    n = flags.sum()
    means = jnp.einsum("p,lp->l", flags, data.norm) / n
    others = jnp.einsum("p,lp->l", 1 - flags, data.norm) / (flags.size - n)
    return jnp.stack([jax.vmap(divergence, in_axes=(0, 0, None))(correct, incorrect, size), means - others])


# Whether it is as published → divergence, statistic; defined here so that each is compiled once.
DIVERGENCES: dict[bool, Divergence] = {False: right_divergence, True: published_divergence}
STATISTICS = {how: functools.partial(_statistics, divergence=each) for how, each in DIVERGENCES.items()}
OBSERVED = {how: jit(each) for how, each in STATISTICS.items()}


@jit(static_argnames="as_published")
def _shifted(
    flags: Float[AnyArray, "pos"], shifts: Int[AnyArray, "shift"], data: Norms, *, as_published: bool
) -> Float[Array, "shift layer"]:
    shifted = jax.vmap(jnp.roll, in_axes=(None, 0))(jnp.asarray(flags), jnp.asarray(shifts))
    return jax.vmap(STATISTICS[as_published], in_axes=(0, None))(shifted, data)[:, 0]


@jit(static_argnames="as_published")
def _of_edge_counts(
    correct: Float[AnyArray, "count bin"],
    incorrect: Float[AnyArray, "count bin"],
    bins: Float[AnyArray, "count"],
    *,
    as_published: bool,
) -> Float[Array, "count"]:
    return jax.vmap(DIVERGENCES[as_published])(correct, incorrect, bins)


def by_edge_count(
    norm: Float[np.ndarray, "pos"], correct: Bool[np.ndarray, "pos"], as_published: bool
) -> Float[np.ndarray, "count"]:
    """Returns the divergence of one layer for each of `EDGE_COUNTS`."""
    sides = np.zeros((2, len(EDGE_COUNTS), EDGE_COUNTS.max() - 1), np.float32)
    for row, count in enumerate(EDGE_COUNTS):
        edges = edges_between(norm, int(count))
        for side, chosen in zip(sides, (correct, ~correct), strict=True):
            side[row, : count - 1] = np.histogram(norm[chosen], edges)[0]
    first, second = sides
    return np.asarray(_of_edge_counts(first, second, (EDGE_COUNTS - 1).astype(np.float32), as_published=as_published))


class LayerTests(NamedTuple):
    """Observed statistics of each layer, and their tests.

    Attributes:
      divergence: divergence between the norms at correct and incorrect positions.
      difference: difference of their means, correct − incorrect.
      null: divergences for permuted flags.
      p, p_shift: one-sided p of the divergence, by permutations and by circular shifts.
      q_value: q-value of `p`, together with the other tests.
      difference_p, difference_q_value: two-sided p and q-value of the difference.
    """

    divergence: Float[np.ndarray, "layer"]
    difference: Float[np.ndarray, "layer"]
    null: Float[np.ndarray, "permutation layer"]
    p: Float[np.ndarray, "layer"]
    p_shift: Float[np.ndarray, "layer"]
    q_value: Float[np.ndarray, "layer"]
    difference_p: Float[np.ndarray, "layer"]
    difference_q_value: Float[np.ndarray, "layer"]


def layer_tests(
    norms: Float[np.ndarray, "layer pos"],
    correct: Bool[np.ndarray, "pos"],
    key: Key[Array, ""],
    *,
    permutations: int,
    as_published: bool,
) -> LayerTests:
    """Tests all layers with the same permutations of the flags; the histograms of all are one matrix product."""
    permuting, shifting = jax.random.split(key)
    flags, data = correct.astype(np.float32), jax.tree.map(jnp.asarray, Norms.of(norms))
    statistic = STATISTICS[as_published]
    observed = np.asarray(OBSERVED[as_published](flags, data))
    null = np.asarray(permutation_null(flags, data, permuting, statistic=statistic, permutations=permutations))
    shifts = jnp.arange(1, len(flags))
    if len(shifts) > permutations:
        shifts = jax.random.permutation(shifting, shifts)[:permutations]
    shifted = _shifted(flags, shifts, data, as_published=as_published)
    p = np.asarray(permutation_p(null[:, 0], observed[0], two_sided=False))
    difference_p = np.asarray(permutation_p(null[:, 1], observed[1]))
    q_value, difference_q_value = q_values(p, difference_p)
    divergence, difference = observed
    p_shift = np.asarray(permutation_p(shifted, observed[0], two_sided=False))
    return LayerTests(divergence, difference, null[:, 0], p, p_shift, q_value, difference_p, difference_q_value)
