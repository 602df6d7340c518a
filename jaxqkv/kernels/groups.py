"""Similarities between the dimensions of Q, K and V over a set of samples, by group.

Source: study token-similarity (Cohen, A deep understanding of AI language model mechanisms).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxqkv.errors import KernelError
from jaxqkv.kernels.calling import kernel
from jaxqkv.kernels.histograms import Binning, binning, density_between
from jaxqkv.kernels.similarity import column_cosine, unit_columns
from jaxqkv.runtime.devices import jit
from jaxqkv.typing import AnyArray

# Groups in the order of every group axis, as pairs of the thirds Q, K, V.
GROUPS = {"QQ": (0, 0), "KK": (1, 1), "VV": (2, 2), "QK": (0, 1), "QV": (0, 2), "KV": (1, 2)}


@kernel()
def column_correlation(x: Float[AnyArray, "row column"]) -> Float[Array, "column column"]:
    """Returns Pearson's correlation of every pair of columns: the cosine of the centred columns; in −1…1."""
    return column_cosine(x - x.mean(axis=0, keepdims=True))


@kernel(compiled=False)
def group_densities(
    x: Float[AnyArray, "sample three_embed"], edges: Float[np.ndarray, "edge"], *, centred: bool
) -> Float[Array, "group bin"]:
    """Returns densities of the similarities of column pairs, by group: QQ, KK, VV, QK, QV, KV.

    Within a third each pair counts once (the upper triangle), between two thirds all pairs. One block `[embed, embed]`
    of the matrix is in memory at a time.

    Args:
      x: samples of Q, K and V side by side.
      edges: equally spaced bin edges in −1…1.
      centred: whether the similarity is correlation; else it is cosine similarity.

    Returns:
      `[6, bin]`, in the order of `GROUPS`; the integral is 1, or 0 for a group without a pair.
    """
    if x.shape[1] % 3:
        raise KernelError(f"expected Q, K and V side by side, got {x.shape[1]} columns, which are not three thirds")
    return _group_densities(x, binning(edges), centred=centred)


@jit(static_argnames="centred")
def _group_densities(
    x: Float[AnyArray, "sample three_embed"], bins: Binning, *, centred: bool
) -> Float[Array, "group bin"]:
    x = jnp.asarray(x, jnp.float32)
    unit = unit_columns(x - x.mean(axis=0, keepdims=True) if centred else x)
    thirds = jnp.stack(jnp.split(unit, 3, axis=1))
    upper = jnp.triu(jnp.ones((thirds.shape[2], thirds.shape[2]), bool), 1)

    def block(pair: Array) -> Float[Array, " bin"]:
        similarity = thirds[pair[0]].T @ thirds[pair[1]]
        return density_between(similarity, bins, upper | (pair[0] != pair[1]))

    return jax.lax.map(block, jnp.array(list(GROUPS.values())))


@kernel()
def permute_entries(x: Float[AnyArray, "sample column"], key: Key[Array, ""]) -> Float[Array, "sample column"]:
    """Shuffles all entries: a control in which columns are alike only by chance.

    Args:
      x: samples.
      key: from `jax.random.key`; the same one gives the same order.
    """
    return jax.random.permutation(key, jnp.ravel(x)).reshape(x.shape)


@kernel(compiled=False)
def upper_density(x: Float[AnyArray, "sample column"], edges: Float[np.ndarray, "edge"]) -> Float[Array, " bin"]:
    """Returns the density of the cosine similarities of all pairs of columns, each once.

    Args:
      x: samples.
      edges: equally spaced bin edges in −1…1.
    """
    return _upper_density(x, binning(edges))


@jit
def _upper_density(x: Float[AnyArray, "sample column"], bins: Binning) -> Float[Array, " bin"]:
    return density_between(
        column_cosine(jnp.asarray(x, jnp.float32)), bins, jnp.triu(jnp.ones((x.shape[1], x.shape[1]), bool), 1)
    )
