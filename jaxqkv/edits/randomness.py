"""Random numbers for edits, which depend only on the key, the layer and the position among a text's own tokens.

Padding and other texts of the batch do not change them. All texts of a batch have the same numbers at the same
positions.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxqkv.architectures.sites import Site
from jaxqkv.errors import JaxqkvError

# A function from a key and a shape to an array.
Draw = Callable[[Any, tuple[int, ...]], Any]


def as_key(key: Any) -> Any:
    """Returns a JAX key, given a seed or a key of either of JAX's kinds.

    Raises:
      JaxqkvError: for anything else.
    """
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    if isinstance(key, jax.Array | np.ndarray) and key.dtype == np.uint32 and key.ndim == 1:
        return jax.random.wrap_key_data(jnp.asarray(key))
    number: Any = key if isinstance(key, jax.Array) else np.asarray(key)
    if number.ndim or not jnp.issubdtype(number.dtype, jnp.integer):
        raise JaxqkvError(f"the key of an edit is a seed, a whole number, or from jax.random.key, not {key!r}")
    return jax.random.key(key)


def bits(key: Any, shape: tuple[int, ...]) -> Any:
    """Returns random bits."""
    return jax.random.bits(key, shape)


def normal(key: Any, shape: tuple[int, ...]) -> Any:
    """Returns standard normal numbers."""
    return jax.random.normal(key, shape)


def by_place(draw: Draw, key: Any, site: Site, value: Any, has_keys: bool) -> Any:
    """Returns a random number for each element of a layer's value.

    Args:
      draw: `bits` or `normal`.
      key: key of the edit; the layer is folded in.
      site: site of the value.
      value: `[batch, head, pos, head_dim]`, `[batch, pos, embed]` or, with keys, `[batch, head, query, key]`.
      has_keys: whether the last axis is positions too.
    """
    key = jax.random.fold_in(key, site.layer)
    places = jnp.arange(value.shape[-2])
    own = site.positions
    keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(places)
    if has_keys:
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        table = jax.vmap(jax.vmap(lambda each: draw(each, value.shape[1:2])))(fold(keys, places))
        drawn = jnp.moveaxis(table[own[:, :, None], own[:, None, :]], -1, 1)
    else:
        table = jax.vmap(lambda each: draw(each, (*value.shape[1:-2], value.shape[-1])))(keys)
        drawn = table[own] if value.ndim == 3 else jnp.moveaxis(table[own], 1, 2)
    return drawn if drawn.dtype == jnp.uint32 else drawn.astype(value.dtype)


def shuffled(value: Any, inside: Any, bits: Any) -> Any:
    """Returns values with those inside a mask shuffled along the last axis, in the order of their bits.

    Outside the mask the values mean nothing.
    """
    indices = jax.lax.broadcasted_iota(jnp.int32, value.shape, value.ndim - 1)
    outside = (~inside).astype(jnp.int32)
    *_, order = jax.lax.sort((outside, bits, indices), num_keys=2)
    rank = jnp.maximum(jnp.cumsum(inside, axis=-1, dtype=jnp.int32) - 1, 0)
    return jnp.take_along_axis(value, jnp.take_along_axis(order, rank, axis=-1), axis=-1)
