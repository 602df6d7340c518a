"""Statistics of weight matrices: shape of the distribution, distance from a normal one, spectrum.

Source: study weight-tour (Exploring Transformer Weights).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxqkv.kernels.calling import kernel
from jaxqkv.kernels.moments import deviations
from jaxqkv.kernels.scales import largest, root, size
from jaxqkv.typing import AnyArray

# Number of cells of equal probability; the Kolmogorov–Smirnov distance is exact to half a cell.
KS_CELLS = 1 << 19


class DistributionShape(NamedTuple):
    """Moments of a sample: mean and standard deviation in its unit, skewness and excess kurtosis without a unit."""

    mean: Float[Array, ""]
    std: Float[Array, ""]
    skewness: Float[Array, ""]
    kurtosis: Float[Array, ""]


@kernel()
def distribution_shape(values: Float[AnyArray, "*shape"]) -> DistributionShape:
    """Returns mean, population standard deviation, skewness and excess kurtosis, by central moments.

        m k = Σ(x − mean)ᵏ / n,    skewness = m₃ / m₂^1.5,    kurtosis = m₄ / m₂² − 3

    As `scipy.stats.skew` and `scipy.stats.kurtosis` with their defaults; both are 0 for a normal
    distribution, and NaN where all values are the same.

    Args:
      values: any shape, any unit.
    """
    values = jnp.asarray(values, jnp.float32)
    centred = deviations(values)
    # Scaled to at most 1 first, and then to standard units, so that no power overflows or vanishes.
    scale = largest(centred).reshape(())
    square = ((centred / jnp.where(scale > 0, scale, 1)) ** 2).mean()
    constant = square == 0
    std = scale * jnp.sqrt(jnp.where(constant, 1, square))
    units = centred / jnp.where(constant, jnp.nan, std)
    return DistributionShape(values.mean(), std, (units**3).mean(), (units**4).mean() - 3)


@kernel()
def ks_normal(
    values: Float[AnyArray, "*shape"], mean: jax.typing.ArrayLike, std: jax.typing.ArrayLike
) -> Float[Array, ""]:
    """Returns Kolmogorov and Smirnov's distance of a sample from a normal distribution; in 0…1.

        D = max over x of |share of values ≤ x − Φ((x − mean) / std)|

    The statistic of `scipy.stats.kstest(values, "norm", (mean, std))` to about 1e-6; 1 for a standard deviation of 0,
    NaN for an empty sample or one with a NaN. The values are counted in cells of equal probability, which is many times
    faster than sorting them, and exact to half a cell.

    Args:
      values: any shape.
      mean, std: mean and standard deviation of the normal distribution, in the unit of `values`.
    """
    values = jnp.asarray(values, jnp.float32).ravel()
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    normal = jax.scipy.special.ndtr((values - mean) / jnp.where(std > 0, std, 1))
    cell = jnp.clip(normal * KS_CELLS, 0, KS_CELLS - 1).astype(jnp.int32)
    inside = jnp.zeros(KS_CELLS, jnp.int32).at[cell].add(1, mode="promise_in_bounds")
    upto = jnp.cumsum(inside)
    middle = (jnp.arange(KS_CELLS, dtype=jnp.float32) + 0.5) / KS_CELLS
    above = upto.astype(jnp.float32) / values.size - middle
    below = middle - (upto - inside).astype(jnp.float32) / values.size
    distance = jnp.where(std > 0, jnp.maximum(above.max(), below.max()), 1)
    # NaN if any value is NaN or the sample is empty.
    return jnp.where(jnp.isnan(normal).any() | (values.size == 0), jnp.nan, distance)


@kernel()
def neighbour_correlations(x: Float[AnyArray, "row column"]) -> Float[Array, "row-1"]:
    """Returns Pearson's correlation of every row with the next, in −1…1; NaN next to a constant row."""
    centred = deviations(jnp.asarray(x, jnp.float32), axis=1)
    scaled = centred / size(centred, axis=1)  # to at most 1, so that no square overflows
    squares = (scaled**2).sum(axis=1)
    constant = squares == 0
    unit = scaled / jnp.sqrt(jnp.where(constant, 1, squares))[:, None]
    correlation = jnp.clip((unit[:-1] * unit[1:]).sum(axis=1), -1, 1)
    return jnp.where(constant[:-1] | constant[1:], jnp.nan, correlation)


@kernel()
def principal_components(
    x: Float[AnyArray, "row column"],
) -> tuple[Float[Array, "component"], Float[Array, "row 2"]]:
    """Returns principal components of the rows, with the columns standardised first.

    Computed from the smaller of the two Gram matrices of the standardised matrix Z, whose eigenvalues are the squares
    of Z's singular values: λ = σ². There are min(row, column) components.

    Args:
      x: samples in rows. A constant column becomes 0.

    Returns:
      The share of the variance that each component explains, decreasing, of sum 1 (all 0 if nothing varies); and the
      rows' scores on the first two, with the sign that makes the largest loading positive, as in scikit-learn.
    """
    x = jnp.asarray(x, jnp.float32)
    centred = deviations(x, axis=0)
    std = root((centred**2).mean(axis=0, keepdims=True))
    z = centred / jnp.where(std > 0, std, 1)
    if x.shape[0] <= x.shape[1]:
        squares, left = jnp.linalg.eigh(z @ z.T)
        scale = jnp.sqrt(jnp.maximum(squares[:-3:-1], 0))
        scores = left[:, :-3:-1] * scale[None, :]
        loadings = z.T @ left[:, :-3:-1]
    else:
        squares, right = jnp.linalg.eigh(z.T @ z)
        loadings = right[:, :-3:-1]
        scores = z @ loadings
    extreme = jnp.take_along_axis(loadings, jnp.abs(loadings).argmax(axis=0)[None], axis=0)
    squares = jnp.maximum(squares[::-1], 0)
    total = squares.sum()
    return squares / jnp.where(total > 0, total, 1), scores * jnp.where(extreme < 0, -1, 1)


@kernel()
def spectrum(x: Float[AnyArray, "row column"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the effective rank and the largest singular value of a matrix.

        effective rank = exp(−Σ p log p),    p = σ / Σσ

    from 1 for a matrix of rank one to min(row, column) for an orthogonal one; 0 for a matrix of zeros, NaN for one
    with NaN or infinite values.
    Source of the effective rank: Roy and Vetterli 2007, "The effective rank".
    """
    values = jnp.linalg.svd(jnp.asarray(x, jnp.float32), compute_uv=False)
    return effective_rank(values), values[0]


def effective_rank(values: Float[Array, "value"]) -> Float[Array, ""]:
    """Returns exp(−Σ p log p), p = σ / Σσ, of singular values; 0 where all are 0, NaN where one is not finite."""
    total = values.sum()
    p = values / jnp.where(total > 0, total, 1)
    entropy = -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0).sum()
    return jnp.where(jnp.isfinite(total), jnp.where(total > 0, jnp.exp(entropy), 0), jnp.nan)
