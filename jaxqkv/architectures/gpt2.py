"""GPT-2 in Flax: embedding, pre-norm block, final norm with the output embedding.

Source: Radford et al. 2019, and the layout of Hugging Face's `gpt2` checkpoints.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxqkv.architectures.activations import Attention
from jaxqkv.architectures.layers import MLP, SelfAttention, layer_norm
from jaxqkv.checkpoints.config import GPT2Config
from jaxqkv.runtime.devices import Execution


class Embed(nn.Module):
    """Token embedding plus position embedding."""

    config: GPT2Config

    @nn.compact
    def __call__(
        self, ids: Int[Array, "batch pos"], positions: Int[Array, "batch pos"]
    ) -> Float[Array, "batch pos embed"]:
        config = self.config
        tokens = nn.Embed(config.vocab_size, config.n_embd, name="wte")(ids)
        return tokens + nn.Embed(config.n_positions, config.n_embd, name="wpe")(positions)


class Block(nn.Module):
    """Pre-norm: each half reads a normalised copy of the residual stream and adds to it."""

    config: GPT2Config
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch pos embed"],
        visible: Bool[Array, "batch query key"],
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "batch pos embed"], Attention]:
        config = self.config
        attention = SelfAttention(config, self.execution, name="attn")(layer_norm(config, "ln_1")(x), visible, layer)
        assert attention.attn_out is not None  # which SelfAttention fills
        middle = x + attention.attn_out
        mlp_out = MLP(config, self.execution, name="mlp")(layer_norm(config, "ln_2")(middle))
        return middle + mlp_out, dataclasses.replace(attention, resid_pre=x, mlp_out=mlp_out)


class FinalNorm(nn.Module):
    """The layer norm after the last block."""

    config: GPT2Config

    @nn.compact
    def __call__(self, x: Float[Array, "batch pos embed"]) -> Float[Array, "batch pos embed"]:
        return layer_norm(self.config, "ln_f")(x)


def unembed(
    hidden: Float[Array, "batch pos embed"], embedding: Float[Array, "vocab embed"]
) -> Float[Array, "batch pos vocab"]:
    """Logits: the product with the output embedding, which GPT-2 ties to the token embedding."""
    return jnp.einsum("bpe,ve->bpv", hidden, embedding)
