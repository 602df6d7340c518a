"""Weights by the names that the field gives them, as W_E, W_Q and W_in: of one layer or several, whole or by head."""

import operator
from collections.abc import Iterable
from typing import Any, SupportsIndex

import numpy as np
from jaxtyping import Float, Shaped

from jaxqkv.checkpoints.tables import Rule, Table
from jaxqkv.errors import JaxqkvError

# A layer's number, or several: a list, a range, an array. Several are stacked along a first axis.
Layers = SupportsIndex | Iterable[SupportsIndex] | np.ndarray
# Of a projection `[embed, inner]` and of its bias, whole or cut by head; with a first axis of several layers.
Projection = Float[np.ndarray, "*layer embed inner"] | Float[np.ndarray, "*layer head embed head_dim"]
Bias = Float[np.ndarray, "*layer inner"] | Float[np.ndarray, "*layer head head_dim"]


class NamedWeights:
    """The part of `Weights` that knows these names; every call reads from the file."""

    config: Any
    _table: Table

    def W_Q(self, layer: Layers, by_head: bool = False) -> Projection:
        """Query weights `[embed, inner]`; `[head, embed, head_dim]` by head. x @ W_Q + b_Q gives q.

        Args:
          layer: a layer's number; or several, as `range(8)`, which are stacked along a first axis.
          by_head: cut by head.

        Raises:
          JaxqkvError: for a layer that does not exist; so do the others.
        """
        return self._each(layer, "attn/q/kernel", by_head)

    def W_K(self, layer: Layers, by_head: bool = False) -> Projection:
        """Key weights, shaped as `W_Q`."""
        return self._each(layer, "attn/k/kernel", by_head)

    def W_V(self, layer: Layers, by_head: bool = False) -> Projection:
        """Value weights, shaped as `W_Q`."""
        return self._each(layer, "attn/v/kernel", by_head)

    def W_O(
        self, layer: Layers, by_head: bool = False
    ) -> Float[np.ndarray, "*layer inner embed"] | Float[np.ndarray, "*layer head head_dim embed"]:
        """Output projection `[inner, embed]`; `[head, head_dim, embed]` by head. z @ W_O + b_O gives attn_out."""
        matrix = self._each(layer, "attn/o/kernel", False)
        if not by_head:
            return matrix
        return matrix.reshape(*matrix.shape[:-2], self.config.n_head, self.config.head_dim, -1)

    def b_Q(self, layer: Layers, by_head: bool = False) -> Bias:
        """Query biases `[inner]`; `[head, head_dim]` by head. Arguments as for `W_Q`."""
        return self._each(layer, "attn/q/bias", by_head)

    def b_K(self, layer: Layers, by_head: bool = False) -> Bias:
        """Key biases, shaped as `b_Q`."""
        return self._each(layer, "attn/k/bias", by_head)

    def b_V(self, layer: Layers, by_head: bool = False) -> Bias:
        """Value biases, shaped as `b_Q`."""
        return self._each(layer, "attn/v/bias", by_head)

    def b_O(self, layer: Layers) -> Float[np.ndarray, "*layer embed"]:
        """Bias `[embed]` of the output projection, once for all heads."""
        return self._each(layer, "attn/o/bias", False)

    def gamma(self, layer: Layers) -> Float[np.ndarray, "*layer embed"]:
        """Scale `[embed]` of the norm whose output attention reads.

        Raises:
          JaxqkvError: for an architecture without one, and for a layer that does not exist.
        """
        if not self.config.attention_norm:
            raise JaxqkvError(
                f"attention of {self.config.model_type} reads the residual stream, without a norm before it"
            )
        return self._each(layer, f"{self.config.attention_norm}/scale", False)

    def W_in(self, layer: Layers) -> Float[np.ndarray, "*layer embed mlp"]:
        """The MLP's first weights `[embed, mlp]`."""
        return self._each(layer, "mlp/up/kernel", False)

    def b_in(self, layer: Layers) -> Float[np.ndarray, "*layer mlp"]:
        """The MLP's first bias `[mlp]`."""
        return self._each(layer, "mlp/up/bias", False)

    def W_out(self, layer: Layers) -> Float[np.ndarray, "*layer mlp embed"]:
        """The MLP's second weights `[mlp, embed]`."""
        return self._each(layer, "mlp/down/kernel", False)

    def b_out(self, layer: Layers) -> Float[np.ndarray, "*layer embed"]:
        """The MLP's second bias `[embed]`."""
        return self._each(layer, "mlp/down/bias", False)

    @property
    def W_E(self) -> Float[np.ndarray, "vocab embed"]:
        """The token embedding."""
        return self[self._table.embed[0].key]

    @property
    def W_pos(self) -> Float[np.ndarray, "pos embed"]:
        """The position embedding, as the file has it: RoBERTa's first tokens do not have its first rows."""
        return self[self._table.embed[1].key]

    @property
    def W_U(self) -> Float[np.ndarray, "embed vocab"]:
        """The output embedding, the other way round: hidden @ W_U gives logits. W_E transposed where they are tied.

        Raises:
          JaxqkvError: for an architecture without logits.
        """
        if not self._table.head:
            raise JaxqkvError(f"{self.config.model_type} has no next-token logits, and so no W_U")
        return (self.W_E if self.tied else self[self._table.head[0].key]).T

    def W_QKV(self, layer: int) -> Float[np.ndarray, "embed three_embed"]:
        """W_Q, W_K and W_V side by side: GPT-2's `c_attn` as it is, joined for BERT."""
        rule = self._rule(layer, "attn/q/kernel")
        if len(rule.places) == 3:
            return self[rule.key.format(layer=layer)]
        return read_only(np.concatenate([self.W_Q(layer), self.W_K(layer), self.W_V(layer)], axis=1))

    # What `Weights` has.

    def __getitem__(self, name: str) -> Shaped[np.ndarray, "..."]:
        raise NotImplementedError

    def _rule(self, layer: int, place: str) -> Rule:
        raise NotImplementedError

    @property
    def tied(self) -> bool:
        """Whether logits are made with the token embedding."""
        raise NotImplementedError

    def _each(self, layers: Layers, place: str, by_head: bool) -> np.ndarray:
        """Returns the tensor of that place, of one layer or stacked; its last axis cut by head, if asked for."""
        if getattr(layers, "ndim", 0):
            layers = np.asarray(layers).tolist()
        if isinstance(layers, SupportsIndex):
            return self._one(operator.index(layers), place, by_head)
        chosen = [operator.index(layer) for layer in layers]
        if not chosen:
            raise JaxqkvError("no layer selected")
        return read_only(np.stack([self._one(layer, place, by_head) for layer in chosen]))

    def _one(self, layer: int, place: str, by_head: bool) -> np.ndarray:
        rule = self._rule(layer, place)
        part = rule.apply(self[rule.key.format(layer=layer)])[place]
        if not by_head:
            return part
        return np.moveaxis(part.reshape(*part.shape[:-1], self.config.n_head, self.config.head_dim), -2, 0)


def read_only(tensor: Shaped[np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """Returns a view that cannot be written to: what is written would be lost at the next call."""
    view = tensor.view()
    view.flags.writeable = False
    return view
