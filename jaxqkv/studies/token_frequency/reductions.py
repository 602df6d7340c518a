"""Reductions of a layer for the figures, on the device, and the bins of pairs of tokens, on the host."""

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxqkv.architectures.activations import Attention
from jaxqkv.architectures.attention import merge_heads, scaled_scores
from jaxqkv.kernels import bin_index, binned_moments, pearson, percentile_edges
from jaxqkv.model.reducers import Reducer
from jaxqkv.runtime.devices import execution, jit
from jaxqkv.typing import AnyArray

# Bins of equally many pairs.
BINS = 40
# Step between those pairs of a sequence that are shown one by one.
EVERY = 500

# Names of the arrays that `reducer` keeps of a layer.
ADJUSTMENT, PAIRS, BINNED, TOKEN_PAIRS = "adjustment", "pairs", "binned", "token pairs"
# Numbers of distinct tokens are padded to a multiple of this, so that few programs are compiled.
WIDTH = 32


class PairInputs(NamedTuple):
    """Inputs of a reducer that keeps TOKEN_PAIRS.

    Attributes:
      bins: the bin of each pair of positions.
      token: index of each position's token among the sequence's distinct tokens; −1 for one without a frequency.
      occurrences: of each of these tokens in the sequence; 0 where the sequence has fewer.
    """

    bins: Int[AnyArray, "batch pair"]
    token: Int[AnyArray, "batch pos"]
    occurrences: Int[AnyArray, "batch token"]


def _reduce(
    attention: Attention,
    mask: Bool[AnyArray, "batch pos"],
    inputs: Int[AnyArray, "batch pair"] | PairInputs,
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
        scores = mean_score(attention)
        score = scores.reshape(len(mask), -1)
        if PAIRS in names:
            results[PAIRS] = score[:, ::every]
        if BINNED in names:
            index = inputs.bins if isinstance(inputs, PairInputs) else inputs
            bins = functools.partial(binned_moments, n_bin=BINS)
            # One sequence after another is faster on a CPU; sequences on several devices go at once.
            _, mean, std = (
                jax.vmap(bins)(score, index) if sharded else jax.lax.map(lambda one: bins(*one), (score, index))
            )
            results[BINNED] = [mean, std]
        if isinstance(inputs, PairInputs):
            results[TOKEN_PAIRS] = sums_by_tokens(scores, inputs.token, inputs.occurrences)
    return results


def sums_by_tokens(
    score: Float[AnyArray, "batch query key"],
    token: Int[AnyArray, "batch pos"],
    occurrences: Int[AnyArray, "batch token"],
) -> Float[Array, "batch 2 pair"]:
    """Returns Σ score, and Σ (score − mean of the pair)², of each unordered pair of distinct tokens.

    The pairs are the lower triangle, row by row, so that those of the first tokens come first.
    """
    at = jax.nn.one_hot(token, occurrences.shape[1], dtype=score.dtype)
    einsum = functools.partial(jnp.einsum, precision="highest")

    def by_tokens(values: Float[AnyArray, "batch query key"]) -> Float[Array, "batch token token"]:
        sums = einsum("bqk,bqi,bkj->bij", values, at, at)
        return sums + sums.swapaxes(1, 2)

    total = by_tokens(score)
    count = jnp.asarray(occurrences, score.dtype)
    mean = total / jnp.maximum(2 * count[:, :, None] * count[:, None, :], 1)
    squares = by_tokens((score - einsum("bij,bqi,bkj->bqk", mean, at, at)) ** 2)
    one, other = np.tril_indices(occurrences.shape[1])
    sums = jnp.stack([total, squares], axis=1)[:, :, one, other]
    return jnp.where((one == other)[None, None], sums / 2, sums)  # of a token with itself, every score was added twice


def reducer(names: tuple[str, ...], mesh: Mesh | None) -> Reducer:
    """Returns a function for `Model.run` that keeps the named arrays of a layer.

    Args:
      names: of ADJUSTMENT, the log norms `[batch, pos]` of the attention outputs; PAIRS, every 500th score
        `[batch, pair]`; BINNED, means and standard deviations `[batch, bin]` of the scores in the bins of pairs.
        Where the inputs are `PairInputs`, sums `[batch, 2, pair]` by pairs of distinct tokens too, as TOKEN_PAIRS.
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
    """Returns how many pairs of a sequence are shown singly."""
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


def distinct_tokens(
    ids: Int[np.ndarray, "sequence pos"], log_frequency: Float[np.ndarray, "sequence pos"]
) -> tuple[Int[np.ndarray, "sequence pos"], Int[np.ndarray, "sequence token"]]:
    """Returns `token` and `occurrences` of `PairInputs`; a sequence's distinct tokens are in the order of their ids."""
    token, occurrences = np.full(ids.shape, -1, np.int32), np.zeros(ids.shape, np.int32)
    for row, known in enumerate(~np.isnan(log_frequency)):
        distinct, token[row, known], count = np.unique(ids[row, known], return_inverse=True, return_counts=True)
        occurrences[row, : len(distinct)] = count
    width = -(-max((occurrences > 0).sum(axis=1).max(), 1) // WIDTH) * WIDTH
    return token, occurrences[:, :width]


@jit
def row_correlations(x: Float[AnyArray, "row bin"], y: Float[AnyArray, "row bin"]) -> Float[Array, " row"]:
    """Returns r of each row, over the bins that are not empty."""
    return jax.vmap(lambda a, b: pearson(a, b, ~jnp.isnan(b)))(x, y)
