"""Weights on the device when they are needed: copied once, in time, and kept only if used again.

Touching fresh memory costs more than copying into memory that is there already, so a pass over the
layers reuses one block of it, and on a CPU XLA computes from that block in place.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt8

from jaxqkv.checkpoints.weights import Weights, count_broken
from jaxqkv.runtime.devices import place_parameters
from jaxqkv.typing import AnyArray

FEWEST_ROWS = 256  # of a token embedding that is read for one text
ALIGNMENT = 64  # XLA's CPU backend takes host memory as it is when it begins at a multiple of this


class Arena:
    """A block of aligned host memory that every use overwrites."""

    def __init__(self) -> None:
        self._block = np.empty(0, np.uint8)

    def take(self, size: int) -> UInt8[np.ndarray, "byte"]:
        """`size` aligned bytes: those of the last call when there are enough of them."""
        if self._block.size < size + ALIGNMENT:
            self._block = np.empty(size + ALIGNMENT, np.uint8)
        begin = -self._block.ctypes.data % ALIGNMENT
        return self._block[begin : begin + size]


def to_device(tree: Any, arena: Arena | None = None, mesh: Mesh | None = None) -> Any:
    """NumPy leaves as arrays on the device; concrete ones, also while an outer `jax.jit` is tracing.

    On a CPU the leaves are copied side by side into one block, which the arrays are views of: into
    `arena`, whose next use overwrites them, or into memory of their own. A transposed leaf is left
    to XLA, which transposes faster than NumPy. With a mesh they go to its devices, each to its own.
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


class EmbeddingStream(Mapping[str, Any]):
    """The embedding's parameters in the course of one run.

    A vocabulary is large and a text is short: the first run, and every run of a model that keeps
    nothing, reads only the rows of its own tokens.

    Args:
      weights: where they are read.
      whole: gives all of them, on the device.
      kept: that they are there already, or worth keeping.
      mesh: the devices that they are placed on, if there are several.
    """

    def __init__(self, weights: Weights, whole: Callable[[], Mapping[str, Any]], kept: bool, mesh: Mesh | None = None):
        self._weights, self._whole, self._kept, self._mesh = weights, whole, kept, mesh

    def __getitem__(self, name: str) -> Any:
        return self._whole()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole())

    def __len__(self) -> int:
        return len(self._whole())

    def of(self, ids: Int[AnyArray, "batch pos"]) -> tuple[Mapping[str, Any], Int[AnyArray, "batch pos"], int]:
        """Parameters for these ids, the ids as rows of them, and how many rows the token embedding has."""
        vocab = self._weights.config.vocab_size
        if self._kept or isinstance(ids, jax.core.Tracer):
            return self._whole(), ids, vocab
        tokens, places = np.unique(np.asarray(ids), return_inverse=True)
        # Of few different sizes, so that another text rarely needs another program.
        size = min(max(FEWEST_ROWS, 1 << (len(tokens) - 1).bit_length()), vocab)
        tokens = np.pad(tokens, (0, size - len(tokens)), mode="edge")
        return to_device(self._weights.embed(tokens), mesh=self._mesh), places.reshape(ids.shape).astype(np.int32), size


class LayerStream:
    """The layers' parameters in the course of one run.

    Args:
      weights: where they are read.
      kept: layers that stay in memory, filled with those that are `used` a second time; None to keep
        none. Both belong to the model and outlive the run.
      mesh: the devices that they are split over, if there are several.
    """

    def __init__(
        self, weights: Weights, kept: dict[int, Mapping[str, Any]] | None, used: set[int], mesh: Mesh | None = None
    ):
        self._weights, self._kept, self._used, self._mesh = weights, kept, used, mesh
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

    def check(self, stream: list[Any], depth: int, made: bool) -> None:
        """Names the weights with NaN or infinite values that a run has used so far; of none twice.

        To look at all weights would cost almost as much as to read them. The residual stream, which is
        small, shows whether one of the layers before it had any; those that it does not clear are looked at.

        Args:
          stream: the last that was made, in microbatches.
          depth: how many layers the run went through.
          made: that the stream is what left the last of them, not what entered it.
        """
        layers = range(depth)
        if any(isinstance(piece, jax.core.Tracer) for piece in stream) or self._weights.are_checked(layers):
            return
        if all(_is_finite(piece) for piece in stream):
            self._weights.trust_layers(layers if made else layers[:-1])
        self._weights.check_layers(layers)

    def _read(self, layer: int, arena: Arena | None) -> Mapping[str, Any]:
        return to_device(self._weights.layer(layer), arena, self._mesh)


def _is_finite(array: Array) -> bool:
    """Whether all values are finite; of an accelerator's array only the answer is fetched."""
    if jax.default_backend() == "cpu":
        return not count_broken(np.asarray(array))
    return bool(jnp.isfinite(array).all())
