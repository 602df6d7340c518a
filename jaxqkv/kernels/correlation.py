"""Correlations: of two samples, and of two similarity matrices."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxqkv.kernels.calling import kernel
from jaxqkv.kernels.moments import deviations
from jaxqkv.kernels.scales import over_root, size
from jaxqkv.typing import AnyArray


@kernel()
def pearson(
    x: Float[AnyArray, "*shape"],
    y: Float[AnyArray, "*shape"],
    where: Bool[AnyArray, "*#shape"] | None = None,
) -> Float[Array, ""]:
    """Returns Pearson's correlation coefficient of paired values.

        r = Σ(x − x̄)(y − ȳ) / √(Σ(x − x̄)² · Σ(y − ȳ)²)

    Args:
      x, y: paired values, any shape, any unit.
      where: the pairs that count; all of them unless given. The others may hold anything, NaN too.

    Returns:
      A float32 scalar in −1…1; NaN where it is undefined: x or y constant, or fewer than two pairs.
    """
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    mask = jnp.broadcast_to(True if where is None else where, x.shape)
    # Scaled to at most 1, so that no square overflows.
    x, y = (d / size(d) for d in (deviations(x, mask), deviations(y, mask)))
    r = over_root((x * y).sum(), (x * x).sum() * (y * y).sum())
    return jnp.clip(r, -1, 1)


@kernel()
def representational_similarity(
    x: Float[AnyArray, "item item"],
    y: Float[AnyArray, "item item"],
    weights: Float[AnyArray, "item"] | None = None,
) -> Float[Array, ""]:
    """Returns Pearson's correlation of the upper triangles of two similarity matrices, without their diagonals.

        r = Σ w (x − x̄)(y − ȳ) / √(Σ w (x − x̄)² · Σ w (y − ȳ)²),    over pairs i < j, with w = wᵢ wⱼ

    Source: Kriegeskorte, Mur and Bandettini 2008, "Representational similarity analysis".

    Args:
      x, y: symmetric similarities of the same items.
      weights: how often each item occurs in a resample of the items; once unless given. Pairs of two copies of an
        item do not count.

    Returns:
      A float32 scalar in −1…1; NaN where it is undefined.
    """
    one, other = np.triu_indices(x.shape[0], 1)
    copies = jnp.ones(x.shape[0], jnp.float32) if weights is None else jnp.asarray(weights, jnp.float32)
    x, y = (deviations(jnp.asarray(each, jnp.float32)[one, other]) for each in (x, y))
    # Scaled to at most 1, so that no square overflows.
    x, y = (each / size(each) for each in (x, y))
    # The only product with weights, so that many resamples are one matrix product.
    terms = jnp.stack([jnp.ones_like(x), x, y, x * x, x * y, y * y], axis=1)
    n, sx, sy, sxx, sxy, syy = (copies[one] * copies[other]) @ terms
    squares = (sxx - sx * sx / n) * (syy - sy * sy / n)
    r = over_root(sxy - sx * sy / n, jnp.maximum(squares, 0))
    return jnp.clip(r, -1, 1)


@kernel()
def fisher_z(r: Float[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """Returns Fisher's z of correlations or cosines: artanh(r) = ½ ln((1 + r) / (1 − r)); float32, without a unit.

    Source: Fisher 1915, "Frequency distribution of the values of the correlation coefficient".

    Args:
      r: −1…1. ±1, and values that rounding puts beyond, count as the nearest float32 number inside, with z = ±8.66.
    """
    largest = jnp.nextafter(jnp.float32(1), jnp.float32(0))
    return jnp.arctanh(jnp.clip(jnp.asarray(r, jnp.float32), -largest, largest))
