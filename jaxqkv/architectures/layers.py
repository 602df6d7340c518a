"""The Flax modules that the architectures share: layer norm, self-attention, MLP and masked head.

Parameters are in `flax.linen`'s own layout (`kernel` is `[in, out]`), whatever the file's is.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxqkv.architectures.activations import Attention
from jaxqkv.architectures.attention import attend, merge_heads, score_dtype, split_heads
from jaxqkv.architectures.base import Architecture, Params, apply
from jaxqkv.architectures.sites import UNEDITED, Editing
from jaxqkv.checkpoints.config import ACTIVATIONS
from jaxqkv.errors import JaxqkvError
from jaxqkv.runtime.devices import Execution, rounded_product

ACTIVATION_FUNCTIONS = {
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_erf": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "silu": jax.nn.silu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "mish": jax.nn.mish,
    "linear": lambda x: x,
}
# Flax traces the initialiser of every parameter to learn its shape, and zeros are the quickest to trace.
ZEROS = nn.initializers.zeros_init()


def layer_norm(config: Architecture, name: str) -> nn.LayerNorm:
    """Returns a layer norm with the checkpoint's epsilon and the two-pass variance that PyTorch computes."""
    return nn.LayerNorm(epsilon=config.layer_norm_epsilon, use_fast_variance=False, name=name)


def embedding(rows: int, width: int, name: str) -> nn.Embed:
    """Returns the module that looks up rows of an embedding."""
    return nn.Embed(rows, width, embedding_init=ZEROS, name=name)


def dense(width: int, name: str, execution: Execution) -> nn.Dense:
    """Returns the module x · kernel + bias."""
    product = rounded_product if execution.rounded else None
    return nn.Dense(width, kernel_init=ZEROS, dot_general=product, name=name)


class SelfAttention(nn.Module):
    """Multi-head self-attention; every intermediate is returned, and XLA drops those that are not used."""

    config: Architecture
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch pos embed"],
        visible: Bool[Array, "batch query key"],
        layer: Int[Array, ""],
        edit: Editing = UNEDITED,
    ) -> Attention:
        """Returns the intermediates of attention, from q to attn_out."""
        config, width = self.config, self.config.attention_width
        q, k, v = (edit(name, split_heads(dense(width, name, self.execution)(x), config.n_head)) for name in "qkv")
        scale: Any = config.attention_scale(layer, score_dtype(q.dtype, config.upcast_attention))
        scores, pattern, z = attend(q, k, v, visible, scale, self.execution.sharded, config.upcast_attention, edit)
        attn_out = edit("attn_out", dense(config.n_embd, "o", self.execution)(merge_heads(z)))
        return Attention(q=q, k=k, v=v, scores=scores, pattern=pattern, z=z, attn_out=attn_out)


class MaskedTransform(nn.Module):
    """The part of the head that predicts masked tokens before the output embedding: Dense, activation, norm."""

    config: Architecture
    activation: str

    @nn.compact
    def __call__(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch embed"]:
        """Returns the transformed hidden states."""
        x = ACTIVATION_FUNCTIONS[self.activation](dense(self.config.n_embd, "transform", Execution())(x))
        return layer_norm(self.config, "norm")(x)


def masked_head(config: Architecture, params: Params) -> Params:
    """Returns the parameters of the head that predicts masked tokens, output embedding included.

    Raises:
      JaxqkvError: when the checkpoint has no such head.
    """
    if "masked" not in params["final"]:
        raise JaxqkvError(
            f"{config.model_type} has no next-token logits, and this checkpoint no head that predicts masked tokens; "
            "`hidden` gives its hidden states"
        )
    masked = params["final"]["masked"]
    return {"decoder": params["embed"].get("word"), **masked}


def masked_logits(
    config: Architecture, activation: str, head: Params, hidden: Float[Array, "*batch embed"]
) -> Float[Array, "*batch vocab"]:
    """Returns the logits of masked tokens from final hidden states."""
    transform = {name: head[name] for name in ("transform", "norm")}
    hidden = apply(MaskedTransform(config, activation), transform, hidden)
    logits = jnp.einsum("...e,ve->...v", hidden, head["decoder"]["embedding"])
    return logits + head["bias"].reshape(*[1] * (logits.ndim - 1), -1)


class MLP(nn.Module):
    """Dense, activation, Dense."""

    config: Architecture
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: Float[Array, "batch pos embed"]) -> Float[Array, "batch pos embed"]:
        """Returns the output of the MLP."""
        activation = ACTIVATION_FUNCTIONS[ACTIVATIONS[self.config.activation]]
        hidden = activation(dense(self.config.n_inner, "up", self.execution)(x))
        return dense(self.config.n_embd, "down", self.execution)(hidden)
