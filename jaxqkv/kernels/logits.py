"""The next token as parts of a residual stream predict it, through a final layer norm and the output embedding.

Sources: Elhage et al. 2021, "A mathematical framework for transformer circuits"; nostalgebraist 2020, "interpreting
GPT: the logit lens".
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxqkv.errors import KernelError
from jaxqkv.kernels.calling import kernel
from jaxqkv.typing import AnyArray


@kernel()
def attribution(
    parts: Float[AnyArray, "part embed"],
    residual: Float[AnyArray, "embed"],
    scale: Float[AnyArray, "embed"],
    direction: Float[AnyArray, "embed"],
    *,
    epsilon: float,
) -> Float[Array, "part"]:
    """Returns what parts of a residual stream contribute to its product with a direction after the final layer norm.

        ((r − mean r) / σ) · (γ ⊙ u),    σ = √(var + ε) of the whole residual

    linear in r once σ is fixed: parts that add up to the residual have contributions that add up to
    (LN(residual) − β) · u. With u = u_a − u_b, the difference of two rows of the output embedding, that is a logit
    difference, without β · u and the difference of output biases.
    Source: Elhage et al. 2021; `logit_attrs` of TransformerLens.

    Args:
      parts: r, vectors that add up to the residual stream, or some of them.
      residual: the whole residual stream at the same position.
      scale: γ of the norm.
      direction: u.
      epsilon: ε of the norm.

    Returns:
      Float32, in the unit of logits.
    """
    parts, residual, scale, direction = (jnp.asarray(x, jnp.float32) for x in (parts, residual, scale, direction))
    sigma = jnp.sqrt(residual.var() + epsilon)
    centred = parts - parts.mean(axis=-1, keepdims=True)
    return centred @ (scale * direction) / sigma


@kernel()
def logit_lens(
    residual: Float[AnyArray, "pos embed"],
    scale: Float[AnyArray, "embed"],
    bias: Float[AnyArray, "embed"],
    unembedding: Float[AnyArray, "vocab embed"],
    *,
    epsilon: float,
) -> tuple[Int[Array, "pos"], Float[Array, "pos"]]:
    """Returns the most probable next token if the model ended at this residual stream, and its probability.

        softmax over the vocabulary of W_U LN(residual)

    Source: nostalgebraist 2020.

    Args:
      residual: residual stream after any layer, or the embedding.
      scale, bias: γ and β of the final layer norm.
      unembedding: output embedding, with a row for each token.
      epsilon: ε of the norm.

    Returns:
      The token, and its probability in 1/vocab…1.

    Raises:
      KernelError: for an output embedding of no token.
    """
    if not unembedding.shape[0]:
        raise KernelError("the output embedding has no token to predict")
    residual, scale, bias, unembedding = (jnp.asarray(x, jnp.float32) for x in (residual, scale, bias, unembedding))
    centred = residual - residual.mean(axis=-1, keepdims=True)
    normed = centred / jnp.sqrt((centred**2).mean(axis=-1, keepdims=True) + epsilon)
    logits = (normed * scale[None] + bias[None]) @ unembedding.T
    largest = logits.max(axis=-1, keepdims=True)
    return logits.argmax(axis=-1).astype(jnp.int32), 1 / jnp.exp(logits - largest).sum(axis=-1)
