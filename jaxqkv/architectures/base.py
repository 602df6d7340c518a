"""`Architecture`: the interface between a kind of model and the rest of the package."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxqkv.architectures.activations import Attention
from jaxqkv.architectures.attention import Scale
from jaxqkv.architectures.sites import UNEDITED, Editing
from jaxqkv.checkpoints.config import Config
from jaxqkv.errors import JaxqkvError
from jaxqkv.runtime.devices import Execution
from jaxqkv.typing import AnyArray

Params = Mapping[str, Any]


def apply(module: nn.Module, params: Params, *arguments: Any) -> Any:
    """Applies a module with the given parameters."""
    return module.apply({"params": params}, *arguments)


class Counterpart(NamedTuple):
    """The same model in `transformers`, as `jaxqkv verify` and the tests run it.

    Attributes:
      config, model: names of its classes; if `model` has logits, `jaxqkv.logits` is compared with them.
      backbone: path of the module that returns the final hidden states; "" for the model itself.
      blocks: path of the list of blocks.
      q, k, v: paths, in a block, of the modules whose outputs they are; the same path three times if one module gives
        all three side by side.
      o, mlp: paths, in a block, of the modules that give attn_out and mlp_out.
      settings: further settings of its config.
      arguments: further arguments of the model's class.
      positions: whether its forward pass takes `position_ids`.
      head_model: class that loads a file with the token embedding stored only under its head's name, and the path of
        `model` in it.
    """

    config: str
    model: str
    backbone: str
    blocks: str
    q: str
    k: str
    v: str
    o: str
    mlp: str
    settings: Mapping[str, Any] = {}
    arguments: Mapping[str, Any] = {}
    positions: bool = True
    head_model: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Architecture(Config):
    """A kind of model: how its config is read, what its checkpoints hold, and how it computes.

    An architecture is a subclass in a file of its own. Parameters are nested dicts in Flax's layout, as the table
    of the checkpoint's tensors makes them.

    Attributes:
      embedding: module made of a config; takes ids, positions and token types, and returns the first residual stream.
      layer: module made of a config and an `Execution`; takes the stream, the visible keys, the layer's number and an
        `Editing`, and returns the next stream and `Attention`.
      counterpart: the same model in `transformers`.
      attention_norm: place, in a layer's parameters, of the norm whose output attention reads; "" if attention reads
        the residual stream itself.
    """

    embedding: ClassVar[Callable[..., nn.Module]]
    layer: ClassVar[Callable[..., nn.Module]]
    counterpart: ClassVar[Counterpart]
    attention_norm: ClassVar[str] = ""

    def embed(
        self,
        params: Params,
        ids: Int[AnyArray, "batch pos"],
        positions: Int[AnyArray, "batch pos"],
        token_types: Int[AnyArray, "batch pos"],
    ) -> Float[Array, "batch pos embed"]:
        """Returns the residual stream that enters the first block.

        Args:
          params: parameters of the embedding.
          ids: token ids.
          positions: index of each token among its sequence's real tokens, from 0.
          token_types: 0 if the architecture has none.
        """
        return apply(self.embedding(self), params, ids, positions + self.first_position, token_types)

    def block(
        self,
        params: Params,
        x: Float[AnyArray, "batch pos embed"],
        visible: Bool[AnyArray, "batch query key"],
        layer: Int[AnyArray, ""] | np.int32,
        execution: Execution,
        edit: Editing = UNEDITED,
    ) -> tuple[Float[Array, "batch pos embed"], Attention]:
        """Returns the residual stream after a block, and all its intermediates.

        Args:
          params: parameters of the layer.
          x: residual stream that enters the block.
          visible: which keys a query may see.
          layer: the layer's number, by which some checkpoints scale attention.
          execution: static settings.
          edit: called with each field as it is computed.
        """
        return apply(self.layer(self, execution), params, x, visible, layer, edit)

    def final(self, params: Params, x: Float[Array, "batch pos embed"]) -> Float[Array, "batch pos embed"]:
        """Returns the final hidden states from the residual stream after the last block: the same by default."""
        return x

    def unembedding(self, params: Params) -> Float[Array, "vocab embed"]:
        """Returns the output embedding from all parameters.

        Raises:
          JaxqkvError: when the architecture has no next-token logits.
        """
        raise JaxqkvError(f"{self.model_type} has no next-token logits; `hidden` gives its hidden states")

    def head(self, params: Params) -> Params:
        """Returns, out of all parameters, those that make logits of the final hidden states.

        Raises:
          JaxqkvError: if the architecture has no logits, or the parameters have no head.
        """
        return {"embedding": self.unembedding(params)}

    def logits(self, head: Params, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Returns the logits of final hidden states: their products with the output embedding."""
        return jnp.einsum("...e,ve->...v", hidden, head["embedding"])

    @property
    def has_logits(self) -> bool:
        """Whether the architecture has next-token logits, and so `unembedding`."""
        return type(self).unembedding is not Architecture.unembedding

    def final_norm(self, params: Params) -> tuple[Float[AnyArray, "embed"], Float[AnyArray, "embed"]]:
        """Returns scale and bias of the layer norm between the residual stream, a sum, and the output embedding.

        Args:
          params: parameters after the last block.

        Raises:
          JaxqkvError: if there is no such norm, because blocks normalise the residual stream itself.
        """
        raise JaxqkvError(f"the logits of {self.model_type} do not follow from one final norm of a sum")

    @property
    def has_final_norm(self) -> bool:
        """Whether blocks add to a residual stream that is normalised once at the end, so that `final_norm` exists."""
        return type(self).final_norm is not Architecture.final_norm

    def attention_scale(self, layer: Int[AnyArray, ""] | np.int32, dtype: Any) -> Scale:
        """Returns the factor of QKᵀ: 1/√head_dim by default."""
        return self.head_dim**-0.5

    @property
    def first_position(self) -> int:
        """The row of the position embedding for a text's first token."""
        return 0

    @property
    def upcast_attention(self) -> bool:
        """Whether scores and softmax are at least float32, whatever the model's arithmetic."""
        return False
