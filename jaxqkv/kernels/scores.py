"""Samples of attention scores and patterns, as values with a mask of those that count.

A mask instead of a selection keeps shapes static, so that the kernels jit and vmap. Pads never count.

Source: study attention-scores (Cohen, 50 ML projects to understand LLMs, project 35).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxqkv.kernels.calling import kernel
from jaxqkv.typing import AnyArray


class Sample(NamedTuple):
    """Values, and which of them count; the mask broadcasts against the values."""

    values: Float[Array, "..."]
    where: Bool[Array, "..."]


@kernel()
def first_and_last(mask: Bool[AnyArray, "batch pos"]) -> tuple[Int[Array, " batch"], Int[Array, " batch"]]:
    """Returns positions of each sequence's first and last real token, from 0; pads may be on either side."""
    pos = mask.shape[-1]
    return jnp.argmax(mask, axis=-1), pos - 1 - jnp.argmax(mask[:, ::-1], axis=-1)


@kernel()
def last_token_scores(
    q: Float[AnyArray, "batch head pos head_dim"],
    k: Float[AnyArray, "batch head pos head_dim"],
    mask: Bool[AnyArray, "batch pos"],
) -> tuple[Sample, Sample]:
    """Returns scores of the last token's Q in every head against the K of every head, within and across heads.

        scores[b, h, g, p] = q[b, h, last] · k[b, g, p] / √head_dim

    at all real positions p but the first and the last, in one product.

    Args:
      q, k: of one layer.
      mask: True at real tokens.

    Returns:
      Two samples over the same `[batch, query_head, key_head, pos]` scores: h = g and h ≠ g.
    """
    n_head, head_dim = q.shape[1], q.shape[-1]
    first, last = first_and_last(mask)
    last_q = jnp.take_along_axis(q, last[:, None, None, None], axis=2)[:, :, 0]
    scores = jnp.einsum("bhd,bgpd->bhgp", last_q, k) * head_dim**-0.5
    position = jnp.arange(mask.shape[-1])[None]
    earlier = mask & (position != first[:, None]) & (position != last[:, None])
    same = jnp.eye(n_head, dtype=bool)[None, :, :, None]
    earlier = earlier[:, None, None]
    return Sample(scores, same & earlier), Sample(scores, ~same & earlier)


@kernel()
def causal_samples(
    pattern: Float[AnyArray, "batch head query key"], mask: Bool[AnyArray, "batch pos"]
) -> tuple[Sample, Sample, Sample]:
    """Returns three samples of a causal pattern, over all heads: probabilities in 0…1.

    Args:
      pattern: of one layer, causal.
      mask: True at real tokens.

    Returns:
      final to previous: from the last token to every earlier one, the first included;
      self, others: from every token but the first to itself; self, first: from the first to itself.
      All `[batch, head, pos]`.
    """
    first, last = first_and_last(mask)
    position = jnp.arange(mask.shape[-1])[None]
    final = jnp.take_along_axis(pattern, last[:, None, None, None], axis=2)[:, :, 0]
    diagonal = jnp.diagonal(pattern, axis1=-2, axis2=-1)
    is_first = position == first[:, None]
    mask = jnp.asarray(mask)
    return (
        Sample(final, (mask & (position != last[:, None]))[:, None]),
        Sample(diagonal, (mask & ~is_first)[:, None]),
        Sample(diagonal, (mask & is_first)[:, None]),
    )
