"""Tests of `--significance`: whether correlations with the frequency of tokens exceed chance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxqkv.kernels import permutation_null, permutation_p
from jaxqkv.studies.significance import q_values


class TokenSums(NamedTuple):
    """Sums over the occurrences of each distinct token of a batch.

    Attributes:
      occurrences: of each.
      total: sum of the adjustments of each, less the mean of all occurrences times `occurrences`.
      squares: of the adjustments about their mean, summed over all occurrences.
    """

    occurrences: Float[Array, "token"]
    total: Float[Array, "token layer"]
    squares: Float[Array, "layer"]


def _correlations(log_frequency: Float[Array, "token"], data: TokenSums) -> Float[Array, "layer"]:
    """Returns Pearson's r over all occurrences, from sums by token."""
    x = log_frequency - data.occurrences @ log_frequency / data.occurrences.sum()
    return jnp.clip(x @ data.total / jnp.sqrt(data.occurrences @ x**2 * data.squares), -1, 1)


def frequency_tests(
    sums: Float[np.ndarray, "layer_and_count vocab"],
    squares: Float[np.ndarray, "layer"],
    log_frequency: Float[np.ndarray, "vocab"],
    r: Float[np.ndarray, "layer"],
    *,
    seed: int,
    permutations: int,
) -> tuple[Float[np.ndarray, "layer"], Float[np.ndarray, "layer"]]:
    """Returns p and q-values of the correlations, two-sided: the frequencies of the distinct tokens are permuted.

    Tokens are permuted and not occurrences, of which frequent tokens have many.

    Args:
      sums: occurrences of each token, and below them the sums of their adjustments in each layer.
      squares: Σy² of the adjustments in each layer.
      log_frequency: of each token.
      r: the correlations.
      seed: of the permutations.
      permutations: how many.
    """
    there = sums[0] > 0
    if there.sum() < 2:
        return (nothing := np.full_like(r, np.nan)), nothing
    count, totals, frequency = sums[0, there], sums[1:, there], log_frequency[there]
    mean = totals.sum(axis=1, keepdims=True) / count.sum()
    spread = np.maximum(squares - count.sum() * mean[:, 0] ** 2, 0)
    about = (totals - mean * count).T
    data = TokenSums(*(jnp.asarray(each, jnp.float32) for each in (count, about, spread)))
    frequency = (frequency - frequency.mean()).astype(np.float32)
    null = permutation_null(frequency, data, jax.random.key(seed), statistic=_correlations, permutations=permutations)
    p = np.asarray(permutation_p(null, r))
    return p, q_values(p)[0]
