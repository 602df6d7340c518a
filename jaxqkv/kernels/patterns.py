"""Types of heads by their attention to repeated texts, and how much attention moves between positions.

Sources: Olsson et al. 2022, "In-context learning and induction heads"; Kobayashi et al. 2020, "Attention is not only a
weight: analyzing transformers with vector norms".
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxqkv.errors import KernelError
from jaxqkv.kernels.calling import kernel
from jaxqkv.kernels.factors import scaled
from jaxqkv.kernels.scales import root
from jaxqkv.typing import AnyArray


class HeadTypes(NamedTuple):
    """Means over queries of every head's attention in a text that is repeated once; probabilities, and an entropy.

    Attributes:
      previous: attention to the token before.
      duplicate: attention to the same token in the first half.
      induction: attention to the token after that one.
      first: attention to the first position.
      entropy: entropy of the attention, in nats.
    """

    previous: Float[AnyArray, "batch head"]
    duplicate: Float[AnyArray, "batch head"]
    induction: Float[AnyArray, "batch head"]
    first: Float[AnyArray, "batch head"]
    entropy: Float[AnyArray, "batch head"]


@kernel()
def head_types(pattern: Float[AnyArray, "batch head query key"]) -> HeadTypes:
    """Returns what every head attends to in texts of 2n tokens, whose second half repeats the first.

        previous = mean of A[t, t − 1],          t = 2 … 2n − 1
        duplicate = mean of A[t, t − n],         t = n + 1 … 2n − 1
        induction = mean of A[t, t − n + 1],     t = n + 1 … 2n − 1
        first = mean of A[t, 0],                 t = 1 … 2n − 1
        entropy = mean of −Σ A[t, s] ln A[t, s], t = 1 … 2n − 1

    Sources: Olsson et al. 2022, and the detectors of TransformerLens (`head_detector`), which see whole matrices.

    Args:
      pattern: patterns of one layer, with an even number of positions, at least 4.

    Returns:
      Float32, for each text and head; probabilities in 0…1, the entropy in 0…ln(2n). NaN in a pattern makes the means
      that it is part of NaN.

    Raises:
      KernelError: for patterns that are not square, and a number of positions that is odd or below 4.
    """
    query, pos = pattern.shape[-2:]
    if query != pos:
        raise KernelError(f"patterns of a whole text are square, [pos, pos], not [{query}, {pos}]")
    if pos % 2 or pos < 4:
        raise KernelError(f"a repeated text has an even number of positions, at least 4, not {pos}")
    pattern, n = jnp.asarray(pattern, jnp.float32), pos // 2

    def back(steps: int, start: int) -> Float[Array, "batch head"]:
        """Returns the mean of A[t, t − steps] over t from `start` on."""
        values = jnp.diagonal(pattern, offset=-steps, axis1=-2, axis2=-1)
        return values[..., start - steps :].mean(axis=-1)

    later = pattern[:, :, 1:]
    entropy = -(later * jnp.log(jnp.where(later == 0, 1, later))).sum(axis=-1)
    return HeadTypes(
        previous=back(1, 2),
        duplicate=back(n, n + 1),
        induction=back(n - 1, n + 1),
        first=later[..., 0].mean(axis=-1),
        entropy=entropy.mean(axis=-1),
    )


@kernel()
def weighted_attention(
    pattern: Float[AnyArray, "head query key"],
    v: Float[AnyArray, "head key head_dim"],
    output: Float[AnyArray, "head head_dim embed"],
) -> Float[Array, "head query key"]:
    """Returns Euclidean norms of what attention moves from every key to every query.

        ‖α[q, k] v[k] W_O‖ = α[q, k] √(v[k] G v[k]ᵀ),    G = W_O W_Oᵀ, [head_dim, head_dim]

    so that no array [query, key, embed] is needed.
    Source: Kobayashi et al. 2020, equation 4.

    Args:
      pattern: α of one text in one layer.
      v: values, bias included.
      output: W_O by head.

    Returns:
      Float32, not negative, in the unit of the residual stream.
    """
    pattern, v, output = (jnp.asarray(each, jnp.float32) for each in (pattern, v, output))
    (v, of_v), (output, of_output) = scaled(v), scaled(output)
    gram = jnp.einsum("hde,hfe->hdf", output, output)
    squares = jnp.einsum("hkd,hdf,hkf->hk", v, gram, v)
    return pattern * (root(jnp.maximum(squares, 0))[:, None] * of_v * of_output)
