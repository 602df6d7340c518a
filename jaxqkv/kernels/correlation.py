"""Pearson's correlation of two samples."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxqkv.kernels.calling import kernel
from jaxqkv.kernels.moments import deviations
from jaxqkv.typing import AnyArray


@kernel()
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
    # Scaled to at most 1, so that no square overflows; 0/0, and so NaN, for a constant.
    x, y = (d / jnp.abs(d).max() for d in (deviations(x, mask), deviations(y, mask)))
    r = (x * y).sum() / jnp.sqrt((x * x).sum() * (y * y).sum())
    return jnp.clip(r, -1, 1)
