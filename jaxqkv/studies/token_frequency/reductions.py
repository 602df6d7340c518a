"""What is kept of a layer for the figures, on the device, and the bins of pairs of tokens, on the host."""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxqkv.architectures.activations import Attention
from jaxqkv.architectures.attention import merge_heads, scaled_scores
from jaxqkv.kernels import bin_index, binned_moments, percentile_edges
from jaxqkv.model.reducers import Reducer
from jaxqkv.runtime.devices import execution
from jaxqkv.typing import AnyArray

# Bins of equally many pairs.
BINS = 40
# Step between those pairs of a sequence that are shown one by one.
EVERY = 500

# Names of what `reducer` keeps of a layer.
ADJUSTMENT, PAIRS, BINNED = "adjustment", "pairs", "binned"


def _reduce(
    attention: Attention,
    mask: Bool[AnyArray, "batch pos"],
    index: Int[AnyArray, "batch pair"],
    *,
    names: tuple[str, ...],
    every: int,
    sharded: bool,
) -> dict[str, Any]:
    attention = attention.astype(jnp.float32)
    results: dict[str, Any] = {}
    if ADJUSTMENT in names:
        results[ADJUSTMENT] = jnp.log(jnp.linalg.norm(attention.attn_out, axis=-1))
    if PAIRS in names or BINNED in names:
        score = mean_score(attention).reshape(len(mask), -1)
        if PAIRS in names:
            results[PAIRS] = score[:, ::every]
        if BINNED in names:
            bins = functools.partial(binned_moments, n_bin=BINS)
            # One sequence after another is faster on a CPU; sequences on several devices go at once.
            _, mean, std = (
                jax.vmap(bins)(score, index) if sharded else jax.lax.map(lambda one: bins(*one), (score, index))
            )
            results[BINNED] = [mean, std]
    return results


def reducer(names: tuple[str, ...], mesh: Mesh | None) -> Reducer:
    """Returns a function for `Model.run` that keeps of a layer what is named.

    Args:
      names: of ADJUSTMENT, the log norms `[batch, pos]` of the attention outputs; PAIRS, every 500th score
        `[batch, pair]`; BINNED, means and standard deviations `[batch, bin]` of the scores in the bins of pairs.
      mesh: of the model.
    """
    return functools.partial(_reduce, names=names, every=EVERY, sharded=execution(mesh).sharded)


def mean_score(attention: Attention) -> Float[Array, "batch query key"]:
    """Returns the mean over heads of QKᵀ/√head_dim, which is one product over the whole width."""
    assert attention.q is not None  # which is captured, as k is
    assert attention.k is not None
    n_head, head_dim = attention.q.shape[1], attention.q.shape[-1]
    return scaled_scores(merge_heads(attention.q), merge_heads(attention.k), 1 / (head_dim**0.5 * n_head))


def pair_sums(log_frequency: Float[np.ndarray, " pos"]) -> Float[np.ndarray, "query key"]:
    """Returns the sum of the log frequencies of every pair of tokens."""
    return log_frequency[:, None] + log_frequency[None, :]


def pair_count(length: int) -> int:
    """Returns how many pairs of a sequence are shown one by one."""
    return len(range(0, length**2, EVERY))


def binned_pairs(
    log_frequency: Float[np.ndarray, "sequence pos"],
) -> tuple[Float[np.ndarray, "sequence edge"], Int[np.ndarray, "sequence pair"]]:
    """Returns the edges of the bins of each sequence's pairs, and the bin of each pair; runs on all cores."""

    def one(row: Float[np.ndarray, " pos"]) -> tuple[np.ndarray, np.ndarray]:
        sums = pair_sums(row).ravel()
        edges = percentile_edges(sums, n_bin=BINS)
        return edges, bin_index(sums, edges).astype(np.int8)

    with ThreadPoolExecutor() as threads:  # NumPy sorts and searches outside of Python's lock
        edges, index = zip(*threads.map(one, log_frequency), strict=True)
    return np.stack(edges), np.stack(index)
