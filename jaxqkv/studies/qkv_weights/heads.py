"""Tests of `--significance`: are columns more, or less, alike within a head than across heads?"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxqkv.checkpoints.weights import Weights
from jaxqkv.kernels import permutation_null, permutation_p
from jaxqkv.kernels.similarity import unit_columns
from jaxqkv.runtime import console
from jaxqkv.runtime.devices import jit
from jaxqkv.studies.comparison import reduce_layers
from jaxqkv.studies.significance import q_values

# Permutations that are in memory at a time: [permutation · head, column] and [permutation · head, row].
TOGETHER = 50


class HeadTests(NamedTuple):
    """Two-sided tests of the mean cosine within heads − the mean across heads, by layer and matrix."""

    p: Float[np.ndarray, "layer matrix"]
    q_value: Float[np.ndarray, "layer matrix"]


class _Columns(NamedTuple):
    """Columns at unit length, and the heads' numbers."""

    unit: Float[Array, "row column"]
    heads: Int[Array, "head"]


def _difference(head: Int[Array, "column"], data: _Columns) -> Float[Array, ""]:
    """Returns the mean cosine within − across heads, from sums of unit columns, without computing the cosines.

    The cosines of n columns u add up to (‖Σu‖² − Σ‖u‖²) / 2. The sums within heads are one matrix product for all
    permutations.
    """
    members = (head[None] == data.heads[:, None]).astype(data.unit.dtype)
    sums = members @ data.unit.T
    own, n = (data.unit**2).sum(), jnp.float32(head.shape[0])
    every = data.unit.sum(axis=1)
    within, total = ((sums**2).sum() - own) / 2, ((every**2).sum() - own) / 2
    pairs_within = n * (n / data.heads.shape[0] - 1) / 2
    pairs = n * (n - 1) / 2
    return within / pairs_within - (total - within) / (pairs - pairs_within)


@jit(static_argnames=("n_head", "matrices", "permutations"))
def _p(
    wide: Float[Array, "embed three_inner"], key: Key[Array, ""], *, n_head: int, matrices: int, permutations: int
) -> Float[Array, "matrix"]:
    """Returns p of W_Q, W_K and, with `matrices` 3, W_V; all have the same permutations."""
    width = wide.shape[1] // 3
    head = jnp.repeat(jnp.arange(n_head), width // n_head)

    def one(matrix: Float[Array, "embed inner"]) -> Float[Array, ""]:
        data = _Columns(unit_columns(matrix), jnp.arange(n_head))
        null = permutation_null(head, data, key, statistic=_difference, permutations=permutations, together=TOGETHER)
        return permutation_p(null, _difference(head, data))

    return jnp.stack([one(wide[:, start * width : (start + 1) * width]) for start in range(matrices)])


def head_tests(weights: Sequence[Weights], matrices: int, seed: int, permutations: int) -> list[HeadTests]:
    """Tests every layer of each checkpoint by permuting the columns over the heads; all tests share their q-values.

    Args:
      weights: weights of each checkpoint.
      matrices: 2 for W_Q and W_K, 3 for W_V too.
      seed: seed of the permutations.
      permutations: number of permutations.

    Returns:
      The tests of each checkpoint; NaN if there is one head, or one column in each.
    """
    found = []
    with console.bar(total=sum(each.config.n_layer for each in weights), desc="tests", unit="layer") as progress:
        for each in weights:
            how = {"n_head": each.config.n_head, "matrices": matrices, "permutations": permutations}

            def reduce(layer: int, wide: Float[Array, "embed three_embed"], how: dict[str, int] = how) -> Array:
                return _p(wide, jax.random.key(seed), **how)

            found.append(np.stack(reduce_layers(each, range(each.config.n_layer), reduce, progress)))
    return [HeadTests(p, q) for p, q in zip(found, q_values(*found), strict=True)]
