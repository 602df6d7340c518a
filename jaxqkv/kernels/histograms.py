"""Histograms on equally spaced edges, by index arithmetic and scatter-add."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxqkv.errors import KernelError
from jaxqkv.kernels.calling import kernel
from jaxqkv.runtime.devices import jit
from jaxqkv.typing import AnyArray

# Most bins of a Freedman–Diaconis histogram.
MOST_BINS = 100_000


@kernel(compiled=False)
def counts(
    values: Float[AnyArray, "*shape"],
    edges: Float[AnyArray, "edge"],
    where: Bool[AnyArray, "*#shape"] | None = None,
) -> Int[Array, "bin"]:
    """Counts the values in each bin: bin i is [edge i, edge i+1), the last one closed.

    Exactly `numpy.histogram(values, edges)[0]`: NumPy edges in float64 are compared exactly, although the values are
    float32. NaN is in no bin; a subnormal value counts as 0.

    Args:
      values: any shape.
      edges: equally spaced and increasing, `bin + 1` of them, in the unit of `values`.
      where: the values that count; all of them unless given.

    Raises:
      ValueError: for edges that are not two or more, equally spaced and increasing. (Not checked inside `jax.jit`.)
    """
    return _counts_of_one(values, binning(edges).bounds, where)


@kernel(compiled=False)
def density(
    values: Float[AnyArray, "*shape"],
    edges: Float[AnyArray, "edge"],
    where: Bool[AnyArray, "*#shape"] | None = None,
) -> Float[Array, "bin"]:
    """Returns the probability density: count / (total count inside the edges · bin width), in 1/unit of `values`.

    As `numpy.histogram(values, edges, density=True)[0]`, but an empty sample gives zeros, not NaN.
    Arguments as for `counts`.
    """
    return density_between(values, binning(edges), where)


@kernel(compiled=False)
def density_by_group(
    values: Float[AnyArray, "*shape"],
    edges: Float[AnyArray, "edge"],
    group: Int[AnyArray, "*#shape"],
    *,
    n_group: int,
) -> Float[Array, "group bin"]:
    """Returns `density` of several samples in one pass: `group` says which of `n_group` a value belongs to.

    Args:
      values: any shape.
      edges: as for `counts`.
      group: group of each value; values whose group is not in 0 … n_group − 1 are left out.
      n_group: number of groups.

    Returns:
      `[n_group, bin]`, in 1/unit of `values`; zeros for an empty group.
    """
    return densities_between(values, binning(edges), group, n_group=n_group)


@kernel(compiled=False)
def freedman_diaconis_histogram(
    values: Shaped[np.ndarray, "*shape"], *, density: bool = False
) -> tuple[Shaped[np.ndarray, "bin"], Float[np.ndarray, "edge"]]:
    """Returns heights and edges with Freedman and Diaconis' bin width, 2·IQR/∛n: NumPy's `bins="fd"`.

    Runs on the host: the number of bins depends on the data, so that a compiled kernel would be compiled anew for
    every sample. Heights are counts, or densities as in `density`; an empty sample gives one bin [0, 1] of height 0.
    There are at most 100,000 bins, however far an outlier is.

    Args:
      values: any shape, any unit; bins of whole numbers are not narrower than 1.
      density: whether heights are densities, in 1/unit of `values`; else counts.

    Raises:
      NotDrawable: if a value is NaN or infinite.
    """
    values = require_finite(values)
    bins: str | int = "fd"
    if values.size:
        spread = np.subtract(*np.percentile(values, [75, 25]))
        width = 2.0 * spread * values.size ** (-1 / 3)
        if width > 0 and np.ptp(values) / width > MOST_BINS:
            bins = MOST_BINS
    heights, edges = np.histogram(values, bins=bins)
    if density:
        heights = heights / (max(heights.sum(), 1) * np.diff(edges))
    return heights, edges


@kernel(compiled=False)
def require_finite(values: Shaped[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    """Returns the values if all are finite, for a histogram between the smallest and the largest of them.

    Raises:
      NotDrawable: if a value is NaN or infinite.
    """
    values = np.asarray(values)
    if broken := int(np.sum(~np.isfinite(values))):
        raise KernelError(f"{broken:,} of {values.size:,} values are NaN or infinite, so there is no histogram")
    return values


class Binning(NamedTuple):
    """Bins as compiled functions take them, without the edges' float64.

    Attributes:
      bounds: float32; as `_bounds` returns them.
      widths: widths of the bins.
    """

    bounds: Float[AnyArray, "edge"]
    widths: Float[AnyArray, " bin"]


def binning(edges: Float[AnyArray, "edge"]) -> Binning:
    """Returns the bins between edges, checked unless they are traced.

    Raises:
      KernelError: for edges that are not two or more, equally spaced and increasing.
    """
    edges = _checked(edges)
    if isinstance(edges, jax.Array):
        return Binning(_bounds(edges), jnp.diff(edges))
    return Binning(_bounds(edges), np.diff(edges).astype(np.float32))


def _checked(edges: Float[AnyArray, "edge"]) -> Float[AnyArray, "edge"]:
    """Returns edges as an array, checked."""
    if isinstance(edges, jax.core.Tracer):
        return edges
    places = np.asarray(edges, np.float64)
    if places.ndim == 1 and places.size > 1 and places[0] < places[-1]:
        # Within half a bin of equal spacing, so that the index arithmetic is off by one bin at most.
        off = np.abs(places - np.linspace(places[0], places[-1], places.size)).max() * (places.size - 1)
        if off < (places[-1] - places[0]) / 2 and (np.diff(places) > 0).all():
            _check_resolution(places)
            return edges if isinstance(edges, jax.Array) else places
    raise KernelError("the edges of bins must be two or more, equally spaced and increasing")


def _check_resolution(edges: Float[np.ndarray, "edge"]) -> None:
    """Refuses bins that float32 cannot tell apart, and ranges that it cannot divide by."""
    with np.errstate(over="ignore", divide="ignore"):
        ends = edges[[0, -1]].astype(np.float32)
        scale = np.float32(edges.size) / (ends[1] - ends[0])
        step = np.spacing(np.abs(ends).max())
    # The index arithmetic is off by some 2 steps of an edge and 3 roundings of the index, and may be off by one bin.
    if not (0 < scale < np.inf and (edges[-1] - edges[0]) / (edges.size - 1) >= 4 * step):
        raise KernelError(
            f"float32 cannot tell {edges.size - 1:,} bins from {edges[0]:g} to {edges[-1]:g} apart; take fewer, or "
            "shift or scale the values"
        )


def _bounds(edges: Float[AnyArray, "edge"]) -> Float[AnyArray, "edge"]:
    """Returns float32 bounds b with edge i ≤ x ⟺ b i ≤ x for float32 x, and x ≤ last edge ⟺ x < last b."""
    if isinstance(edges, jax.Array):
        edges = edges.astype(jnp.float32)
        return edges.at[-1].set(jnp.nextafter(edges[-1], jnp.float32(jnp.inf)))
    nearest = edges.astype(np.float32)
    up = np.where(nearest < edges, np.nextafter(nearest, np.float32(np.inf)), nearest)
    if nearest[-1] <= edges[-1]:
        up[-1] = np.nextafter(nearest[-1], np.float32(np.inf))
    else:
        up[-1] = nearest[-1]
    return up


@jit
def density_between(
    values: Float[AnyArray, "*shape"], bins: Binning, where: Bool[AnyArray, "*#shape"] | None
) -> Float[Array, " bin"]:
    """Returns `density` for a `binning`, compiled."""
    return densities_between(values, bins, _group_of(where), n_group=1)[0]


@jit(static_argnames="n_group")
def densities_between(
    values: Float[AnyArray, "*shape"], bins: Binning, group: Int[AnyArray, "*#shape"] | None, *, n_group: int
) -> Float[Array, "group bin"]:
    """Returns `density_by_group` for a `binning`, compiled; without groups all values are of the first."""
    inside = _counts(values, bins.bounds, group, n_group=n_group)
    total = jnp.maximum(inside.sum(axis=1, keepdims=True), 1).astype(jnp.float32)
    return inside.astype(jnp.float32) / total / jnp.asarray(bins.widths, jnp.float32)[None]


@jit
def _counts_of_one(
    values: Float[AnyArray, "*shape"], bounds: Float[AnyArray, "edge"], where: Bool[AnyArray, "*#shape"] | None
) -> Int[Array, " bin"]:
    return _counts(values, bounds, _group_of(where), n_group=1)[0]


def _group_of(where: Bool[AnyArray, "*#shape"] | None) -> Int[Array, "*#shape"] | None:
    """Returns group 0 where a value counts, −1 elsewhere."""
    return None if where is None else jnp.where(where, 0, -1)


@jit(static_argnames="n_group")
def _counts(
    values: Float[AnyArray, "*shape"],
    bounds: Float[AnyArray, "edge"],
    group: Int[AnyArray, "*#shape"] | None,
    *,
    n_group: int,
) -> Int[Array, "group bin"]:
    values, bounds = jnp.asarray(values, jnp.float32), jnp.asarray(bounds)
    bins = bounds.size - 1
    scale = bins / (bounds[-1] - bounds[0])
    index = jnp.clip((values - bounds[0]) * scale, 0, bins - 1).astype(jnp.int32)
    # Near an edge the arithmetic can be one bin off; the bounds correct it.
    index -= (values < bounds[index]).astype(jnp.int32)
    index += (values >= bounds[index + 1]).astype(jnp.int32)
    inside = (values >= bounds[0]) & (values < bounds[-1])
    if group is not None:
        group = jnp.broadcast_to(group, values.shape).astype(jnp.int32)
        inside &= (group >= 0) & (group < n_group)
        index += bins * group
    index = jnp.where(inside, index, bins * n_group).ravel()
    tally = jnp.zeros(bins * n_group + 1, jnp.int32).at[index].add(1, mode="promise_in_bounds")
    return tally[:-1].reshape(n_group, bins)
