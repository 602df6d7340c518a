"""Student's and Welch's t: how far the means of two samples are apart, in units of their standard error."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxqkv.kernels.calling import kernel
from jaxqkv.kernels.moments import deviations
from jaxqkv.kernels.scales import size
from jaxqkv.typing import AnyArray


@kernel()
def student_t(
    x: Float[AnyArray, "*first"],
    y: Float[AnyArray, "*second"],
    where_x: Bool[AnyArray, "*#first"] | None = None,
    where_y: Bool[AnyArray, "*#second"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns Student's t of two samples, taking their variances to be equal, and its degrees of freedom.

        t = (x̄ − ȳ) / √(s² (1/n + 1/m)),    s² = (Σ(x − x̄)² + Σ(y − ȳ)²) / (n + m − 2)

    As `scipy.stats.ttest_ind`.
    Source: Student 1908, "The probable error of a mean".

    Args:
      x, y: two samples in the same unit, any shape, of n and m values.
      where_x, where_y: the values that count; all of them unless given. The others may hold anything, NaN too.

    Returns:
      t and n + m − 2, float32 without a unit; t is NaN where it is undefined.
    """
    difference, (n, m), (first, second) = _difference_and_squares(x, y, where_x, where_y)
    freedom = n + m - 2
    return difference / jnp.sqrt((first + second) / freedom * (1 / n + 1 / m)), freedom


@kernel()
def welch_t(
    x: Float[AnyArray, "*first"],
    y: Float[AnyArray, "*second"],
    where_x: Bool[AnyArray, "*#first"] | None = None,
    where_y: Bool[AnyArray, "*#second"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns Welch's t of two samples whose variances may differ, and its degrees of freedom.

        t = (x̄ − ȳ) / √(a + b),    a = Σ(x − x̄)² / (n(n − 1)),    b = Σ(y − ȳ)² / (m(m − 1))
        degrees of freedom = (a + b)² / (a²/(n − 1) + b²/(m − 1))

    As `scipy.stats.ttest_ind(equal_var=False)`. Arguments as for `student_t`.
    Source: Welch 1947, "The generalization of Student's problem when several different population variances are
    involved".
    """
    difference, (n, m), (first, second) = _difference_and_squares(x, y, where_x, where_y)
    a, b = first / (n * (n - 1)), second / (m * (m - 1))
    return difference / jnp.sqrt(a + b), (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1))


Pair = tuple[Float[Array, ""], Float[Array, ""]]


def _difference_and_squares(
    x: Float[AnyArray, "*first"],
    y: Float[AnyArray, "*second"],
    where_x: Bool[AnyArray, "*#first"] | None,
    where_y: Bool[AnyArray, "*#second"] | None,
) -> tuple[Float[Array, ""], Pair, Pair]:
    """Returns the difference of the means, the sizes, and the sums of squares, of samples scaled to at most 1.

    t does not change with shift and scale; scaled, no square overflows, and centred, a common mean costs no digits.
    """
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    masks = [jnp.broadcast_to(True if w is None else w, v.shape) for v, w in ((x, where_x), (y, where_y))]
    n, m = (jnp.asarray(mask.sum(), jnp.float32) for mask in masks)
    both = jnp.concatenate([x.ravel(), y.ravel()])
    both = deviations(both, jnp.concatenate([mask.ravel() for mask in masks]))
    both = both / size(both)
    x, y = both[: x.size].reshape(x.shape), both[x.size :].reshape(y.shape)
    first, second = ((deviations(v, mask) ** 2).sum() for v, mask in zip((x, y), masks, strict=True))
    return x.sum() / n - y.sum() / m, (n, m), (first, second)
