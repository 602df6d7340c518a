"""Sources of a run's parameters: dicts in memory, or a checkpoint that is read layer by layer."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from jaxqkv.architectures.base import Architecture, Params
from jaxqkv.checkpoints.weights import Weights, count_broken
from jaxqkv.errors import JaxqkvError
from jaxqkv.model.transfer import Arena, read_after, to_device
from jaxqkv.runtime.arrays import snapshot
from jaxqkv.typing import AnyArray

FEWEST_ROWS = 256  # least number of rows of the token embedding that are read for a text
READING = 0.01  # least seconds that reading a layer may take in a run that keeps layers


@runtime_checkable
class Source(Protocol):
    """The parameters of one run."""

    def embed(self, ids: Int[AnyArray, "batch pos"]) -> tuple[Params, Int[AnyArray, "batch pos"], int]:
        """Returns the embedding's parameters for these ids, the ids as rows of them, and the number of rows."""

    def layer(self, index: int, after: Any) -> Params:
        """Returns a layer's parameters, valid until the next call, once `after` no longer needs the last ones."""

    def final(self) -> Params:
        """Returns the parameters of what comes after the last block."""

    def head(self, config: Architecture) -> Params:
        """Returns the parameters that make logits; raises a `JaxqkvError` if there are none."""

    def check(self, stream: list[Any], depth: int, made: bool) -> None:
        """Warns of NaN or infinite values in the weights that a run of `depth` layers has used.

        Args:
          stream: the last residual stream that was computed, in microbatches.
          depth: number of layers that were run.
          made: whether the stream is the last layer's output; else it is its input.
        """


class PlainParameters:
    """Nested dicts, as `Model.params` returns them. Host arrays are copied when they are used.

    Raises:
      JaxqkvError: when a part is missing, or the number of layers is not that of the config.
    """

    def __init__(self, params: Any, config: Architecture):
        parts = ("embed", "layers", "final")
        if not isinstance(params, Mapping) or any(name not in params for name in parts):
            raise JaxqkvError(f"params must have the parts {', '.join(parts)}, as `Model.params` returns them")
        layers = params["layers"]
        if not isinstance(layers, Sequence):
            raise JaxqkvError(f'params["layers"] must be a list of dicts, one a layer, not {type(layers).__name__}')
        if len(layers) != config.n_layer:
            raise JaxqkvError(f"params have {len(layers)} layers, the config says {config.n_layer}")
        self._params: Params = params

    def embed(self, ids: Int[AnyArray, "batch pos"]) -> tuple[Params, Int[AnyArray, "batch pos"], int]:
        """Returns all of the embedding; see `Source`."""
        params: Params = snapshot(self._params["embed"])
        return params, ids, 0

    def layer(self, index: int, after: Any) -> Params:
        """Returns a layer's parameters."""
        params: Params = snapshot(self._params["layers"][index])
        return params

    def final(self) -> Params:
        """Returns the parameters of what comes after the last block."""
        params: Params = snapshot(self._params["final"])
        return params

    def head(self, config: Architecture) -> Params:
        """Returns the parameters that make logits."""
        params: Params = jax.tree.map(jnp.asarray, snapshot(config.head(self._params)))
        return params

    def check(self, stream: list[Any], depth: int, made: bool) -> None:
        """Does nothing: arrays have no names."""


@dataclasses.dataclass
class KeptLayers:
    """A model's layers that stay in memory between runs.

    Attributes:
      params: their parameters.
      seconds: how long the first reading of each layer took that has been used, `READING` at least.
    """

    params: dict[int, Params] = dataclasses.field(default_factory=dict)
    seconds: dict[int, float] = dataclasses.field(default_factory=dict)


class StreamedParameters:
    """A checkpoint's parameters, each layer read just before it is used.

    Layers stay in memory from their second use on. Fresh memory may be slow to get, for example on a virtual machine.
    So a run keeps another layer only while it has read for less time than the first readings of its layers so far, this
    one included, have taken.

    Args:
      weights: weights to read from.
      embedding, final, head: functions that return the parameters outside of the layers, on the device.
      kept_embedding: whether to use the whole embedding: it is in memory already, or all layers are.
      kept: layers that stay in memory, which belong to the model and outlive the run; None to keep none.
      mesh: devices that the parameters are split over, if there are several.
    """

    def __init__(
        self,
        weights: Weights,
        embedding: Callable[[], Params],
        final: Callable[[], Params],
        head: Callable[[], Params],
        kept_embedding: bool,
        kept: KeptLayers | None,
        mesh: Mesh | None = None,
    ):
        self._weights, self._embedding, self._final, self._head = weights, embedding, final, head
        self._kept_embedding, self._kept, self._mesh = kept_embedding, kept, mesh
        # Seconds that this run has read, and that the first readings of its layers took.
        self._spent = self._allowed = 0.0
        self._arena = Arena()

    def embed(self, ids: Int[AnyArray, "batch pos"]) -> tuple[Params, Int[AnyArray, "batch pos"], int]:
        """Returns the embedding's parameters; see `Source`.

        A vocabulary is large and a text is short, so a run reads only the rows of its own tokens until all layers are
        in memory.
        """
        vocab = self._weights.config.vocab_size
        if self._kept_embedding or isinstance(ids, jax.core.Tracer):
            return self._embedding(), ids, vocab
        tokens, places = np.unique(np.asarray(ids), return_inverse=True)
        # Few different sizes, so that another text rarely needs another program.
        size = min(max(FEWEST_ROWS, 1 << (len(tokens) - 1).bit_length()), vocab)
        tokens = np.pad(tokens, (0, size - len(tokens)), mode="edge")
        rows = to_device(self._weights.embed(tokens), mesh=self._mesh)
        return rows, places.reshape(ids.shape).astype(np.int32), size

    def layer(self, index: int, after: Any) -> Params:
        """Returns a layer's parameters; see `Source`."""
        kept = KeptLayers() if self._kept is None else self._kept
        self._allowed += kept.seconds.get(index, 0.0)
        if index in kept.params:
            return kept.params[index]
        keep = index in kept.seconds and self._spent < self._allowed
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(after))

        def read() -> Params:
            begin = perf_counter()
            params = self.read(index, None if keep or traced else self._arena)
            seconds = perf_counter() - begin
            self._spent += seconds
            if index not in kept.seconds:
                kept.seconds[index] = max(seconds, READING)
                self._allowed += kept.seconds[index]
            return params

        params: Params = read_after(after, read)
        if keep:
            kept.params[index] = params
        return params

    def read(self, index: int, arena: Arena | None = None) -> Params:
        """Reads a layer's parameters, into memory of their own unless an arena is given."""
        params: Params = to_device(self._weights.layer(index), arena, self._mesh)
        return params

    def final(self) -> Params:
        """Returns the parameters of what comes after the last block."""
        return self._final()

    def head(self, config: Architecture) -> Params:
        """Returns the parameters that make logits."""
        return self._head()

    def check(self, stream: list[Any], depth: int, made: bool) -> None:
        """Warns of NaN or infinite values in the weights used so far, once for each tensor; see `Source`.

        Checking all weights would take almost as long as reading them. If the residual stream, which is small, is
        finite, so are the weights of the layers before it; only the other layers are checked.
        """
        layers = range(depth)
        if any(isinstance(piece, jax.core.Tracer) for piece in stream) or self._weights.are_checked(layers):
            return
        if all(_is_finite(piece) for piece in stream):
            self._weights.trust_layers(layers if made else layers[:-1])
        self._weights.check_layers(layers)


def _is_finite(array: Array) -> bool:
    """Tells whether all values are finite; of an array on an accelerator only the answer is fetched."""
    if jax.default_backend() == "cpu":
        return not count_broken(np.asarray(array))
    return bool(jnp.isfinite(array).all())
