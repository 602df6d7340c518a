"""Tests of `--significance`: are dimensions more, or less, alike at the target than at the token before it?"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from jaxqkv.kernels import GROUPS, exchange_null, permutation_p
from jaxqkv.kernels.similarity import unit_columns
from jaxqkv.runtime.devices import jit
from jaxqkv.typing import AnyArray

Samples = Float[AnyArray, "sentence three_embed"]


def group_means(x: Samples, *, centred: bool) -> Float[Array, "group"]:
    """Returns the mean similarity of each group of pairs of dimensions, in the order of `GROUPS`.

    Computed from sums of the unit columns u of Q, K and V, without the similarities: over all pairs of two thirds they
    add up to the product of the sums, and within a third to (‖Σu‖² − Σ‖u‖²) / 2.
    """
    unit = unit_columns(x - x.mean(axis=0, keepdims=True) if centred else x)
    thirds = unit.reshape(unit.shape[0], 3, -1)
    sums, own = thirds.sum(axis=2), (thirds**2).sum(axis=(0, 2))
    products = jnp.einsum("sa,sb->ab", sums, sums)
    size = thirds.shape[2]
    within = (jnp.diagonal(products) - own) / (size * max(size - 1, 1))
    return jnp.stack([within[a] if a == b else products[a, b] / size**2 for a, b in GROUPS.values()])


def _difference(
    exchanged: Bool[Array, "sentence"], data: tuple[Samples, Samples], *, centred: bool
) -> Float[Array, "group"]:
    """Returns the mean similarities of the target − those of the token before it, with some sentences exchanged."""
    target, non_target = data
    sides = [jnp.where(exchanged[:, None], *pair) for pair in ((non_target, target), (target, non_target))]
    one, other = (group_means(side, centred=centred) for side in sides)
    return one - other


# Whether similarity is correlation → statistic; defined here so that each is compiled once.
STATISTICS = {centred: functools.partial(_difference, centred=centred) for centred in (False, True)}


@jit(static_argnames=("centred", "permutations"))
def exchange_p(
    target: Samples, non_target: Samples, key: Key[Array, ""], *, centred: bool, permutations: int
) -> Float[Array, "group"]:
    """Returns two-sided p of the difference of each group's mean; the two tokens of a sentence are exchanged."""
    data, statistic = (jnp.asarray(target), jnp.asarray(non_target)), STATISTICS[centred]
    observed = statistic(jnp.zeros(target.shape[0], bool), data)
    null = exchange_null(data, key, n_unit=target.shape[0], statistic=statistic, permutations=permutations, together=25)
    return permutation_p(null, observed)
