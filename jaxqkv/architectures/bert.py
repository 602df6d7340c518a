"""BERT in Flax: embedding and post-norm block.

Source: Devlin et al. 2018, and the layout of Hugging Face's `bert-*` checkpoints.
"""

import dataclasses

import flax.linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxqkv.architectures.activations import Attention
from jaxqkv.architectures.layers import MLP, SelfAttention, layer_norm
from jaxqkv.checkpoints.config import BertConfig
from jaxqkv.runtime.devices import Execution


class Embed(nn.Module):
    """Token, position and token-type embeddings, summed and normalised."""

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "batch pos"],
        positions: Int[Array, "batch pos"],
        token_types: Int[Array, "batch pos"],
    ) -> Float[Array, "batch pos embed"]:
        config = self.config
        total = nn.Embed(config.vocab_size, config.n_embd, name="word")(ids)
        total += nn.Embed(config.type_vocab_size, config.n_embd, name="token_type")(token_types)
        total += nn.Embed(config.n_positions, config.n_embd, name="position")(positions)
        return layer_norm(config, "norm")(total)


class Block(nn.Module):
    """Post-norm: the residual stream itself is normalised after each half."""

    config: BertConfig
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch pos embed"],
        visible: Bool[Array, "batch query key"],
        layer: Int[Array, ""],
    ) -> tuple[Float[Array, "batch pos embed"], Attention]:
        config = self.config
        attention = SelfAttention(config, self.execution, name="attn")(x, visible, layer)
        assert attention.attn_out is not None  # which SelfAttention fills
        middle = layer_norm(config, "ln_1")(x + attention.attn_out)
        mlp_out = MLP(config, self.execution, name="mlp")(middle)
        return layer_norm(config, "ln_2")(middle + mlp_out), dataclasses.replace(
            attention, resid_pre=x, mlp_out=mlp_out
        )
