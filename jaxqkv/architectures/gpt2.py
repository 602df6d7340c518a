"""GPT-2: pre-norm blocks, causal attention, a final norm, and logits through the output embedding.

Source: Radford et al. 2019, and the layout of Hugging Face's `gpt2` checkpoints.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxqkv.architectures.activations import Attention
from jaxqkv.architectures.attention import Scale
from jaxqkv.architectures.base import Architecture, Counterpart, Params, apply
from jaxqkv.architectures.layers import MLP, SelfAttention, embedding, layer_norm
from jaxqkv.architectures.sites import UNEDITED, Editing
from jaxqkv.checkpoints import config_keys
from jaxqkv.checkpoints.tables import Rule, Table, conv1d, norm
from jaxqkv.runtime.devices import Execution
from jaxqkv.typing import AnyArray


class Embed(nn.Module):
    """Token embedding plus position embedding; there are no token types."""

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
        tokens = embedding(config.vocab_size, config.n_embd, "wte")(ids)
        return tokens + embedding(config.n_positions, config.n_embd, "wpe")(positions)


class Block(nn.Module):
    """A pre-norm block: attention and the MLP each read a normalised copy of the residual stream and add to it."""

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
        normed = layer_norm(config, "ln_1")(x)
        attention = SelfAttention(config, self.execution, name="attn")(normed, visible, layer, edit)
        assert attention.attn_out is not None  # SelfAttention sets it
        middle = x + attention.attn_out
        mlp_out = edit("mlp_out", MLP(config, self.execution, name="mlp")(layer_norm(config, "ln_2")(middle)))
        after = edit("resid_post", middle + mlp_out)
        return after, dataclasses.replace(attention, resid_pre=x, mlp_out=mlp_out, resid_post=after)


class FinalNorm(nn.Module):
    """The layer norm after the last block."""

    config: Architecture

    @nn.compact
    def __call__(self, x: Float[Array, "batch pos embed"]) -> Float[Array, "batch pos embed"]:
        """Returns the normalised stream."""
        return layer_norm(self.config, "ln_f")(x)


@dataclasses.dataclass(frozen=True)
class GPT2Config(Architecture):
    """GPT-2's sizes and settings.

    With `reorder_and_upcast_attn`, scores and softmax are float32 even if the arithmetic has 16 bits.
    """

    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    tie_word_embeddings: bool
    reorder_and_upcast_attn: bool = False

    model_type = "gpt2"
    causal = True
    keys: ClassVar = {
        "vocab_size": "vocab_size",
        "n_positions": "n_positions",
        "n_embd": "n_embd",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_inner": "n_inner",
        "activation": "activation_function",
        "layer_norm_epsilon": "layer_norm_epsilon",
    }
    aliases: ClassVar = {
        "max_position_embeddings": "n_positions",
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    }
    only: ClassVar = {"add_cross_attention": (False,), "pruned_heads": ({}, None), "per_layer_config": (None, {})}
    switches: ClassVar = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
        "reorder_and_upcast_attn": False,
    }
    harmless = config_keys.GPT2
    usual: ClassVar = {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-05,
        "initializer_range": 0.02,
    }
    always: ClassVar = {"architectures": ["GPT2LMHeadModel"]}

    tokenizer_class = "GPT2Tokenizer"
    embedding = Embed
    layer = Block
    attention_norm = "ln_1"
    counterpart = Counterpart(
        config="GPT2Config",
        model="GPT2LMHeadModel",
        backbone="transformer",
        blocks="transformer.h",
        q="attn.c_attn",
        k="attn.c_attn",
        v="attn.c_attn",
        o="attn.c_proj",
        mlp="mlp",
        settings={"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    )

    @classmethod
    def implied(cls, field: str, found: Mapping[str, Any]) -> Any:
        """Returns 4 · n_embd for an `n_inner` that is null or missing."""
        return 4 * found["n_embd"] if field == "n_inner" else None

    def table(self) -> Table:
        """Returns the table of tensors in `gpt2` checkpoints."""
        width, inner = self.n_embd, self.attention_width
        layer = "h.{layer}"
        return Table(
            embed=(
                Rule("wte.weight", (self.vocab_size, width), ("wte/embedding",)),
                Rule("wpe.weight", (self.n_positions, width), ("wpe/embedding",)),
            ),
            layer=(
                *norm(f"{layer}.ln_1", "ln_1", width),
                *conv1d(f"{layer}.attn.c_attn", width, 3 * inner, "attn/q", "attn/k", "attn/v"),
                *conv1d(f"{layer}.attn.c_proj", inner, width, "attn/o", init="residual"),
                *norm(f"{layer}.ln_2", "ln_2", width),
                *conv1d(f"{layer}.mlp.c_fc", width, self.n_inner, "mlp/up"),
                *conv1d(f"{layer}.mlp.c_proj", self.n_inner, width, "mlp/down", init="residual"),
            ),
            final=norm("ln_f", "ln_f", width),
            head=(Rule("lm_head.weight", (self.vocab_size, width), ("lm_head/embedding",)),),
            tied=self.tie_word_embeddings,
            prefix="transformer.",
            buffers=r"h\.\d+\.attn\.(masked_)?bias",
            heads=r"(lm_head|score|classifier|multiple_choice_head|summary)\..*",
            stand_ins={"wte.weight": "lm_head.weight"} if self.tie_word_embeddings else {},
        )

    def final(self, params: Params, x: Float[Array, "batch pos embed"]) -> Float[Array, "batch pos embed"]:
        """Returns the stream after the last layer norm."""
        return apply(FinalNorm(self), {"ln_f": params["ln_f"]}, x)

    def unembedding(self, params: Params) -> Float[Array, "vocab embed"]:
        """Returns the checkpoint's own `lm_head`, or else the token embedding."""
        if "lm_head" in params["final"]:
            return params["final"]["lm_head"]["embedding"]
        return params["embed"]["wte"]["embedding"]

    def final_norm(self, params: Params) -> tuple[Float[AnyArray, "embed"], Float[AnyArray, "embed"]]:
        """Returns scale and bias of `ln_f`."""
        return params["ln_f"]["scale"], params["ln_f"]["bias"]

    def attention_scale(self, layer: Int[AnyArray, ""] | np.int32, dtype: Any) -> Scale:
        """Returns 1/√head_dim, or 1, divided by layer + 1 if the checkpoint's config says so."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1).astype(dtype) if self.scale_attn_by_inverse_layer_idx else scale

    @property
    def upcast_attention(self) -> bool:
        """Whether `reorder_and_upcast_attn` is set."""
        return self.reorder_and_upcast_attn


def _sizes(n_embd: int, n_layer: int, n_head: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=50257,
        n_positions=1024,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        n_inner=4 * n_embd,
        activation="gelu_new",
        layer_norm_epsilon=1e-5,
        initializer_range=0.02,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        tie_word_embeddings=True,
    )


# Models whose sizes are known by name, so that `random:gpt2-xl` needs no download.
KNOWN = {
    "gpt2": _sizes(768, 12, 12),
    "gpt2-medium": _sizes(1024, 24, 16),
    "gpt2-large": _sizes(1280, 36, 20),
    "gpt2-xl": _sizes(1600, 48, 25),
}
