"""Mean and standard deviation of a sample."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxqkv.kernels.calling import kernel
from jaxqkv.kernels.scales import largest, root
from jaxqkv.typing import AnyArray


def deviations(
    x: Float[Array, "*shape"], where: Bool[AnyArray, "*#shape"] | None = None, axis: int | None = None
) -> Float[Array, "*shape"]:
    """Returns differences from the mean, over everything or along an axis; exactly 0 if all values are the same.

    The mean of many equal float32 numbers is not always that number, so differences within the last place of the
    largest value count as 0.

    Args:
      x: any shape, any unit.
      where: the values that count; the others give 0.
      axis: axis to average over; all values have one mean unless given.
    """
    mask = jnp.broadcast_to(True if where is None else where, x.shape)
    n = jnp.maximum(mask.sum(axis=axis, keepdims=True), 1).astype(x.dtype)
    x = jnp.where(mask, x, 0)
    scale = largest(x, axis)
    # Subtract one of the values first: roundings of a fused subtraction of the mean are then no larger than the spread.
    one = jax.lax.stop_gradient(jnp.where(mask, x, -scale).max(axis=axis, keepdims=True))
    x = jnp.where(mask, x - one, 0)
    for _ in range(2):  # twice: the second time removes the rounding of the first mean
        x = jnp.where(mask, x - x.sum(axis=axis, keepdims=True) / n, 0)
    constant = jnp.abs(x).max(axis=axis, keepdims=True) <= jnp.finfo(x.dtype).eps * scale
    return jnp.where(constant, 0, x)


@kernel()
def moments(
    values: Float[AnyArray, "*shape"], where: Bool[AnyArray, "*#shape"] | None = None, *, ddof: int = 0
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns mean and standard deviation over all values, in two passes.

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
    return mean, root(squares / jnp.maximum(n - ddof, 1))
