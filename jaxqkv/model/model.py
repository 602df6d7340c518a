"""`Model`: a checkpoint's config, weights and tokenizer together, which feeds the functions of `running.py`."""

import functools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxqkv.architectures.activations import Attention
from jaxqkv.checkpoints.checkpoint import Checkpoint, open_checkpoint
from jaxqkv.checkpoints.weights import Weights
from jaxqkv.errors import JaxqkvError
from jaxqkv.model.forward import Params, Progress, Reducer, forward, hidden, layerwise, logits
from jaxqkv.model.streaming import EmbeddingStream, LayerStream, to_device
from jaxqkv.runtime import showing
from jaxqkv.runtime.devices import setting
from jaxqkv.text.tokens import Batch, BatchLike, Tokenizer

# Weights up to this size stay in memory once they are used again; larger ones are read at every run.
KEEP_BYTES = 2 << 30


def _checked_dtype(dtype: Any) -> np.dtype:
    allowed = ["float32", "bfloat16", "float16", *(["float64"] if setting("jax_enable_x64") else [])]
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = repr(dtype)
    if name not in allowed:
        hint = "; float64 needs jax.config.update('jax_enable_x64', True)" if name == "float64" else ""
        raise JaxqkvError(f"dtype is one of {', '.join(allowed)}, not {name}{hint}")
    return jnp.dtype(name)


class Model:
    """A checkpoint ready to run: config, weights and tokenizer together. Made by `jaxqkv.load`.

    Attributes:
      checkpoint: where it comes from.
      config: its sizes and settings.
      weights: its tensors by name and by role, in the dtype of the arithmetic.
      mesh: the devices that it runs on, if there are several.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: Any = jnp.float32, stream: bool | None = None,
                 tokenizer: Tokenizer | None = None, mesh: Mesh | None = None):  # fmt: skip
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.weights = Weights(checkpoint, _checked_dtype(dtype))
        if stream is None:
            stream = self.weights.nbytes > KEEP_BYTES
        self._kept: dict[int, Params] | None = None if stream else {}
        self._used: set[int] = set()
        self._tokenizer = tokenizer
        self.mesh = mesh

    def __repr__(self) -> str:
        parameters = f"{sum(self.weights.parameters().values()):,} parameters"
        return (
            f"Model {self.checkpoint.spec}: {self.config.architecture}, {self.config.vocabulary}\n"
            f"  {parameters}, {showing.megabytes(self.weights.nbytes)} MB; {self._how}"
        )

    def _repr_html_(self) -> str:
        return showing.facts_table(f"Model {self.checkpoint.spec}", self.weights.summary() | {"runs": self._how})

    @property
    def _how(self) -> str:
        """How it runs, in words."""
        kept = "read at every run" if self._kept is None else "kept from their second use on"
        mesh = "" if self.mesh is None else f" on {dict(self.mesh.shape)}"
        return f"in {self.weights.dtype}{mesh}, layers {kept}"

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, read at its first use.

        Raises:
          CheckpointError: when the checkpoint has none.
        """
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.of(self.checkpoint)
        return self._tokenizer

    def tokenize(
        self,
        texts: str | Sequence[str],
        *,
        padding_side: str = "right",
        truncate: bool = False,
        special_tokens: bool = True,
    ) -> Batch:
        """Texts as a padded `Batch`; arguments and errors as for `Tokenizer.batch`."""
        return self.tokenizer.batch(
            texts, self.config, padding_side=padding_side, truncate=truncate, special_tokens=special_tokens
        )

    def run(
        self,
        batch: BatchLike,
        capture: Collection[str] | None = None,
        layers: int | Iterable[int] | None = None,
        reduce: Reducer | None = None,
        inputs: Any = None,
        memory: int | None = None,
        progress: Progress | None = None,
    ) -> Any:
        """Every attention intermediate that is asked for; arguments, results and errors as for `forward`."""
        return forward(
            self._streamed(),
            batch,
            self.config,
            capture=capture,
            layers=layers,
            reduce=reduce,
            inputs=inputs,
            memory=memory,
            progress=progress,
            mesh=self.mesh,
        )

    def layerwise(
        self, batch: BatchLike, capture: Collection[str] | None = None, layers: int | Iterable[int] | None = None
    ) -> Iterator[tuple[int, Attention]]:
        """One layer's intermediates after another; see `layerwise`."""
        return layerwise(self._streamed(), batch, self.config, capture=capture, layers=layers, mesh=self.mesh)

    def hidden(self, batch: BatchLike, memory: int | None = None) -> Float[Array, "batch pos embed"]:
        """Final hidden states; see `hidden`."""
        return hidden(self._streamed(), batch, self.config, memory=memory, mesh=self.mesh)

    def logits(self, batch: BatchLike, memory: int | None = None) -> Float[Array, "batch pos vocab"]:
        """Next-token logits of a GPT-2; see `logits`."""
        params = self._streamed() | {"final": self._with_unembedding}
        return logits(params, batch, self.config, memory=memory, mesh=self.mesh)

    def params(self) -> dict[str, Any]:
        """All parameters as arrays on the device, for `forward`, `jax.grad` and the like."""
        kept = {} if self._kept is None else self._kept
        stream = self._streamed()["layers"]
        for layer in set(range(self.config.n_layer)) - set(kept):
            kept[layer] = stream[layer]
        self.weights.check_layers(range(self.config.n_layer))  # what computes with them knows no names
        return {
            "embed": self._embedding,
            "final": self._with_unembedding,
            "layers": [kept[layer] for layer in range(self.config.n_layer)],
        }

    def _streamed(self) -> dict[str, Any]:
        """Parameters for one run, each layer read when the run comes to it."""
        kept = "_embedding" in vars(self) or (self._kept is not None and bool(self._used))
        return {
            "embed": EmbeddingStream(self.weights, lambda: self._embedding, kept, self.mesh),
            "layers": LayerStream(self.weights, self._kept, self._used, self.mesh),
            "final": self._final,
        }

    @functools.cached_property
    def _embedding(self) -> Params:
        """Parameters of what comes before the first block."""
        return to_device(self.weights.embed(), mesh=self.mesh)

    @functools.cached_property
    def _final(self) -> Params:
        """Parameters of what comes after the last block, without an output embedding."""
        return to_device(self.weights.final(unembedding=False), mesh=self.mesh)

    @functools.cached_property
    def _with_unembedding(self) -> Params:
        """The same with the output embedding, if it is another than the token embedding."""
        return to_device(self.weights.final(), mesh=self.mesh)


def load(
    spec: Any,
    *,
    revision: str | None = None,
    seed: int = 0,
    dtype: Any = jnp.float32,
    stream: bool | None = None,
    tokenizer: Any = None,
    mesh: Mesh | None = None,
) -> Model:
    """Opens a checkpoint for running; weights are read when they are first needed.

    Args:
      spec: hub id, folder, `demo-gpt2`, `demo-bert` or `random:SPEC`; or an open `Checkpoint`.
      revision: branch, tag or commit on the hub.
      seed: of the fresh weights of `random:SPEC`.
      dtype: of the arithmetic.
      stream: read each layer's weights anew at every run, instead of keeping them in memory from
        their second use on; decided by their size (2 GiB) unless given.
      tokenizer: a folder with tokenizer files, instead of the checkpoint's own.
      mesh: from `devices.make_mesh`, to run on several devices.

    Raises:
      CheckpointError: naming file, key and reason.
    """
    checkpoint = open_checkpoint(spec, revision=revision, seed=seed)
    own = None if tokenizer is None else Tokenizer.from_folder(tokenizer, checkpoint.config)
    return Model(checkpoint, dtype=dtype, stream=stream, tokenizer=own, mesh=mesh)
