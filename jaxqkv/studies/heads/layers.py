"""The circuits of a checkpoint's layers, read one layer at a time, and walks over pairs of layers."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxqkv.checkpoints.weights import Weights
from jaxqkv.kernels import Circuit, ov_circuit, qk_circuit
from jaxqkv.model.transfer import Arena, to_device
from jaxqkv.runtime.devices import jit

# Bytes of earlier layers that are in memory while later ones pass.
KEEP_BYTES = 256 << 20

Kept = TypeVar("Kept")
Passing = TypeVar("Passing")


class Heads(NamedTuple):
    """The circuits of a layer's heads, and W_Oᵀ as it is stored."""

    qk: Circuit
    ov: Circuit
    w_o: Float[Array, "head embed head_dim"]


@jit(static_argnames=("n_head", "folded"))
def _heads(
    wide: Float[Array, "embed three_inner"],
    w_o: Float[Array, "inner embed"],
    gamma: Float[Array, "embed"] | None,
    scale: Float[Array, ""],
    *,
    n_head: int,
    folded: bool,
) -> Heads:
    embed = wide.shape[0]
    q, k, v = jnp.moveaxis(wide.reshape(embed, 3, n_head, -1), 0, 2)
    o = w_o.reshape(n_head, -1, embed)
    qk, ov = qk_circuit(q, k, gamma, scale, folded=folded), ov_circuit(v, o, gamma, folded=folded)
    return Heads(qk, ov, o.swapaxes(1, 2))


class Layers:
    """The circuits of a checkpoint's layers; each call reads its layer's attention weights.

    Attributes:
      weights: of the checkpoint.
      folded: whether the norms are folded into the weights; only where attention reads the output of a norm.
    """

    def __init__(self, weights: Weights, raw: bool = False):
        self.weights, self.config = weights, weights.config
        self.folded = bool(self.config.attention_norm) and not raw
        self._arena = Arena()

    def __call__(self, layer: int) -> Heads:
        """Returns the circuits of a layer, computed: nothing else of them is in memory."""
        gamma = self.weights.gamma(layer) if self.folded else None
        wide, w_o, gamma = to_device((self.weights.W_QKV(layer), self.weights.W_O(layer), gamma), self._arena)
        scale = jnp.asarray(self.config.attention_scale(np.int32(layer), np.float32), jnp.float32)
        heads: Heads = jax.block_until_ready(
            _heads(wide, w_o, gamma, scale, n_head=self.config.n_head, folded=self.folded)
        )
        return heads

    @property
    def words(self) -> str:
        """The weights in words, for captions."""
        if self.folded:
            return "with the norms folded in"
        return "as they are stored"


def pairs_of_layers(
    n_layer: int, make: Callable[[int], tuple[Kept, Passing]], progress: Any, limit: int = KEEP_BYTES
) -> Iterator[tuple[int, int, Kept, Passing]]:
    """Yields all pairs of layers a ≤ b once, each with what is kept of a and what b has while it passes.

    As many layers as `limit` holds are kept while all later ones pass; then the next ones are. Layers are made again
    for each such group.

    Args:
      n_layer: how many layers there are.
      make: layer → what is kept of it for later ones, and what it has for earlier ones.
      progress: a bar of pairs.
      limit: bytes that may be kept.
    """
    start = 0
    while start < n_layer:
        group: dict[int, Kept] = {}
        together = 1
        for b in range(start, n_layer):
            kept, passing = make(b)
            if b == start:
                size = sum(leaf.nbytes for leaf in jax.tree.leaves(kept))
                together = max(limit // max(size, 1), 1)
            if b < start + together:
                group[b] = kept
            del kept
            for a, each in group.items():
                yield a, b, each, passing
                progress.update()
        start += together


def number_of_pairs(n_layer: int) -> int:
    """Returns how many pairs `pairs_of_layers` yields."""
    return n_layer * (n_layer + 1) // 2
