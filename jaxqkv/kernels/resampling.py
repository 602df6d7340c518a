"""Permutation tests and bootstrap intervals.

The statistic is a function of one permutation or one resample, and is vmapped over all of them. A product of labels or
weights with fixed arrays in it becomes one matrix product for all.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree, Shaped

from jaxqkv.errors import KernelError
from jaxqkv.kernels.calling import kernel
from jaxqkv.typing import AnyArray

# Float32 roundings by which a value of the null may be below the observed one and still count as equal.
TIES = 64


@kernel()
def permutation_null(
    labels: Shaped[AnyArray, "unit"],
    data: PyTree[Shaped[AnyArray, "..."]],
    key: Key[Array, ""],
    *,
    statistic: Callable[..., Any],
    permutations: int = 1000,
    together: int = 1000,
) -> Shaped[Array, "permutation *shape"]:
    """Returns values of a statistic for randomly permuted labels.

    Source: Pitman 1937, "Significance tests which may be applied to samples from any populations".

    Args:
      labels: labels of the units, such as the condition of each.
      data: arrays that are not permuted.
      key: from `jax.random.key`; the same key gives the same permutations, whatever the data.
      statistic: `statistic(labels, data)`; compiled for each function object, so define it once.
      permutations: number of permutations.
      together: permutations that are in memory at a time.

    Returns:
      The statistic of each permutation, in its own shape and unit.
    """
    labels, data = jax.tree.map(jnp.asarray, (labels, data))

    def one(key: Key[Array, ""]) -> Array:
        return statistic(jax.random.permutation(key, labels), data)

    return _mapped(one, jax.random.split(key, permutations), together)


@kernel()
def exchange_null(
    data: PyTree[Shaped[AnyArray, "..."]],
    key: Key[Array, ""],
    *,
    n_unit: int,
    statistic: Callable[..., Any],
    permutations: int = 1000,
    together: int = 100,
) -> Shaped[Array, "permutation *shape"]:
    """Returns values of a statistic with each unit's two conditions exchanged with probability ½.

    For paired samples, where `permutation_null` would mix the units.
    Source: Fisher 1935, "The design of experiments".

    Args:
      data: arrays that the statistic takes.
      key: from `jax.random.key`; the same key gives the same exchanges, whatever the data.
      n_unit: number of units.
      statistic: `statistic(exchanged, data)`, with `exchanged [unit]` True where a unit's conditions are exchanged.
        It is compiled for each function object, so define it once.
      permutations: number of random exchanges.
      together: exchanges that are in memory at a time.

    Returns:
      The statistic of each exchange, in its own shape and unit.
    """
    data = jax.tree.map(jnp.asarray, data)

    def one(key: Key[Array, ""]) -> Array:
        return statistic(jax.random.bernoulli(key, shape=(n_unit,)), data)

    return _mapped(one, jax.random.split(key, permutations), together)


@kernel()
def permutation_p(
    null: Float[AnyArray, "permutation *shape"], observed: Float[AnyArray, "*shape"], *, two_sided: bool = True
) -> Float[Array, "*shape"]:
    """Returns the share of the null that is at least as large as the observed value.

        p = (1 + #{null ≥ observed}) / (1 + permutations)

    never 0, since the observed labels are one of the permutations. A value that is lower by roundings only counts as
    equal.
    Source: Phipson and Smyth 2010, "Permutation P-values should never be zero".

    Args:
      null: from `permutation_null`.
      observed: the statistic of the labels as observed.
      two_sided: whether to compare magnitudes.

    Returns:
      Float32 in 1/(1 + permutations)…1; NaN where `observed` is NaN.
    """
    null, observed = jnp.asarray(null, jnp.float32), jnp.asarray(observed, jnp.float32)
    if two_sided:
        null, observed = jnp.abs(null), jnp.abs(observed)
    limit = observed - TIES * jnp.finfo(jnp.float32).eps * jnp.abs(observed)
    larger = (null >= limit[None]).sum(axis=0).astype(jnp.float32)
    return jnp.where(jnp.isnan(observed), jnp.nan, (1 + larger) / (1 + null.shape[0]))


def weighted_mean(weights: Float[Array, "unit"], data: Float[Array, "unit *shape"]) -> Float[Array, "*shape"]:
    """Returns the mean over units, each counted as often as its weight says."""
    flat = data.reshape(data.shape[0], -1)
    return (weights @ flat / weights.sum()).reshape(data.shape[1:])


@kernel()
def bootstrap_interval(
    data: PyTree[Shaped[AnyArray, "..."]],
    key: Key[Array, ""],
    *,
    n_unit: int,
    statistic: Callable[..., Any] = weighted_mean,
    samples: int = 1000,
    level: float = 0.95,
    together: int = 1000,
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Returns the percentile interval of a statistic over resamples of independent units.

    A resample draws `n_unit` units with replacement; the weight of a unit is how often it was drawn. The ends of the
    interval are the percentiles 100·(1 − level)/2 and 100·(1 + level)/2.
    Source: Efron 1979, "Bootstrap methods: another look at the jackknife".

    Args:
      data: arrays that the statistic takes.
      key: from `jax.random.key`; the same key gives the same resamples.
      n_unit: number of units.
      statistic: `statistic(weights, data)`, with `weights [unit]` of sum `n_unit`; the mean of `data [unit, …]` unless
        given. It is compiled for each function object, so define it once.
      samples: number of resamples.
      level: share of the resamples that are inside.
      together: resamples that are in memory at a time.

    Returns:
      Lower and upper end, in the statistic's shape and unit. Resamples whose statistic is NaN are left out.
    """
    data = jax.tree.map(jnp.asarray, data)

    def one(key: Key[Array, ""]) -> Array:
        taken = jax.random.randint(key, (n_unit,), 0, n_unit)
        return statistic(jnp.zeros(n_unit, jnp.float32).at[taken].add(1), data)

    values = _mapped(one, jax.random.split(key, samples), together)
    ends = jnp.array([50 * (1 - level), 50 * (1 + level)], values.dtype)
    low, high = jnp.nanpercentile(values, ends, axis=0)
    return low, high


def _mapped(
    function: Callable[[Key[Array, ""]], Array], keys: Key[Array, "sample"], together: int
) -> Shaped[Array, "sample *shape"]:
    """Returns the function of every key, computed for `together` keys at a time."""
    if together < 1:
        raise KernelError(f"together is the number of resamples computed at a time, 1 or more, not {together}")
    n = keys.shape[0]
    if n <= together:
        return jax.vmap(function)(keys)
    steps = -(-n // together)
    filled = keys[jnp.arange(steps * together) % n].reshape(steps, together)
    values = jax.lax.map(jax.vmap(function), filled)
    return values.reshape(steps * together, *values.shape[2:])[:n]
