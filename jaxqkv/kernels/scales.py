"""Powers of two that bring arrays of any magnitude to about 1, so that no square overflows or vanishes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def power_of_two(x: Float[Array, "..."], axis: int | tuple[int, ...]) -> Float[Array, "..."]:
    """Returns the largest power of two that is no larger than max |x| over the axes, which stay as axes of length 1.

    Division by it is exact. It is 1 for zeros, and counts as a constant: it is for what does not depend on it.
    """
    largest = jax.lax.stop_gradient(jnp.abs(x).max(axis=axis, keepdims=True, initial=0))
    power = jnp.ldexp(jnp.ones((), x.dtype), jnp.frexp(largest)[1] - 1)
    return jnp.where(largest > 0, power, 1).astype(x.dtype)
