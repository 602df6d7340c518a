"""BERT: post-norm blocks, attention in both directions, token types.

Source: Devlin et al. 2018, and the layout of Hugging Face's `bert-*` checkpoints.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
from jaxtyping import Array, Bool, Float, Int

from jaxqkv.architectures.activations import Attention
from jaxqkv.architectures.base import Architecture, Counterpart, Params
from jaxqkv.architectures.layers import MLP, SelfAttention, embedding, layer_norm, masked_head, masked_logits
from jaxqkv.architectures.sites import UNEDITED, Editing
from jaxqkv.checkpoints import config_keys
from jaxqkv.checkpoints.config import ACTIVATIONS
from jaxqkv.checkpoints.tables import Rule, Table, linear, norm
from jaxqkv.checkpoints.tables import masked_head as masked_head_rules
from jaxqkv.runtime.devices import Execution


class Embed(nn.Module):
    """Token, position and token-type embeddings, summed and normalised."""

    config: "BertConfig"

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
        total += embedding(config.type_vocab_size, config.n_embd, "token_type")(token_types)
        total += embedding(config.position_rows, config.n_embd, "position")(positions)
        return layer_norm(config, "norm")(total)


class PostNormBlock(nn.Module):
    """A post-norm block: the residual stream itself is normalised after attention and after the MLP."""

    config: Architecture
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch pos embed"],
        visible: Bool[Array, "batch query key"],
        layer: Int[Array, ""],
        edit: Editing = UNEDITED,
    ) -> tuple[Float[Array, "batch pos embed"], Attention]:
        """Returns the next residual stream and the block's intermediates."""
        config = self.config
        x = edit("resid_pre", x)
        attention = SelfAttention(config, self.execution, name="attn")(x, visible, layer, edit)
        assert attention.attn_out is not None  # SelfAttention sets it
        middle = layer_norm(config, "ln_1")(x + attention.attn_out)
        mlp_out = edit("mlp_out", MLP(config, self.execution, name="mlp")(middle))
        after = edit("resid_post", layer_norm(config, "ln_2")(middle + mlp_out))
        return after, dataclasses.replace(attention, resid_pre=x, mlp_out=mlp_out, resid_post=after)


@dataclasses.dataclass(frozen=True)
class BertConfig(Architecture):
    """BERT's sizes and settings.

    `tie_word_embeddings` says whether the decoder of a language modelling head is the token embedding.
    """

    type_vocab_size: int
    tie_word_embeddings: bool = True

    model_type = "bert"
    causal = False
    keys: ClassVar = {
        "vocab_size": "vocab_size",
        "n_positions": "max_position_embeddings",
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "activation": "hidden_act",
        "layer_norm_epsilon": "layer_norm_eps",
        "type_vocab_size": "type_vocab_size",
    }
    only: ClassVar = {
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "pruned_heads": ({}, None),
        "per_layer_config": (None, {}),
    }
    switches: ClassVar = {"tie_word_embeddings": True}
    harmless = config_keys.BERT
    usual: ClassVar = {
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "type_vocab_size": 2,
        "initializer_range": 0.02,
    }
    always: ClassVar = {"architectures": ["BertModel"], "position_embedding_type": "absolute", "pad_token_id": 0}

    tokenizer_class = "BertTokenizer"
    embedding = Embed
    layer = PostNormBlock
    counterpart = Counterpart(
        config="BertConfig",
        model="BertModel",
        backbone="",
        blocks="encoder.layer",
        q="attention.self.query",
        k="attention.self.key",
        v="attention.self.value",
        o="attention.output.dense",
        mlp="output.dense",
        arguments={"add_pooling_layer": False},
        head_model=("BertForMaskedLM", "bert"),
    )
    # The language modelling head in files: if tied, its decoder may be the only key of the token embedding.
    prefix: ClassVar[str] = "bert."
    heads: ClassVar[str] = r"(pooler|cls|classifier|qa_outputs)\..*"
    decoder: ClassVar[str] = "cls.predictions.decoder.weight"
    # Keys of the head's dense map, norm, decoder and bias; and its activation, if it is not the MLP's.
    masked_keys: ClassVar[tuple[str, str, str, str]] = (
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder",
        "cls.predictions.bias",
    )
    masked_activation: ClassVar[str] = ""

    @property
    def token_types(self) -> int:
        """Number of token types."""
        return self.type_vocab_size

    @property
    def position_rows(self) -> int:
        """Rows of the position embedding."""
        return self.n_positions

    def table(self) -> Table:
        """Returns the table of tensors in `bert-*` checkpoints."""
        width, inner = self.n_embd, self.attention_width
        layer = "encoder.layer.{layer}"
        return Table(
            embed=(
                Rule("embeddings.word_embeddings.weight", (self.vocab_size, width), ("word/embedding",)),
                Rule("embeddings.position_embeddings.weight", (self.position_rows, width), ("position/embedding",)),
                Rule(
                    "embeddings.token_type_embeddings.weight",
                    (self.type_vocab_size, width),
                    ("token_type/embedding",),
                ),
                *norm("embeddings.LayerNorm", "norm", width),
            ),
            layer=(
                *linear(f"{layer}.attention.self.query", width, inner, "attn/q"),
                *linear(f"{layer}.attention.self.key", width, inner, "attn/k"),
                *linear(f"{layer}.attention.self.value", width, inner, "attn/v"),
                *linear(f"{layer}.attention.output.dense", inner, width, "attn/o"),
                *norm(f"{layer}.attention.output.LayerNorm", "ln_1", width),
                *linear(f"{layer}.intermediate.dense", width, self.n_inner, "mlp/up"),
                *linear(f"{layer}.output.dense", self.n_inner, width, "mlp/down"),
                *norm(f"{layer}.output.LayerNorm", "ln_2", width),
            ),
            final=(),
            head=(),
            tied=self.tie_word_embeddings,
            prefix=self.prefix,
            buffers=r"embeddings\.(position_ids|token_type_ids)",
            heads=self.heads,
            stand_ins={"embeddings.word_embeddings.weight": self.decoder} if self.tie_word_embeddings else {},
            masked=masked_head_rules(*self.masked_keys, (width, self.vocab_size)),
        )

    def head(self, params: Params) -> Params:
        """Returns the parameters of the head that predicts masked tokens.

        Raises:
          JaxqkvError: when the checkpoint has none.
        """
        return masked_head(self, params)

    def logits(self, head: Params, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Returns the logits of masked tokens."""
        return masked_logits(self, ACTIVATIONS[self.masked_activation or self.activation], head, hidden)


def _sizes(n_embd: int, n_layer: int, n_head: int) -> BertConfig:
    return BertConfig(
        vocab_size=30522,
        n_positions=512,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        n_inner=4 * n_embd,
        activation="gelu",
        layer_norm_epsilon=1e-12,
        initializer_range=0.02,
        type_vocab_size=2,
    )


# Models whose sizes are known by name.
KNOWN = {"bert-base-uncased": _sizes(768, 12, 12), "bert-large-uncased": _sizes(1024, 24, 16)}
