"""Null distribution of figure 6 with `--significance`: all pairs binned anew by permuted frequencies.

The frequencies of the batch's distinct tokens are permuted over these tokens. The sum of two log frequencies depends
only on the unordered pair of tokens, so that a permutation uses the sums over such pairs from the device, and computes
no score again.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxqkv.kernels import permutation_null, permutation_p
from jaxqkv.runtime import console, distributed
from jaxqkv.studies.significance import q_values
from jaxqkv.studies.token_frequency.reductions import BINS, row_correlations

# Shares of the values that are below each edge.
SHARES = np.linspace(0, 100, BINS + 1) / 100


class TokenPairs(NamedTuple):
    """Unordered pairs of one sequence's distinct tokens, as the lower triangle, row by row.

    Attributes:
      tokens: indices of the sequence's tokens among the batch's distinct tokens.
      occurrences: of each.
      one, other: the tokens of each pair.
      weights: how many ordered pairs of positions have these tokens.
      mean: of all scores in each layer.
      terms: Σ (score − mean), and Σ (score − mean)² after it, in each layer.
    """

    tokens: Int[np.ndarray, "token"]
    one: Int[np.ndarray, "pair"]
    other: Int[np.ndarray, "pair"]
    weights: Int[np.ndarray, "pair"]
    mean: Float[np.ndarray, "layer"]
    terms: Float[np.ndarray, "pair term"]


def cut_sums(
    sums: Float[np.ndarray, "layer sequence 2 pair"], occurrences: Int[np.ndarray, "sequence token"]
) -> Float[np.ndarray, "row 2 layer"]:
    """Returns the reducer's TOKEN_PAIRS, a row for each pair of tokens that a sequence has."""
    sizes = (occurrences > 0).sum(axis=1)
    parts = [sums[:, row, :, : size * (size + 1) // 2] for row, size in enumerate(sizes)]
    return np.concatenate([part.transpose(2, 1, 0) for part in parts])


def token_pairs(
    ids: Int[np.ndarray, "sequence pos"], sums: Float[np.ndarray, "pair 2 layer"], tokens: Int[np.ndarray, "token"]
) -> Iterator[TokenPairs]:
    """Yields the pairs of each sequence that has a token with a known frequency.

    Args:
      ids: of the sequences.
      sums: from `cut_sums`, of all of them.
      tokens: the batch's distinct tokens that have a frequency, in ascending order.
    """
    start = 0
    for row in ids:
        distinct, count = np.unique(row[np.isin(row, tokens)], return_counts=True)
        one, other = (each.astype(np.int32) for each in np.tril_indices(len(distinct)))
        start, own = start + len(one), sums[start : start + len(one)].astype(np.float64)
        if not len(distinct):
            continue
        weights = count[one] * count[other] * np.where(one == other, 1, 2)
        total, squares = own[:, 0], own[:, 1]
        mean = total.sum(axis=0) / weights.sum()
        about = total - weights[:, None] * mean
        terms = np.concatenate([about, squares + about**2 / weights[:, None]], axis=1)
        yield TokenPairs(np.searchsorted(tokens, distinct), one, other, weights, mean, terms)


def binned_pairs_of_tokens(
    pairs: TokenPairs, frequency: Float[np.ndarray, "token"]
) -> tuple[Bool[np.ndarray, "bin"], Float[np.ndarray, "bin"], Float[np.ndarray, "bin moment"]]:
    """Returns which bins have pairs, the centres of all, and mean and standard deviation of the score in each layer.

    Equals `percentile_edges`, `bin_index` and `binned_moments` of every pair of positions.

    Args:
      pairs: of one sequence.
      frequency: log frequency of each of its distinct tokens.
    """
    from scipy.sparse import csr_array

    values = frequency[pairs.one] + frequency[pairs.other]
    order = np.argsort(values)
    values, upto = np.take(values, order), np.cumsum(np.take(pairs.weights, order))
    # The edges lie between the two values of a rank; interpolated to the last place as NumPy does, for ties with them.
    rank = (upto[-1] - 1) * SHARES
    below = np.floor(rank).astype(np.int64)
    low, high = (values[np.searchsorted(upto, each, "right")] for each in (below, np.minimum(below + 1, upto[-1] - 1)))
    share = rank - below
    edges = np.where(share >= 0.5, high - (high - low) * (1 - share), low + (high - low) * share)
    ends = np.searchsorted(values, edges[1:-1], "left")  # a value on an inner edge belongs to the bin above
    sizes = np.diff(ends, prepend=0, append=len(values))
    index = np.empty(len(values), np.int32)
    index[order] = np.repeat(np.arange(BINS, dtype=np.int32), sizes)
    count = np.diff(np.concatenate([[0], upto])[ends], prepend=0, append=upto[-1])
    one_bin = csr_array((np.ones(len(index)), index, np.arange(len(index) + 1)), shape=(len(index), BINS))
    total, squares = np.split(one_bin.T @ pairs.terms, 2, axis=1)
    n = np.maximum(count, 1)[:, None]
    mean = total / n
    std = np.sqrt(np.maximum(squares / n - mean**2, 0))
    return count > 0, (edges[:-1] + edges[1:]) / 2, np.concatenate([pairs.mean + mean, std], axis=1)


def binned_sums(
    sequences: Iterable[TokenPairs],
    frequency: Float[np.ndarray, "token"],
    orders: Int[np.ndarray, "permutation token"],
    layers: int,
    total: int,
) -> Float[np.ndarray, "permutation bin moment"]:
    """Returns sums over the sequences with something in the bin: 1, centre, means and standard deviations.

    Runs on all cores.

    Args:
      sequences: each with its pairs.
      frequency: log frequency of each of the batch's distinct tokens.
      orders: for each permutation and token, the token whose frequency it gets.
      layers: number of layers.
      total: number of sequences, for the progress bar.
    """
    sums = np.zeros((len(orders), BINS, 2 + 2 * layers))
    with (
        ThreadPoolExecutor() as threads,  # sorting and the products run outside of Python's lock
        console.bar(sequences, total=total, desc="permutations", unit="sequence") as bar,
    ):
        for pairs in bar:

            def add(number: int, pairs: TokenPairs = pairs) -> None:
                there, centres, moments = binned_pairs_of_tokens(pairs, frequency[orders[number, pairs.tokens]])
                row = np.concatenate([np.ones((BINS, 1)), centres[:, None], moments], axis=1)
                sums[number] += np.where(there[:, None], row, 0)

            for _ in threads.map(add, range(len(orders))):
                pass
    return sums


def correlations(sums: Float[np.ndarray, "permutation bin moment"]) -> Float[np.ndarray, "2 permutation layer"]:
    """Returns r of the averaged centres with the averaged means and standard deviations, as in figure 6."""
    count = sums[..., :1]
    averages = np.where(count > 0, sums / np.maximum(count, 1), np.nan).astype(np.float32).swapaxes(1, 2)
    y = averages[:, 2:].reshape(len(sums), 2, -1, BINS)
    x = np.broadcast_to(averages[:, None, None, 1], y.shape)
    r = np.asarray(row_correlations(x.reshape(-1, BINS), y.reshape(-1, BINS)))
    return r.reshape(y.shape[:3]).swapaxes(0, 1)


def _labels(labels: Int[Array, "token"], _: Any) -> Int[Array, "token"]:
    return labels


def correlation_null(
    ids: Int[np.ndarray, "sequence pos"],
    sums: Float[np.ndarray, "pair 2 layer"],
    log_frequency: Float[np.ndarray, "vocab"],
    *,
    seed: int,
    permutations: int,
) -> Float[np.ndarray, "2 permutation layer"]:
    """Returns figure 6's `r_mean` and `r_std` of permuted frequencies, the same permutation in all sequences.

    Each of several processes bins its own sequences.

    Args:
      ids: of this process's sequences.
      sums: from `cut_sums`, of the same.
      log_frequency: of each token of the vocabulary; NaN for one that was never counted.
      seed: of the permutations.
      permutations: how many.
    """
    there = np.zeros(len(log_frequency), np.int64)
    there[ids] = 1
    tokens = np.flatnonzero((distributed.total(there) > 0) & ~np.isnan(log_frequency))
    places, key = np.arange(len(tokens), dtype=np.int32), jax.random.key(seed)
    orders = np.asarray(permutation_null(places, (), key, statistic=_labels, permutations=permutations))
    sequences = token_pairs(ids, sums, tokens)
    binned = binned_sums(sequences, log_frequency[tokens], orders, sums.shape[2], len(ids))
    return correlations(distributed.total(binned[None])[0])


def bin_tests(
    null: Float[np.ndarray, "2 permutation layer"], *observed: Float[np.ndarray, "layer"]
) -> dict[str, Float[np.ndarray, "layer"]]:
    """Returns `p_mean`, `p_std`, `q_value_mean` and `q_value_std` of figure 6's `r_mean` and `r_std`, two-sided.

    A permutation whose r is undefined counts as at least as large.
    """
    null = np.where(np.isnan(null), np.inf, null)
    p = [np.asarray(permutation_p(each, r)) for each, r in zip(null, observed, strict=True)]
    names = ("p_mean", "p_std", "q_value_mean", "q_value_std")
    return dict(zip(names, [*p, *q_values(*p)], strict=True))
