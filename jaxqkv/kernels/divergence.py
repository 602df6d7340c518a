"""How different two distributions are.

Source: study prediction-divergence (Cohen, 50 ML projects to understand LLMs, project 37).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxqkv.kernels.calling import kernel
from jaxqkv.typing import AnyArray


@kernel()
def jensen_shannon(p: Shaped[AnyArray, "bin"], q: Shaped[AnyArray, "bin"]) -> Float[Array, ""]:
    """Jensen and Shannon's divergence of two histograms, in nats; in 0…ln 2.

        JS = ½ Σ p ln(p / m) + ½ Σ q ln(q / m),    m = (p + q) / 2

    The square of `scipy.spatial.distance.jensenshannon`. Computed bin by bin from d = (p − q) / (p + q), of which no
    bin is negative, so that nearly equal distributions lose few digits.
    Source: Lin 1991, "Divergence measures based on the Shannon entropy".

    Args:
      p, q: counts or probabilities of the same bins, none negative; each is divided by its sum.

    Returns:
      A float32 scalar; NaN where one of them is empty.
    """
    p, q = (jnp.asarray(each, jnp.float32) for each in (p, q))
    p, q = p / p.sum(), q / q.sum()
    total = p + q
    d = (p - q) / jnp.where(total > 0, total, 1)

    def part(d: Array) -> Array:
        """(1 + d) ln(1 + d), 0 at −1."""
        return jnp.where(d > -1, (1 + d) * jnp.log1p(jnp.where(d > -1, d, 0)), 0)

    bins = total * jnp.maximum(part(d) + part(-d), 0)
    return jnp.where(jnp.isnan(total).any(), jnp.nan, bins.sum() / 4)
