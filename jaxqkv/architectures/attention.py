"""Attention as pure functions on arrays, one for each line of the definition.

Axes are named as in `activations.py`. Leading axes are free, except in `attend`, so that the functions work on one
head, one sequence or a batch. Source: Vaswani et al. 2017, "Attention is all you need", §3.2.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxqkv.architectures.sites import UNEDITED, Editing
from jaxqkv.typing import AnyArray

# The factor that QKᵀ is multiplied by.
Scale = float | Float[AnyArray, ""] | np.floating[Any]

# Scores a head from which on a CPU takes one head at a time, so that they stay in the cache.
# Measured on two cores, z of 8·16 heads: 166 → 97 ms at 512·512 scores a head; 3.8 → 6.1 ms at 24·24.
SLICED_FROM = 128 * 128


class Attended(NamedTuple):
    """Scores, pattern and z of the same heads."""

    scores: Float[Array, "batch head query key"]
    pattern: Float[Array, "batch head query key"]
    z: Float[Array, "batch head query head_dim"]


def split_heads(x: Float[AnyArray, "*batch pos embed"], n_head: int) -> Float[Array, "*batch head pos head_dim"]:
    """Cuts the width into `n_head` consecutive pieces: head h is columns h·head_dim … (h+1)·head_dim − 1.

    Raises:
      TypeError, ValueError: from JAX or NumPy, if the width is not a multiple of `n_head`.
    """
    *batch, pos, embed = x.shape
    return jnp.swapaxes(x.reshape(*batch, pos, n_head, embed // n_head), -3, -2)


def merge_heads(x: Float[AnyArray, "*batch head pos head_dim"]) -> Float[Array, "*batch pos embed"]:
    """Puts heads side by side again: the inverse of `split_heads`."""
    *batch, head, pos, head_dim = x.shape
    return jnp.swapaxes(x, -3, -2).reshape(*batch, pos, head * head_dim)


def scaled_scores(
    q: Float[AnyArray, "*batch query head_dim"],
    k: Float[AnyArray, "*batch key head_dim"],
    scale: Scale | None = None,
) -> Float[Array, "*batch query key"]:
    """Returns QKᵀ · scale, with scale 1/√head_dim unless given; nothing is masked.

    Source: Vaswani et al. 2017, equation 1.
    """
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return jnp.einsum("...qd,...kd->...qk", q, k) * scale


def visible_keys(mask: Bool[AnyArray, "*batch pos"], causal: bool) -> Bool[Array, "*batch query key"]:
    """Returns which keys a query may see: real tokens, and no later ones if `causal`.

    Args:
      mask: True at real tokens.
      causal: whether later keys are hidden, as in GPT-2.
    """
    pos = mask.shape[-1]
    visible = jnp.broadcast_to(mask[..., None, :], (*mask.shape, pos))
    return jnp.tril(visible) if causal else visible


def attention_pattern(
    scores: Float[AnyArray, "*batch query key"], visible: Bool[AnyArray, "*#batch query key"]
) -> Float[Array, "*batch query key"]:
    """Returns the softmax over the visible keys: rows of sum 1, 0 at other keys and in rows that see no key.

    The mask is boolean, not a large negative number, so that no real score can be mistaken for a masked one.
    """
    masked = jnp.where(visible, scores, -jnp.inf)
    largest = jax.lax.stop_gradient(masked.max(-1, keepdims=True))
    weights = jnp.exp(masked - jnp.where(jnp.isfinite(largest), largest, 0))
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def mix(
    pattern: Float[AnyArray, "*batch query key"], v: Float[AnyArray, "*batch key head_dim"]
) -> Float[Array, "*batch query head_dim"]:
    """Returns z = pattern · V: the values, averaged with the weights of the pattern."""
    return jnp.einsum("...qk,...kd->...qd", pattern, v)


def score_dtype(dtype: np.dtype[Any], upcast: bool) -> np.dtype[Any]:
    """Returns the dtype of scores and softmax: that of the arithmetic, but at least float32 with `upcast`."""
    return np.dtype(np.float32) if upcast and dtype.itemsize < 4 else dtype


def attend(
    q: Float[AnyArray, "batch head query head_dim"],
    k: Float[AnyArray, "batch head key head_dim"],
    v: Float[AnyArray, "batch head key head_dim"],
    visible: Bool[AnyArray, "batch query key"],
    scale: Scale | None = None,
    sharded: bool = False,
    upcast: bool = False,
    edit: Editing = UNEDITED,
) -> Attended:
    """Returns scores, pattern and z of every head; under `jit`, those that are not used are not computed.

    On a CPU large heads are taken one after another; elsewhere, and if heads or sequences are split over devices
    (`sharded`), all at once. The numbers are the same.

    Args:
      q, k, v: of one layer.
      visible: from `visible_keys`; the same for all heads.
      scale: factor of QKᵀ; 1/√head_dim unless given.
      sharded: whether the arrays are split over devices.
      upcast: whether to compute scores and softmax in at least float32; the pattern then has v's dtype again.
      edit: called with each field as it is computed.
    """
    whole = functools.partial(attend_whole, scale=scale, upcast=upcast, edit=edit)
    if sharded or q.shape[-2] * k.shape[-2] < SLICED_FROM:
        return whole(q, k, v, visible)
    sliced = functools.partial(attend_sliced, scale=scale, upcast=upcast, edit=edit)
    attended: Attended = jax.lax.platform_dependent(q, k, v, jnp.asarray(visible), cpu=sliced, default=whole)
    return attended


def attend_whole(
    q: Float[AnyArray, "batch head query head_dim"],
    k: Float[AnyArray, "batch head key head_dim"],
    v: Float[AnyArray, "batch head key head_dim"],
    visible: Bool[AnyArray, "batch query key"],
    scale: Scale | None = None,
    upcast: bool = False,
    edit: Editing = UNEDITED,
) -> Attended:
    """Computes `attend` for all heads at once; arguments as for `attend`."""
    scores = edit("scores", _scores(q, k, scale, upcast))
    pattern = edit("pattern", attention_pattern(scores, visible[:, None]).astype(v.dtype))
    return Attended(scores, pattern, edit("z", mix(pattern, v)))


def attend_sliced(
    q: Float[AnyArray, "batch head query head_dim"],
    k: Float[AnyArray, "batch head key head_dim"],
    v: Float[AnyArray, "batch head key head_dim"],
    visible: Bool[AnyArray, "batch query key"],
    scale: Scale | None = None,
    upcast: bool = False,
    edit: Editing = UNEDITED,
) -> Attended:
    """Computes `attend` one head of one sequence at a time, so that its scores fit in the processor's cache.

    Arguments as for `attend`. An edit of scores or pattern gets those of all heads, which are then stored.
    """
    batch, n_head = q.shape[:2]
    visible = jnp.asarray(visible)

    def each(function: Callable[..., Any], *arrays: AnyArray) -> Any:
        """Returns `function(index, *arrays)` for every head of every sequence."""
        heads = (x.reshape(batch * n_head, *x.shape[2:]) for x in arrays)
        # When differentiated, a head's scores are recomputed instead of being stored.
        one = jax.checkpoint(lambda slice_: function(*slice_))
        sliced = jax.lax.map(one, (jnp.arange(batch * n_head), *heads))
        return jax.tree.map(lambda x: x.reshape(batch, n_head, *x.shape[1:]), sliced)

    def scores_of(index: Array, q: Array, k: Array) -> Array:
        return _scores(q, k, scale, upcast)

    def pattern_of(index: Array, scores: Array) -> Array:
        return attention_pattern(scores, visible[index // n_head]).astype(v.dtype)

    def attended(index: Array, q: Array, k: Array, v: Array) -> Attended:
        pattern = pattern_of(index, scores := scores_of(index, q, k))
        return Attended(scores, pattern, mix(pattern, v))

    if "scores" in edit or "pattern" in edit:
        scores = edit("scores", each(scores_of, q, k))
        pattern = edit("pattern", each(pattern_of, scores))
        return Attended(scores, pattern, edit("z", each(lambda index, pattern, v: mix(pattern, v), pattern, v)))
    together = each(attended, q, k, v)
    return together._replace(z=edit("z", together.z))


def _scores(
    q: Float[AnyArray, "*heads query head_dim"],
    k: Float[AnyArray, "*heads key head_dim"],
    scale: Scale | None,
    upcast: bool,
) -> Float[Array, "*heads query key"]:
    """Returns the scores of one or more heads, computed in `score_dtype`."""
    dtype = score_dtype(q.dtype, upcast)
    return scaled_scores(q.astype(dtype), k.astype(dtype), scale)
