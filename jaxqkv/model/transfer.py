"""Copies weights to the device when they are needed.

Touching fresh memory takes longer than copying into memory that is in use already, so a pass over the layers reuses one
block of it, and on a CPU XLA computes from that block in place.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from jaxqkv.runtime.devices import place_parameters

ALIGNMENT = 64  # bytes; XLA's CPU backend uses aligned host memory without a copy


class Arena:
    """A block of aligned host memory that every use overwrites."""

    def __init__(self) -> None:
        self._block = np.empty(0, np.uint8)

    def take(self, size: int) -> UInt8[np.ndarray, "byte"]:
        """Returns `size` aligned bytes, the same memory at each call if it is large enough."""
        if self._block.size < size + ALIGNMENT:
            self._block = np.empty(size + ALIGNMENT, np.uint8)
        begin = -self._block.ctypes.data % ALIGNMENT
        return self._block[begin : begin + size]


def to_device(tree: Any, arena: Arena | None = None, mesh: Mesh | None = None) -> Any:
    """Copies NumPy leaves to the device; the arrays are concrete even while an outer `jax.jit` is tracing.

    On a CPU the leaves are copied side by side into one block, of which the arrays are views: into `arena`, whose next
    use overwrites them, or into new memory. A transposed leaf is left to XLA, which transposes faster than NumPy. With
    a mesh each leaf goes to its devices.
    """
    if mesh is not None:
        with jax.ensure_compile_time_eval():
            return place_parameters(tree, mesh)
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
    """Calls `read` at the best time relative to the work that makes `pending`, and returns its result.

    On a CPU that is after the work, because the copy and the products would compete for the same cores; elsewhere it is
    during the work. Either way no more than two reads are in memory.
    """
    if jax.default_backend() == "cpu":
        jax.block_until_ready(pending)
        return read()
    result = read()
    jax.block_until_ready(pending)
    return result
