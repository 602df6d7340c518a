"""DistilBERT: BERT's blocks under other names, without token types.

Source: Sanh et al. 2019, and the layout of Hugging Face's `distilbert-*` checkpoints.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
from jaxtyping import Array, Float, Int

from jaxqkv.architectures.base import Architecture, Counterpart, Params
from jaxqkv.architectures.bert import PostNormBlock
from jaxqkv.architectures.layers import embedding, layer_norm, masked_head, masked_logits
from jaxqkv.checkpoints import config_keys
from jaxqkv.checkpoints.config import ACTIVATIONS
from jaxqkv.checkpoints.tables import Rule, Table, linear, norm
from jaxqkv.checkpoints.tables import masked_head as masked_head_rules


class Embed(nn.Module):
    """Token and position embeddings, summed and normalised; there are no token types."""

    config: Architecture

    @nn.compact
    def __call__(
        self,
        ids: Int[Array, "batch pos"],
        positions: Int[Array, "batch pos"],
        token_types: Int[Array, "batch pos"],
    ) -> Float[Array, "batch pos embed"]:
        """Returns the first residual stream."""
        config = self.config
        total = embedding(config.vocab_size, config.n_embd, "word")(ids)
        total += embedding(config.n_positions, config.n_embd, "position")(positions)
        return layer_norm(config, "norm")(total)


@dataclasses.dataclass(frozen=True)
class DistilBertConfig(Architecture):
    """DistilBERT's sizes and settings."""

    tie_word_embeddings: bool = True

    model_type = "distilbert"
    causal = False
    keys: ClassVar = {
        "vocab_size": "vocab_size",
        "n_positions": "max_position_embeddings",
        "n_embd": "dim",
        "n_layer": "n_layers",
        "n_head": "n_heads",
        "n_inner": "hidden_dim",
        "activation": "activation",
    }
    aliases: ClassVar = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
    only: ClassVar = {"pruned_heads": ({}, None), "per_layer_config": (None, {})}
    switches: ClassVar = {"tie_word_embeddings": True}
    fixed: ClassVar = {"layer_norm_epsilon": 1e-12}
    harmless = config_keys.DISTILBERT
    usual: ClassVar = {
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "dim": 768,
        "n_layers": 6,
        "n_heads": 12,
        "hidden_dim": 3072,
        "activation": "gelu",
        "initializer_range": 0.02,
    }
    always: ClassVar = {"architectures": ["DistilBertModel"], "pad_token_id": 0}

    tokenizer_class = "DistilBertTokenizer"
    embedding = Embed
    layer = PostNormBlock
    counterpart = Counterpart(
        config="DistilBertConfig",
        model="DistilBertModel",
        backbone="",
        blocks="transformer.layer",
        q="attention.q_lin",
        k="attention.k_lin",
        v="attention.v_lin",
        o="attention.out_lin",
        mlp="ffn.lin2",
        settings={"dropout": 0.0, "attention_dropout": 0.0},
        head_model=("DistilBertForMaskedLM", "distilbert"),
    )

    def table(self) -> Table:
        """Returns the table of tensors in `distilbert-*` checkpoints."""
        width, inner = self.n_embd, self.attention_width
        layer = "transformer.layer.{layer}"
        return Table(
            embed=(
                Rule("embeddings.word_embeddings.weight", (self.vocab_size, width), ("word/embedding",)),
                Rule("embeddings.position_embeddings.weight", (self.n_positions, width), ("position/embedding",)),
                *norm("embeddings.LayerNorm", "norm", width),
            ),
            layer=(
                *linear(f"{layer}.attention.q_lin", width, inner, "attn/q"),
                *linear(f"{layer}.attention.k_lin", width, inner, "attn/k"),
                *linear(f"{layer}.attention.v_lin", width, inner, "attn/v"),
                *linear(f"{layer}.attention.out_lin", inner, width, "attn/o"),
                *norm(f"{layer}.sa_layer_norm", "ln_1", width),
                *linear(f"{layer}.ffn.lin1", width, self.n_inner, "mlp/up"),
                *linear(f"{layer}.ffn.lin2", self.n_inner, width, "mlp/down"),
                *norm(f"{layer}.output_layer_norm", "ln_2", width),
            ),
            final=(),
            head=(),
            tied=self.tie_word_embeddings,
            prefix="distilbert.",
            buffers=r"embeddings\.position_ids",
            heads=r"(vocab_transform|vocab_layer_norm|vocab_projector|pre_classifier|classifier|qa_outputs)\..*",
            stand_ins={"embeddings.word_embeddings.weight": "vocab_projector.weight"}
            if self.tie_word_embeddings
            else {},
            masked=masked_head_rules(
                "vocab_transform",
                "vocab_layer_norm",
                "vocab_projector",
                "vocab_projector.bias",
                (width, self.vocab_size),
            ),
        )

    def head(self, params: Params) -> Params:
        """Returns the parameters of the head that predicts masked tokens.

        Raises:
          JaxqkvError: when the checkpoint has none.
        """
        return masked_head(self, params)

    def logits(self, head: Params, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Returns the logits of masked tokens."""
        return masked_logits(self, ACTIVATIONS[self.activation], head, hidden)


# Models whose sizes are known by name.
KNOWN = {
    "distilbert-base-uncased": DistilBertConfig(
        vocab_size=30522,
        n_positions=512,
        n_embd=768,
        n_layer=6,
        n_head=12,
        n_inner=3072,
        activation="gelu",
        layer_norm_epsilon=1e-12,
        initializer_range=0.02,
    )
}
