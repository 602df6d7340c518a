"""Mean and standard deviation of one variable in bins of another.

The bins of a sequence are the same in every layer, so they are found once, on the host and in float64, so that ties
with an edge are exact. The statistics are jitted and take the bins' indices.

Source: study token-frequency (Cohen, 50 ML projects to understand LLMs, project 39).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxqkv.errors import KernelError
from jaxqkv.kernels.calling import kernel
from jaxqkv.kernels.scales import root
from jaxqkv.typing import AnyArray

# Values are summed in this many parts first, so that float32 adds numbers of similar size.
PARTS = 512


@kernel(compiled=False)
def percentile_edges(values: Float[np.ndarray, "*shape"], *, n_bin: int) -> Float[np.ndarray, "edge"]:
    """Returns edges of `n_bin` bins with equally many values each.

    As `numpy.percentile(values, linspace(0, 100, n_bin + 1))`.

    NaN is left out; an empty sample gives edges of NaN. Edges repeat where many values are the same.

    Args:
      values: any shape, any unit.
      n_bin: number of bins, at least one.

    Returns:
      `n_bin + 1` edges in float64, increasing, in the unit of `values`.
    """
    if n_bin < 1:
        raise KernelError(f"n_bin is the number of bins, 1 or more, not {n_bin}")
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    if not values.size:
        return np.full(n_bin + 1, np.nan)
    return np.percentile(values, np.linspace(0, 100, n_bin + 1))


@kernel(compiled=False)
def bin_index(values: Float[np.ndarray, "*shape"], edges: Float[np.ndarray, "edge"]) -> Int[np.ndarray, "*shape"]:
    """Returns the bin of each value: bin i is [edge i, edge i+1), the last one closed; −1 outside and for NaN.

    Edges need not be equally spaced. Bins between repeated edges are empty: a value on an edge belongs to the bin
    above. Compared in float64.

    Args:
      values: any shape.
      edges: increasing, in the unit of `values`, for instance from `percentile_edges`.
    """
    values = np.asarray(values, np.float64)
    bins = len(edges) - 1
    index = np.searchsorted(edges, values, side="right") - 1
    index = np.where(values == edges[-1], bins - 1, index)
    return np.where((values >= edges[0]) & (values <= edges[-1]), index, -1).astype(np.int32)


@kernel()
def binned_moments(
    values: Float[AnyArray, "value"], index: Int[AnyArray, "value"], *, n_bin: int
) -> tuple[Int[Array, "bin"], Float[Array, "bin"], Float[Array, "bin"]]:
    """Returns count, mean and population standard deviation of the values in each bin, in two passes.

        mean b = Σ x / n b,    std b = √(Σ (x − mean b)² / n b),    over the x whose index is b

    As `scipy.stats.binned_statistic`, except that an empty bin is NaN without a warning.

    Args:
      values: one sample, any unit.
      index: the bin of each value, from `bin_index`; those outside 0 … n_bin − 1 are left out.
      n_bin: number of bins.

    Returns:
      Three arrays `[bin]`: int32, and two of float32 in the unit of `values`.

    Raises:
      JaxqkvError: if `values` and `index` do not have the same length.
    """
    values, index = jnp.asarray(values, jnp.float32), jnp.asarray(index, jnp.int32)
    if values.shape != index.shape or values.ndim != 1:
        shapes = f"{values.shape} and {index.shape}"
        raise KernelError(f"values and index must be one-dimensional and of equal length, not {shapes}")
    inside = (index >= 0) & (index < n_bin)
    # Each part of the values has its own cells; its last cell takes the values outside the bins.
    parts = min(PARTS, max(values.size, 1))
    part = jnp.arange(values.size, dtype=jnp.int32) // max(-(-values.size // parts), 1)
    cell = part * (n_bin + 1) + jnp.where(inside, index, n_bin)

    def total(terms: Array) -> Array:
        sums = jnp.zeros(parts * (n_bin + 1), terms.dtype).at[cell].add(terms, mode="promise_in_bounds")
        return sums.reshape(parts, n_bin + 1).sum(axis=0)

    count = total(jnp.ones_like(index))
    n = jnp.where(count > 0, count, 1).astype(values.dtype)
    mean = total(jnp.where(inside, values, 0)) / n
    deviation = values - mean[jnp.where(inside, index, n_bin)]
    std = root(total(jnp.where(inside, deviation, 0) ** 2) / n)
    empty = count[:-1] == 0
    return count[:-1], jnp.where(empty, jnp.nan, mean[:-1]), jnp.where(empty, jnp.nan, std[:-1])
