"""Pearson's correlation of two samples."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxqkv.activations import AnyArray
from jaxqkv.devices import jit


@jit
def pearson(
    x: Float[AnyArray, "*shape"],
    y: Float[AnyArray, "*shape"],
    where: Bool[AnyArray, "*#shape"] | None = None,
) -> Float[Array, ""]:
    """Pearson's correlation coefficient of paired values.

        r = Σ(x − x̄)(y − ȳ) / √(Σ(x − x̄)² · Σ(y − ȳ)²)

    Args:
      x, y: paired values, any shape, any unit.
      where: the pairs that count; all of them unless given. The others may hold anything, NaN too.

    Returns:
      A float32 scalar in −1…1; NaN where it is undefined: x or y constant, or fewer than two pairs.
    """
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    mask = jnp.broadcast_to(True if where is None else where, x.shape)
    x, y = _centred(x, mask), _centred(y, mask)
    r = (x * y).sum() / jnp.sqrt((x * x).sum() * (y * y).sum())
    return jnp.clip(r, -1, 1)


def _centred(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Differences from the mean, scaled to at most 1 so that no square overflows; NaN for a constant."""
    n = jnp.maximum(mask.sum(), 1).astype(x.dtype)
    x = jnp.where(mask, x, 0)
    largest = jnp.abs(x).max()
    # Twice: the rounding of the mean itself, the same in every difference, drops out.
    for _ in range(2):
        x = jnp.where(mask, x - x.sum() / n, 0)
    spread = jnp.abs(x).max()
    return x / jnp.where(spread > jnp.finfo(x.dtype).eps * largest, spread, jnp.nan)
