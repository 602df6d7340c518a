"""Statistics of attention by query without a [query, key] array: keys are taken a block at a time.

Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Dao et al. 2022, "FlashAttention".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxqkv.errors import KernelError
from jaxqkv.kernels.calling import kernel
from jaxqkv.typing import AnyArray

# Queries and keys in a block; its scores take 64 kB.
BLOCK = 128


class AttentionStatistics(NamedTuple):
    """Statistics of what each query attends to; `.mean(axis=1)` is the mean over heads.

    Attributes:
      logsumexp: ln Σ exp(score) over the visible keys; −∞ if there is none.
      entropy: −Σ a ln a of the pattern a, in nats.
      largest: the largest weight of the pattern.
      distance: Σ a |query − key|, in positions.
      mass: Σ a over the given keys.
    """

    logsumexp: Float[Array, "batch head query"]
    entropy: Float[Array, "batch head query"]
    largest: Float[Array, "batch head query"]
    distance: Float[Array, "batch head query"]
    mass: Float[Array, "batch head query"]


class _Sums(NamedTuple):
    """Sums over the keys so far, relative to the largest score so far: w = exp(score − largest)."""

    largest: Float[Array, "query"]
    total: Float[Array, "query"]  # Σ w
    tilted: Float[Array, "query"]  # Σ w (score − largest)
    distance: Float[Array, "query"]  # Σ w |query − key|
    mass: Float[Array, "query"]  # Σ w over the keys asked for


class _Keys(NamedTuple):
    """Keys, or a block of them."""

    k: Float[Array, "key head_dim"]
    visible: Bool[Array, "key"]
    asked_for: Float[Array, "key"]
    place: Int[Array, "key"]


@kernel()
def attention_statistics(
    q: Float[AnyArray, "batch head pos head_dim"],
    k: Float[AnyArray, "batch head pos head_dim"],
    mask: Bool[AnyArray, "batch pos"],
    keys: Bool[AnyArray, "batch pos"] | None = None,
    scale: jax.typing.ArrayLike | None = None,
    *,
    causal: bool,
) -> AttentionStatistics:
    """Returns statistics of every query's softmax(q·k · scale) over the visible keys, without the pattern.

    The sums Σ exp(s − m), Σ (s − m) exp(s − m) and so on are relative to the largest score m so far, and are corrected
    by exp(m − m′) when a later block has a larger score m′. Then
    entropy = ln Σ exp(s − m) − Σ (s − m) exp(s − m) / Σ exp(s − m). Blocks of later keys are skipped if causal.

    Args:
      q, k: of one layer.
      mask: True at real tokens.
      keys: the keys that `mass` counts; the first real token of each text unless given.
      scale: of q·k; 1/√head_dim unless given.
      causal: whether later keys are hidden from a query.

    Returns:
      Float32. For a query that sees no key, logsumexp is −∞ and the others are 0. For one that sees a score of NaN or
      +∞ all are NaN, but for a logsumexp of +∞.
    """
    q, k = (jnp.asarray(each, jnp.float32) for each in (q, k))
    batch, n_head, pos, head_dim = q.shape
    if not pos:
        raise KernelError("a text has at least one token")
    if keys is None:
        keys = jnp.arange(pos)[None] == jnp.argmax(mask, axis=1, keepdims=True)
    scale = jnp.asarray(head_dim**-0.5 if scale is None else scale, jnp.float32)
    block = min(BLOCK, pos)
    more = -pos % block
    place = jnp.arange(pos + more, dtype=jnp.int32)

    def one(q: Array, k: Array, visible: Array, asked_for: Array) -> AttentionStatistics:
        """Returns the statistics of one head of one text."""
        q, k = (jnp.pad(each, ((0, more), (0, 0))) for each in (q * scale, k))
        keys = _Keys(k, jnp.pad(visible, (0, more)), jnp.pad(asked_for, (0, more)), place)
        blocks = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), keys)
        queries = q.reshape(-1, block, head_dim), blocks.place
        found = jax.lax.map(lambda each: _of_queries(each[0], each[1], blocks, causal), queries)
        return jax.tree.map(lambda x: x.reshape(-1)[:pos], found)

    of_heads = [x.reshape(-1, pos, head_dim) for x in (q, k)]
    of_texts = [jnp.repeat(jnp.asarray(x), n_head, axis=0) for x in (mask, jnp.asarray(keys, jnp.float32))]
    found = jax.lax.platform_dependent(
        *of_heads,
        *of_texts,
        cpu=lambda *arrays: jax.lax.map(lambda x: one(*x), arrays),  # one at a time fits into the cache
        default=jax.vmap(one),
    )
    return AttentionStatistics(*(x.reshape(batch, n_head, pos) for x in found))


def _of_queries(
    q: Float[Array, "query head_dim"], place: Int[Array, "query"], blocks: _Keys, causal: bool
) -> AttentionStatistics:
    """Returns the statistics of a block of queries."""

    def add(sums: _Sums, keys: _Keys) -> _Sums:
        visible = keys.visible[None, :]
        if causal:
            visible = visible & (keys.place[None, :] <= place[:, None])
        scores = q @ keys.k.T
        largest = jnp.maximum(sums.largest, jnp.where(visible, scores, -jnp.inf).max(axis=1))
        finite = jnp.where(jnp.isfinite(largest), largest, 0)
        below = jnp.where(visible, scores - finite[:, None], 0)
        weight = jnp.where(visible, jnp.exp(below), 0)
        seen = jnp.isfinite(sums.largest)
        moved = jnp.where(seen, sums.largest - finite, 0)
        shrink = jnp.where(seen, jnp.exp(moved), 0)
        distance = jnp.abs(place[:, None] - keys.place[None, :]).astype(weight.dtype)
        return _Sums(
            largest,
            sums.total * shrink + weight.sum(axis=1),
            (sums.tilted + sums.total * moved) * shrink + (weight * below).sum(axis=1),
            sums.distance * shrink + (weight * distance).sum(axis=1),
            sums.mass * shrink + weight @ keys.asked_for,
        )

    def step(sums: _Sums, keys: _Keys) -> tuple[_Sums, None]:
        if not causal:
            return add(sums, keys), None
        return jax.lax.cond(keys.place[0] > place[-1], lambda sums, keys: sums, add, sums, keys), None

    zero = jnp.zeros(q.shape[0], jnp.float32)
    sums, _ = jax.lax.scan(step, _Sums(zero - np.inf, zero, zero, zero, zero), blocks)
    sees = sums.total != 0
    # Of a score of +∞ the sums may be infinite.
    total = jnp.where(sees, jnp.where(jnp.isposinf(sums.largest), jnp.nan, sums.total), 1)
    return AttentionStatistics(
        logsumexp=jnp.where(
            jnp.isposinf(sums.largest), jnp.inf, jnp.where(sees, sums.largest + jnp.log(total), -jnp.inf)
        ),
        entropy=jnp.where(sees, jnp.log(total) - sums.tilted / total, 0),
        largest=jnp.where(sees, 1 / total, 0),
        distance=sums.distance / total,
        mass=sums.mass / total,
    )
