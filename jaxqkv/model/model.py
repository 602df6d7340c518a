"""`Model`: a checkpoint's config, weights and tokenizer, ready to run."""

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxqkv.architectures.activations import Attention
from jaxqkv.architectures.base import Architecture, Params
from jaxqkv.checkpoints.checkpoint import Checkpoint
from jaxqkv.checkpoints.weights import Weights
from jaxqkv.errors import JaxqkvError
from jaxqkv.model.branches import EditOfHeads
from jaxqkv.model.editing import Edits
from jaxqkv.model.forward import collect, each_layer, final_hidden, next_token_logits
from jaxqkv.model.reducers import Reducer
from jaxqkv.model.request import Layers, Progress, Request
from jaxqkv.model.sources import KeptLayers, StreamedParameters
from jaxqkv.model.sweeping import Metrics, measure_run, sweep_heads
from jaxqkv.model.transfer import to_device
from jaxqkv.runtime import showing
from jaxqkv.runtime.devices import setting
from jaxqkv.text.batches import Batch, BatchLike, as_batch
from jaxqkv.text.tokenizers import Text, Tokenizer

# Most bytes of weights that stay in memory between runs; larger models are read at every run.
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
    """A checkpoint ready to run: config, weights and tokenizer. Made by `jaxqkv.load`.

    Attributes:
      checkpoint: the checkpoint.
      config: sizes and settings.
      weights: tensors by name and by role, in the dtype of the arithmetic.
      mesh: devices that it runs on, if there are several.
    """

    def __init__(self, checkpoint: Checkpoint, *, dtype: Any = jnp.float32, stream: bool | None = None,
                 tokenizer: Tokenizer | None = None, mesh: Mesh | None = None):  # fmt: skip
        self.checkpoint = checkpoint
        self.config = cast(Architecture, checkpoint.config)
        self.weights = Weights(checkpoint, _checked_dtype(dtype))
        if stream is None:
            stream = self.weights.nbytes > KEEP_BYTES
        self._kept = None if stream else KeptLayers()
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
        """How the model runs, for people."""
        kept = "read at every run" if self._kept is None else "kept between runs"
        mesh = "" if self.mesh is None else f" on {dict(self.mesh.shape)}"
        return f"in {self.weights.dtype}{mesh}, layers {kept}"

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, read at its first use.

        Raises:
          CheckpointError: when the checkpoint has none.
        """
        if self._tokenizer is None:
            self._tokenizer = self.checkpoint.tokenizer()
        return self._tokenizer

    def tokenize(
        self,
        texts: str | Sequence[Text],
        *,
        padding_side: str = "right",
        pad_to_multiple_of: int = 1,
        truncate: bool = False,
        special_tokens: bool = True,
    ) -> Batch:
        """Returns texts, or pairs of them, as a padded `Batch`; arguments and errors as for `Tokenizer.batch`."""
        return self.tokenizer.batch(
            texts,
            self.config,
            padding_side=padding_side,
            pad_to_multiple_of=pad_to_multiple_of,
            truncate=truncate,
            special_tokens=special_tokens,
        )

    def run(
        self,
        batch: BatchLike,
        capture: Collection[str] | None = None,
        layers: Layers | None = None,
        reduce: Reducer | None = None,
        edit: Edits | None = None,
        inputs: Any = None,
        memory: float | str | None = None,
        progress: Progress | None = None,
        check: bool = False,
    ) -> Any:
        """Runs the model and returns intermediates, or what a reducer computes from each layer.

        Args:
          batch: from `tokenize` or `Batch.of`; or integer ids `[batch, pos]` without padding, a dict or `BatchEncoding`
            with `input_ids`, or lists.
          capture: names of what to return, q, k and v unless given; with a leading layer axis
              q, k, v, z           batch head pos head_dim
              scores, pattern      batch head query key
              attn_out, mlp_out    batch pos embed
              resid_pre            batch pos embed, input of the block
              resid_post           batch pos embed, output of the block
            and, for the whole model, without the layer axis
              hidden               batch pos embed
              logits               batch pos vocab
          layers: the layers to return, each once and in the order given; all unless given.
          reduce: instead of `capture`, a function `reduce(attention, mask)` or `reduce(attention, mask, inputs)`, which
            is compiled into the block. `attention` is one layer's `Attention`, with the fields above without the layer
            axis, and the layer's number as `layer`. The results, any pytree of arrays, get a leading layer axis.
          edit: field → a change made there before anything is computed from it: one of `jaxqkv.edits`, a function
            `edit(value, site)`, or several of them.
          inputs: a pytree of arrays `[batch, …]` for `reduce` and, as `site.inputs`, for edits; changing their values
            compiles nothing anew.
          memory: bytes for the temporaries of a block, or a text such as "2GB"; the batch is cut to fit, and a reducer
            must treat each sequence by itself.
          progress: called with the number of microbatches done, and with their number over all layers.
          check: whether to check first that the reducer treats each sequence by itself and leaves pads out.

        Returns:
          `Activations`, or the reducer's results.

        Raises:
          JaxqkvError: on names, layers and ids that do not exist, text longer than the positions, invalid edits, and a
            reducer that cannot be compared or cut; see `jaxqkv.forward` for more on all arguments.
        """
        checked = as_batch(batch, self.config)
        request = Request.of(
            self.config,
            checked,
            capture,
            layers,
            reduce,
            edit,
            inputs,
            memory=memory,
            progress=progress,
            mesh=self.mesh,
            check=check,
        )
        return collect(self._source(), checked, self.config, request)

    def layerwise(
        self,
        batch: BatchLike,
        capture: Collection[str] | None = None,
        layers: Layers | None = None,
        edit: Edits | None = None,
        inputs: Any = None,
    ) -> Iterator[tuple[int, Attention]]:
        """Yields each selected layer's number and `Attention` as the run comes to it, and keeps none of them.

        Layers come in ascending order; arguments and shapes as for `run`, without the layer axis.
        """
        checked = as_batch(batch, self.config)
        request = Request.of(self.config, checked, capture, layers, None, edit, inputs, mesh=self.mesh)
        yield from each_layer(self._source(), checked, self.config, request)

    def hidden(
        self, batch: BatchLike, memory: float | str | None = None, edit: Edits | None = None, inputs: Any = None
    ) -> Float[Array, "batch pos embed"]:
        """Returns the residual stream after the last block, GPT-2's after the final norm; arguments as for `run`."""
        checked = as_batch(batch, self.config)
        return final_hidden(self._source(), checked, self.config, self._all_layers(checked, memory, edit, inputs))

    def logits(
        self, batch: BatchLike, memory: float | str | None = None, edit: Edits | None = None, inputs: Any = None
    ) -> Float[Array, "batch pos vocab"]:
        """Returns logits before the softmax: GPT-2's for the next token, BERT's for the token at each position.

        BERT, RoBERTa and DistilBERT need a checkpoint with the head that predicts masked tokens. Arguments as for
        `run`.

        Raises:
          JaxqkvError: for a checkpoint without such a head.
        """
        checked = as_batch(batch, self.config)
        return next_token_logits(self._source(), checked, self.config, self._all_layers(checked, memory, edit, inputs))

    def sweep(
        self,
        batch: BatchLike,
        edit: EditOfHeads,
        metric: Metrics,
        field: str = "z",
        *,
        layers: Layers | None = None,
        by_position: bool = False,
        per_text: bool = False,
        method: str = "exact",
        memory: float | str | None = None,
        progress: Progress | bool = True,
    ) -> Any:
        """Returns a metric after an edit of each head alone, `[layer, head]`, in one pass over the layers.

        Args:
          batch: as for `run`.
          edit: one of the constructors of `jaxqkv.edits`, or a function from heads, pairs (layer, head), to an edit.
          metric: one of `jaxqkv.metrics`; a function of the last token's logits `[batch, vocab]` that returns
            `[batch, …]`; or a dict of several.
          field: field to edit: q, k, v, scores, pattern or z.
          layers: layers whose heads are edited; all unless given.
          by_position: whether to edit each position of a head alone, `[layer, head, pos]`. The mean at a position is
            over the texts that have a token there.
          per_text: whether to return `[text, layer, head(, pos)]` instead of the mean over texts.
          method: "exact", or "gradient" for the first-order approximation: the clean metric plus
            Σ (edited value − value) · ∂metric/∂value, from one backward pass.
          memory: bytes for the branches and the temporaries of a block, or a text such as "2GB"; there are as many
            passes as the branches need to fit.
          progress: whether to draw a progress bar if it takes long, or a function that is called with the number of
            microbatches done and the number of all.

        Returns:
          An array, or what the metric's function returns with these axes in the place of the batch; a dict if several
          metrics are given.

        Raises:
          JaxqkvError: for invalid edits and metrics, and metrics of logits for a model without them.
        """
        return sweep_heads(
            self._source(),
            as_batch(batch, self.config),
            self.config,
            edit,
            metric,
            field=field,
            layers=layers,
            by_position=by_position,
            per_text=per_text,
            method=method,
            memory=memory,
            mesh=self.mesh,
            progress=progress,
        )

    def measure(
        self,
        batch: BatchLike,
        metric: Metrics,
        edit: Edits | None = None,
        *,
        inputs: Any = None,
        per_text: bool = False,
        memory: float | str | None = None,
    ) -> Any:
        """Returns a metric of one run, clean or edited: the mean over texts, or `per_text` one value for each."""
        checked = as_batch(batch, self.config)
        request = self._all_layers(checked, memory, edit, inputs)
        return measure_run(self._source(), checked, self.config, metric, per_text, request)

    def params(self, *, copy: bool = True) -> dict[str, Any]:
        """Returns all parameters as arrays on the device, for `forward`, `jax.grad` and the like.

        Args:
          copy: whether to copy into new buffers, which may be donated. False returns the model's own buffers where it
            keeps them, without a second copy in memory; donating those would delete them for the model too.

        Returns:
          `{"embed": …, "layers": [one dict a layer], "final": …}`; the dicts are new at every call.
        """
        source, layers = self._source(), range(self.config.n_layer)
        self.weights.check_layers(layers)  # here, since the functions that use them do not know the tensors' names
        if copy:
            embed, final = (to_device(tree, mesh=self.mesh) for tree in (self.weights.embed(), self.weights.final()))
            return {"embed": embed, "final": final, "layers": [source.read(layer) for layer in layers]}
        kept = {} if self._kept is None else self._kept.params
        for layer in layers:
            if layer not in kept:
                kept[layer] = source.read(layer)
        shared = {"embed": self._embedding, "final": self._with_unembedding, "layers": [kept[i] for i in layers]}
        return jax.tree.map(lambda leaf: leaf, shared)  # in dicts of its own

    def _all_layers(self, batch: Batch, memory: float | str | None, edit: Edits | None, inputs: Any) -> Request:
        return Request.of_all_layers(self.config, batch, edit, inputs, memory, self.mesh)

    def _source(self) -> StreamedParameters:
        """Returns the parameters for one run; each layer is read when the run comes to it.

        Raises:
          JaxqkvError: when the arithmetic is float64 and `jax_enable_x64` has been switched off.
        """
        if self.weights.dtype == np.float64 and not setting("jax_enable_x64"):
            raise JaxqkvError(
                "the model was loaded with dtype float64, and jax_enable_x64 is off now, so that it would compute in "
                "float32; switch it on again, or load the model with dtype float32"
            )
        return StreamedParameters(
            self.weights,
            embedding=lambda: self._embedding,
            final=lambda: self._final,
            head=self._head,
            kept_embedding="_embedding" in vars(self) or self._all_layers_kept,
            kept=self._kept,
            mesh=self.mesh,
        )

    @property
    def _all_layers_kept(self) -> bool:
        return self._kept is not None and len(self._kept.params) == self.config.n_layer

    def _head(self) -> Params:
        """Returns the parameters that make logits, with the checkpoint's output embedding or the token embedding."""
        masked = [rule.key for rule in self.weights.masked_head]
        final = self._with_unembedding if self.config.has_logits or masked else {}
        embed = self._embedding if self.weights.tied or masked else {}
        return self.config.head({"embed": embed, "final": final})

    @functools.cached_property
    def _embedding(self) -> Params:
        """Parameters before the first block."""
        params: Params = to_device(self.weights.embed(), mesh=self.mesh)
        return params

    @functools.cached_property
    def _final(self) -> Params:
        """Parameters after the last block, without an output embedding."""
        params: Params = to_device(self.weights.final(unembedding=False), mesh=self.mesh)
        return params

    @functools.cached_property
    def _with_unembedding(self) -> Params:
        """Parameters after the last block, with all that logits need besides the token embedding."""
        params: Params = to_device(self.weights.final(), mesh=self.mesh)
        return params
