"""Divergences between distributions.

Source: study prediction-divergence (Cohen, 50 ML projects to understand LLMs, project 37).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from jaxqkv.kernels.calling import kernel
from jaxqkv.typing import AnyArray


@kernel()
def jensen_shannon(p: Shaped[AnyArray, "bin"], q: Shaped[AnyArray, "bin"]) -> Float[Array, ""]:
    """Returns Jensen and Shannon's divergence of two histograms, in nats; in 0…ln 2.

        JS = ½ Σ p ln(p / m) + ½ Σ q ln(q / m),    m = (p + q) / 2

    The square of `scipy.spatial.distance.jensenshannon`. Computed from d = (p − q) / (p + q) in each bin, so that no
    bin's term is negative and nearly equal distributions lose few digits.
    Source: Lin 1991, "Divergence measures based on the Shannon entropy".

    Args:
      p, q: non-negative counts or probabilities of the same bins; each is divided by its sum.

    Returns:
      A float32 scalar; NaN if p or q is empty.
    """
    p, q = (jnp.asarray(each, jnp.float32) for each in (p, q))
    return _jensen_shannon(p / p.sum(), q / q.sum())


def _jensen_shannon(p: Float[Array, "*#bins"], q: Float[Array, "*#bins"]) -> Float[Array, "..."]:
    """Returns the divergence of probabilities along the last axis; the other axes broadcast."""
    total = p + q
    d = (p - q) / jnp.where(total > 0, total, 1)

    def part(d: Array) -> Array:
        """Returns (1 + d) ln(1 + d), 0 at −1."""
        return jnp.where(d > -1, (1 + d) * jnp.log1p(jnp.where(d > -1, d, 0)), 0)

    bins = total * jnp.maximum(part(d) + part(-d), 0)
    return jnp.where(jnp.isnan(total).any(axis=-1), jnp.nan, bins.sum(axis=-1) / 4)


@kernel()
def pattern_divergence(
    pattern: Float[AnyArray, "head query key"],
    other: Float[AnyArray, "other_head query key"],
    where: Bool[AnyArray, "query"] | None = None,
) -> Float[Array, "head other_head"]:
    """Returns Jensen and Shannon's divergence of every pair of heads' patterns, mean over queries, in nats.

        mean over queries of ½ Σ p ln(p / m) + ½ Σ q ln(q / m),    m = (p + q) / 2

    In 0…ln 2. One head is compared with all others at a time, so that [head, other_head, query, key] is never in
    memory.

    Args:
      pattern, other: probabilities of every query's keys.
      where: the queries that count; all of them unless given. A causal model's first query has one key.

    Returns:
      Float32; NaN if no query counts.
    """
    pattern, other = (jnp.asarray(each, jnp.float32) for each in (pattern, other))
    counted = jnp.ones(pattern.shape[1], bool) if where is None else jnp.asarray(where)

    def one(rows: Float[Array, "query key"]) -> Float[Array, "other_head"]:
        divergence = _jensen_shannon(rows[None], other)
        return jnp.where(counted[None], divergence, 0).sum(axis=1) / counted.sum().astype(jnp.float32)

    return jax.lax.map(one, pattern)
