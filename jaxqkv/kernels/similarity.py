"""Cosine similarities between the columns of a matrix: all of them, by head, and their moments.

Source: study qkv-weights (Cohen, 50 ML projects to understand LLMs, project 33).
"""

import itertools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxqkv.errors import KernelError
from jaxqkv.kernels.calling import kernel
from jaxqkv.kernels.histograms import Binning, binning, densities_between
from jaxqkv.kernels.moments import moments
from jaxqkv.kernels.scales import power_of_two, root
from jaxqkv.runtime.devices import jit
from jaxqkv.typing import AnyArray


def unit_columns(x: Float[AnyArray, "row column"]) -> Float[Array, "row column"]:
    """Returns columns divided by their Euclidean norms; a column of zeros stays zero, with derivatives of 0."""
    x = jnp.asarray(x)
    x = x / power_of_two(x, axis=0)
    norm = root((x**2).sum(axis=0, keepdims=True))
    return x / jnp.where(norm > 0, norm, jnp.inf)


@kernel()
def column_cosine(x: Float[AnyArray, "row column"]) -> Float[Array, "column column"]:
    """Returns the cosine similarity of every pair of columns: UᵀU, U the unit columns; in −1…1, in x's dtype."""
    unit = unit_columns(x)
    return unit.T @ unit


@kernel()
def column_cosine_moments(
    x: Float[AnyArray, "row column"], *, ddof: int = 1, strips: int = 3
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns mean and standard deviation of the column cosines above the diagonal, without keeping them.

    The mean needs no product of columns: with U the unit columns, Σᵢⱼ cᵢⱼ = ‖Σᵢ uᵢ‖². The squares
    about it are summed over horizontal strips of UᵀU that begin at the diagonal, which is
    (1 + 1/strips)/2 of the whole product and holds one strip in memory at a time.

    Args:
      x: one matrix; n columns give n(n−1)/2 cosines.
      ddof: 1 for the sample's standard deviation (the default), 0 for the population's.
      strips: number of strips that the product is cut into.

    Returns:
      Two scalars of the dtype of `x`, in −1…1 and 0…1; 0 and 0 for a single column.
    """
    if strips < 1:
        raise KernelError(f"strips is the number of pieces of a product, 1 or more, not {strips}")
    unit = unit_columns(x)
    n = x.shape[1]
    pairs = n * (n - 1) / 2
    total = unit.sum(axis=1)
    mean = (total @ total - (unit**2).sum()) / 2 / max(pairs, 1)
    squares = jnp.float32(0)
    for start, stop in _cuts(n, strips):
        cosine = unit[:, start:stop].T @ unit[:, start:]
        above = jnp.triu(jnp.ones(cosine.shape, bool), 1)
        squares += jnp.where(above, (cosine - mean) ** 2, 0).sum(axis=1).sum()
    return mean, root(squares / max(pairs - ddof, 1))


def _cuts(n: int, pieces: int) -> list[tuple[int, int]]:
    """Cuts the range of `n` into at most `pieces` runs of nearly equal length."""
    edges = [n * piece // min(pieces, n) for piece in range(min(pieces, n) + 1)]
    return list(itertools.pairwise(edges))


@kernel()
def head_pair_masks(*, n_head: int, head_dim: int) -> Bool[Array, "two column column"]:
    """Returns which pairs of columns are within a head, and which across heads, each pair once.

    Columns are heads side by side, `head_dim` each. Index 0: i < j in the same head (upper triangles of the diagonal
    blocks). Index 1: head of i < head of j (the blocks above the diagonal).
    """
    column = jnp.arange(n_head * head_dim)
    head = column // head_dim
    same = head[:, None] == head[None, :]
    return jnp.stack([(column[:, None] < column[None, :]) & same, head[:, None] < head[None, :]])


@kernel(compiled=False)
def head_pair_densities(
    x: Float[AnyArray, "row column"], edges: Float[np.ndarray, "edge"], *, n_head: int
) -> tuple[Float[Array, "two bin"], Float[Array, "two"], Float[Array, "two"]]:
    """Returns densities, means and population standard deviations of column cosines within and across heads.

    Args:
      x: heads side by side, `n_head · head_dim` columns.
      edges: equally spaced bin edges in −1…1.
      n_head: number of heads.

    Returns:
      density `[2, bin]`, mean `[2]`, std `[2]`; index 0 within heads, 1 across heads.

    Raises:
      ValueError: if the columns do not divide evenly among the heads, and for bad edges, as `counts`.
    """
    if np.ndim(x) != 2 or n_head < 1 or x.shape[1] % n_head:
        raise KernelError(f"expected a matrix whose columns are {n_head} heads side by side, got {list(np.shape(x))}")
    return _head_pair_densities(x, binning(edges), n_head=n_head)


@jit(static_argnames="n_head")
def _head_pair_densities(
    x: Float[AnyArray, "row column"], bins: Binning, *, n_head: int
) -> tuple[Float[Array, "two bin"], Float[Array, "two"], Float[Array, "two"]]:
    cosine = column_cosine(jnp.asarray(x, jnp.float32))
    within, across = head_pair_masks(n_head=n_head, head_dim=x.shape[1] // n_head)
    group = jnp.where(within, 0, jnp.where(across, 1, -1))
    statistics = [moments(cosine, mask) for mask in (within, across)]
    mean, std = (jnp.stack(column) for column in zip(*statistics, strict=True))
    return densities_between(cosine, bins, group, n_group=2), mean, std
