"""Scales that arrays are divided by, so that no square overflows or vanishes; roots and ratios with finite derivatives.

Derivatives treat the scales as constants. JAX's derivative of a maximum divides by the number of values equal to it;
that is 0 if a compiled program computes the values a second time and rounds them differently.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def largest(x: Float[Array, "..."], axis: int | tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """Returns max |x| over the axes, which stay as axes of length 1; derivatives treat it as a constant."""
    return jax.lax.stop_gradient(jnp.abs(x).max(axis=axis, keepdims=True, initial=0))


def size(x: Float[Array, "..."], axis: int | tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """Returns `largest`, or 1 if that is 0 or NaN, so that |x / size| ≤ 1; a scalar if no axis is given."""
    most = largest(x, axis)
    return jnp.where(most > 0, most, 1).reshape(() if axis is None else most.shape)


def power_of_two(x: Float[Array, "..."], axis: int | tuple[int, ...]) -> Float[Array, "..."]:
    """Returns the largest power of two that is no larger than max |x| over the axes, which stay as axes of length 1.

    Division by it is exact. It is 1 for zeros, and counts as a constant: it is for what does not depend on it.
    """
    most = largest(x, axis)
    power = jnp.ldexp(jnp.ones((), x.dtype), jnp.frexp(most)[1] - 1)
    return jnp.where(most > 0, power, 1).astype(x.dtype)


def root(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns √x, whose derivative at 0 is 0 instead of ∞."""
    zero = x == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def over_root(x: Float[Array, "*shape"], y: Float[Array, "*#shape"]) -> Float[Array, "*shape"]:
    """Returns x / √y; NaN where y is 0, with derivatives of 0."""
    zero = y == 0
    return jnp.where(zero, jnp.nan, x / jnp.sqrt(jnp.where(zero, 1, y)))
