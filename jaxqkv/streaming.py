"""Weights on the device when they are needed: copied once, in time, and kept only if used again.

Touching fresh memory costs more than copying into memory that is there already, so a pass over the
layers reuses one block of it, and on a CPU XLA computes from that block in place.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxqkv.weights import Weights

ALIGNMENT = 64  # XLA's CPU backend takes host memory as it is when it begins at a multiple of this


class Arena:
    """A block of aligned host memory that every use overwrites."""

    def __init__(self):
        self._block = np.empty(0, np.uint8)

    def take(self, size: int) -> np.ndarray:
        """`size` aligned bytes: those of the last call when there are enough of them."""
        if self._block.size < size + ALIGNMENT:
            self._block = np.empty(size + ALIGNMENT, np.uint8)
        begin = -self._block.ctypes.data % ALIGNMENT
        return self._block[begin : begin + size]


def to_device(tree: Any, arena: Arena | None = None) -> Any:
    """NumPy leaves as arrays on the device; concrete ones, also while an outer `jax.jit` is tracing.

    On a CPU the leaves are copied side by side into one block, which the arrays are views of: into
    `arena`, whose next use overwrites them, or into memory of their own. A transposed leaf is left
    to XLA, which transposes faster than NumPy.
    """
    leaves, structure = jax.tree.flatten(tree)
    if jax.default_backend() == "cpu":
        plain = [index for index, leaf in enumerate(leaves) if leaf.strides[-1:] == (leaf.itemsize,)]
        sizes = [-(-leaves[index].nbytes // ALIGNMENT) * ALIGNMENT for index in plain]
        block = (arena or Arena()).take(sum(sizes))
        begin = 0
        for index, size in zip(plain, sizes, strict=True):
            leaf = leaves[index]
            place = block[begin : begin + leaf.nbytes].view(leaf.dtype).reshape(leaf.shape)
            np.copyto(place, leaf)
            leaves[index] = place
            begin += size
    with jax.ensure_compile_time_eval():
        return jax.tree.unflatten(structure, [jax.device_put(leaf) for leaf in leaves])


def read_after(pending: Any, read: Callable[[], Any]) -> Any:
    """What `read()` gives, read at the best time beside the work that makes `pending`.

    On a CPU that is after it: the copy and the products would fight for the same cores, and both
    lose. Elsewhere it is during it. Either way no more than two reads are in memory.
    """
    if jax.default_backend() == "cpu":
        jax.block_until_ready(pending)
        return read()
    result = read()
    jax.block_until_ready(pending)
    return result


class LayerStream(Sequence):
    """The layers' parameters in the course of one run.

    Args:
      weights: where they are read.
      kept: layers that stay in memory, filled with those that are `used` a second time; None to keep
        none. Both belong to the model and outlive the run.
    """

    def __init__(self, weights: Weights, kept: dict[int, Mapping[str, Any]] | None, used: set[int]):
        self._weights, self._kept, self._used = weights, kept, used
        self._arena = Arena()

    def __len__(self) -> int:
        return self._weights.config.n_layer

    def __getitem__(self, layer: int) -> Mapping[str, Any]:
        """The parameters of one layer, in memory of their own."""
        return self._read(layer, None)

    def after(self, pending: Any, layer: int) -> Mapping[str, Any]:
        """The parameters of one layer, good until the next call, once `pending` needs the last ones no more."""
        if self._kept is not None:
            if layer in self._kept:
                return self._kept[layer]
            if layer in self._used:
                self._kept[layer] = read_after(pending, lambda: self._read(layer, None))
                return self._kept[layer]
        self._used.add(layer)
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(pending))
        return read_after(pending, lambda: self._read(layer, None if traced else self._arena))

    def _read(self, layer: int, arena: Arena | None) -> Mapping[str, Any]:
        return to_device(self._weights.layer(layer), arena)
