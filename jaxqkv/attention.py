"""Attention as pure functions on arrays, each a line of the definition.

Shapes are those of the glossary in `activations.py`; leading axes are free, so the functions work
on one head, one sequence or a batch. Source: Vaswani et al. 2017, "Attention is all you need", §3.2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxqkv.activations import AnyArray


def split_heads(x: Float[AnyArray, "*batch pos embed"], n_head: int) -> Float[Array, "*batch head pos head_dim"]:
    """Cuts the width in `n_head` consecutive pieces: head h is columns h·head_dim … (h+1)·head_dim."""
    *batch, pos, embed = x.shape
    return jnp.swapaxes(x.reshape(*batch, pos, n_head, embed // n_head), -3, -2)


def merge_heads(x: Float[AnyArray, "*batch head pos head_dim"]) -> Float[Array, "*batch pos embed"]:
    """The inverse of `split_heads`."""
    *batch, head, pos, head_dim = x.shape
    return jnp.swapaxes(x, -3, -2).reshape(*batch, pos, head * head_dim)


def scaled_scores(
    q: Float[AnyArray, "*batch query head_dim"],
    k: Float[AnyArray, "*batch key head_dim"],
    scale: float | Float[Array, ""] | None = None,
) -> Float[Array, "*batch query key"]:
    """QKᵀ · scale, with scale 1/√head_dim unless given; no mask."""
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return jnp.einsum("...qd,...kd->...qk", q, k) * scale


def visible_keys(mask: Bool[AnyArray, "*batch pos"], causal: bool) -> Bool[Array, "*batch query key"]:
    """Which keys a query may see: real tokens, and no later ones if `causal`."""
    pos = mask.shape[-1]
    visible = jnp.broadcast_to(mask[..., None, :], (*mask.shape, pos))
    return jnp.tril(visible) if causal else visible


def attention_pattern(
    scores: Float[AnyArray, "*batch query key"], visible: Bool[AnyArray, "*#batch query key"]
) -> Float[Array, "*batch query key"]:
    """Softmax over the visible keys; exactly 0 elsewhere, and in a row that sees nothing.

    A boolean mask, not a large negative number, so that no real score can pass for a masked one.
    """
    masked = jnp.where(visible, scores, -jnp.inf)
    largest = jax.lax.stop_gradient(masked.max(-1, keepdims=True))
    weights = jnp.exp(masked - jnp.where(jnp.isfinite(largest), largest, 0))
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def mix(
    pattern: Float[AnyArray, "*batch query key"], v: Float[AnyArray, "*batch key head_dim"]
) -> Float[Array, "*batch query head_dim"]:
    """z = pattern · V: the values, averaged with the weights of the pattern."""
    return jnp.einsum("...qk,...kd->...qd", pattern, v)
