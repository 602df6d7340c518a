"""Linear regression by least squares."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxqkv.kernels.calling import kernel
from jaxqkv.kernels.moments import deviations
from jaxqkv.kernels.scales import root, size
from jaxqkv.typing import AnyArray

# A column of which the others explain all but this share of its length is collinear with them.
COLLINEAR = 1e-5


@kernel()
def linear_regression(
    x: Float[AnyArray, "observation variable"],
    y: Float[AnyArray, "observation"],
    where: Bool[AnyArray, "observation"] | None = None,
) -> Float[Array, "coefficient"]:
    """Returns coefficients of the least-squares fit of y by the columns of x and a constant.

        y ≈ β₀ + Σ βᵢ xᵢ

    Computed by QR of the centred unit columns, which does not square their condition number as XᵀX does.

    Args:
      x: variables in columns, any unit.
      y: values to fit, any unit.
      where: the observations that count; all of them unless given. The others may hold anything, NaN too.

    Returns:
      Float32 `[variable + 1]`: the constant first, in the unit of `y`, then the slopes, in the unit of `y` per unit of
      the variable. All NaN if the observations do not determine them: too few, or a constant or collinear column.
      Their derivatives are then 0 or NaN.
    """
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    mask = jnp.broadcast_to(True if where is None else where, y.shape)
    columns = jax.vmap(deviations, in_axes=(1, None), out_axes=1)(x, mask)
    scale = size(columns, axis=0)
    scaled = columns / scale
    length = root((scaled**2).sum(axis=0))
    q, r = jnp.linalg.qr(scaled / jnp.where(length > 0, length, 1)[None])
    target = deviations(y, mask)
    slopes = jax.scipy.linalg.solve_triangular(r, q.T @ target) / (scale[0] * length)
    determined = (jnp.abs(jnp.diagonal(r)) > COLLINEAR).all() & (mask.sum() > x.shape[1])
    n = jnp.maximum(mask.sum(), 1).astype(y.dtype)
    x_mean, y_mean = jnp.where(mask[:, None], x, 0).sum(axis=0) / n, jnp.where(mask, y, 0).sum() / n
    beta = jnp.concatenate([(y_mean - x_mean @ slopes)[None], slopes])
    return jnp.where(determined, beta, jnp.nan)
