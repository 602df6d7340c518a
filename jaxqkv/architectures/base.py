"""`Architecture`: what the rest of the package asks of a kind of model."""

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
    """Applies a module to parameters that are passed as they are."""
    return module.apply({"params": params}, *arguments)


class Counterpart(NamedTuple):
    """The same model in `transformers`, as `jaxqkv verify` and the tests run it.

    Attributes:
      config, model: names of its classes; `model` is what `jaxqkv.logits` is compared with where it has logits.
      backbone: path of the module that returns the final hidden states; "" for the model itself.
      blocks: path of the list of blocks.
      q, k, v: paths, in a block, of the modules whose outputs they are; one module that gives all three side by
        side may be named thrice.
      o, mlp: paths, in a block, of the modules that give attn_out and mlp_out.
      settings: further settings of its config.
      arguments: of the model's class.
      positions: whether its forward pass takes `position_ids`.
      head_model: the class that loads a file which stores the token embedding under its head's name alone, and the
        path of `model` in it.
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
      embedding: module of a config; takes ids, positions and token types, and returns the first residual stream.
      layer: module of a config and an `Execution`; takes the stream, the visible keys, the layer's number and an
        `Editing`, and returns the next stream and `Attention`.
      counterpart: the same model in `transformers`.
      attention_norm: place, in a layer's parameters, of the norm whose output attention reads; "" where it reads the
        residual stream as it is.
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
          params: of the embedding.
          ids: token ids.
          positions: index of each token among its sequence's real tokens, from 0.
          token_types: 0 where the architecture has none.
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
        """Returns the residual stream after a block, and every intermediate of it.

        Args:
          params: of the layer.
          x: the residual stream that enters.
          visible: which keys a query may see.
          layer: the layer's number, which some attention is scaled by.
          execution: static settings.
          edit: is called with each field as it is computed.
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
        """Returns the parameters that make logits of the final hidden states, of all parameters.

        Raises:
          JaxqkvError: when the architecture or these parameters have none.
        """
        return {"embedding": self.unembedding(params)}

    def logits(self, head: Params, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Returns the logits of final hidden states: their products with the output embedding."""
        return jnp.einsum("...e,ve->...v", hidden, head["embedding"])

    @property
    def has_logits(self) -> bool:
        """Whether `unembedding` returns."""
        return type(self).unembedding is not Architecture.unembedding

    def final_norm(self, params: Params) -> tuple[Float[AnyArray, "embed"], Float[AnyArray, "embed"]]:
        """Returns scale and bias of the layer norm between a sum of all that was written and the output embedding.

        Args:
          params: of what comes after the last block.

        Raises:
          JaxqkvError: where logits do not follow from such a norm: blocks normalise the residual stream itself.
        """
        raise JaxqkvError(f"the logits of {self.model_type} do not follow from one final norm of a sum")

    @property
    def has_final_norm(self) -> bool:
        """Whether `final_norm` returns: blocks add to a residual stream, which is normalised once at the end."""
        return type(self).final_norm is not Architecture.final_norm

    def attention_scale(self, layer: Int[AnyArray, ""] | np.int32, dtype: Any) -> Scale:
        """Returns what QKᵀ is multiplied by: 1/√head_dim by default."""
        return self.head_dim**-0.5

    @property
    def first_position(self) -> int:
        """The row of the position embedding that a text's first token has."""
        return 0

    @property
    def upcast_attention(self) -> bool:
        """Whether scores and softmax are float32 at least, whatever the arithmetic is."""
        return False
