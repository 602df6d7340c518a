"""Mean and standard deviation of a sample."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxqkv.activations import AnyArray
from jaxqkv.devices import jit


@jit(static_argnames="ddof")
def moments(
    values: Float[AnyArray, "*shape"], where: Bool[AnyArray, "*#shape"] | None = None, *, ddof: int = 0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean and standard deviation over all values, in two passes.

        mean = Σx / n,    std = √(Σ(x − mean)² / (n − ddof))

    Args:
      values: any shape, any unit.
      where: the values that count; all of them unless given.
      ddof: 0 for the population's standard deviation, 1 for the sample's.

    Returns:
      Two float32 scalars in the unit of `values`; 0 and 0 for an empty sample.
    """
    values = jnp.asarray(values, jnp.float32)
    mask = jnp.broadcast_to(True if where is None else where, values.shape)
    n = mask.sum().astype(values.dtype)
    mean = jnp.where(mask, values, 0).sum() / jnp.maximum(n, 1)
    squares = jnp.where(mask, (values - mean) ** 2, 0).sum()
    return mean, jnp.sqrt(squares / jnp.maximum(n - ddof, 1))
