"""Runs a model: pure functions of explicit parameters, and the same from any source of them."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxqkv.architectures.activations import Activations, Attention
from jaxqkv.architectures.base import Architecture, Params
from jaxqkv.errors import JaxqkvError
from jaxqkv.model import microbatches
from jaxqkv.model.driver import run_layers
from jaxqkv.model.editing import Edits
from jaxqkv.model.reducers import Reducer
from jaxqkv.model.request import Layers, Progress, Request
from jaxqkv.model.sources import PlainParameters, Source
from jaxqkv.runtime.arrays import is_concrete
from jaxqkv.runtime.devices import jit
from jaxqkv.text.batches import Batch, BatchLike, as_batch


@jit(static_argnames="config")
def _final(
    params: Params, x: Float[Array, "batch pos embed"], *, config: Architecture
) -> Float[Array, "batch pos embed"]:
    return config.final(params, x)


@jit(static_argnames="config")
def _logits(
    head: Params, hidden: Float[Array, "batch pos embed"], *, config: Architecture
) -> Float[Array, "batch pos vocab"]:
    return config.logits(head, hidden)


# --- pure functions of explicit parameters ---


def forward(
    params: Params,
    batch: BatchLike,
    config: Architecture,
    *,
    capture: Collection[str] | None = None,
    layers: Layers | None = None,
    reduce: Reducer | None = None,
    edit: Edits | None = None,
    inputs: Any = None,
    memory: float | str | None = None,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
    check: bool = False,
) -> Any:
    """Runs the model and returns intermediates, or what a reducer computes from them.

    A pure function of its arrays: you can jit, differentiate and vmap it.

    Args:
      params: `{"embed": …, "layers": [one dict a layer], "final": …}`, as `Model.params` returns them.
      batch: from `Model.tokenize`, or token ids `[batch, pos]` without padding.
      config: the checkpoint's config (static under `jax.jit`).
      capture: names among `q k v scores pattern z attn_out resid_pre mlp_out resid_post`, and `hidden logits` of the
        whole model, for which all layers are run; q, k and v unless given.
      layers: the layers to return, each once and in the order given (those of a set ascending); all unless given.
        Layers after the last of them are not run, except for `hidden` or `logits`.
      reduce: instead of `capture`, a function of one layer's `Attention`, whose `layer` is its number, and of the
        mask. It is traced into the block, and its results (any pytree of arrays) are stacked over layers. It is
        compiled again if its code, closure, arguments or the globals that it names have changed, as
        `jaxqkv.model.reducers.Bound` says; other values that it reads, such as an attribute of a global object, are
        those of the first call. Give values that change from call to call as `inputs`, which compiles nothing anew.
      edit: field → a change made there before anything is computed from it: one of `jaxqkv.edits`, a function of a
        layer's value and its `Site` (`layer`, `mask`, `visible`, `inputs`) that returns a value of the same shape, or
        several that are applied one after another. Edited values are captured as edited. A function is compiled as a
        reducer is; the arrays of `jaxqkv.edits` and of `jax.tree_util.Partial` are traced.
      inputs: a pytree of arrays `[batch, …]` that `reduce` gets as its third argument and edits as `site.inputs`.
      memory: bytes that the temporaries of a block may take, or a text such as "2GB"; the batch is cut into
        microbatches that fit. A reducer must then treat each sequence by itself, leave pads out with the mask, and
        return arrays whose first axis is the batch. Without `memory` a reducer gets the whole batch, and what is
        captured is computed in microbatches that suit the device.
      progress: called with the number of microbatches done, and with their number over all layers.
      mesh: from `make_mesh`: the batch is split over `data`, the layers over `head`. If the batch does not divide
        evenly, it is filled up with pads, and a reducer must meet the conditions under `memory`.
      check: whether to run the reducer first on the whole batch, on each sequence alone and, without `inputs`, with a
        further pad, and to refuse it if results differ. For finding mistakes; it takes three more runs.

    Returns:
      `Activations` with `[layer, …]` arrays, except `hidden` and `logits`; or the reducer's results with a leading
      layer axis.

    Raises:
      JaxqkvError: on names, layers or ids that do not exist, text longer than the positions, invalid edits, and a
        reducer that cannot be compared, or does not treat each sequence by itself although it has to.
    """
    batch = as_batch(batch, config)
    request = Request.of(
        config,
        batch,
        capture,
        layers,
        reduce,
        edit,
        inputs,
        memory=memory,
        progress=progress,
        mesh=mesh,
        check=check,
    )
    return collect(PlainParameters(params, config), batch, config, request)


def layerwise(
    params: Params,
    batch: BatchLike,
    config: Architecture,
    *,
    capture: Collection[str] | None = None,
    layers: Layers | None = None,
    edit: Edits | None = None,
    inputs: Any = None,
    mesh: Mesh | None = None,
) -> Iterator[tuple[int, Attention]]:
    """Yields each selected layer's number and `Attention` as the run comes to it, and keeps none of them.

    For statistics over more layers than fit in memory together. Arguments and errors as for `forward`; errors are
    raised when the first layer is asked for.
    """
    batch = as_batch(batch, config)
    request = Request.of(config, batch, capture, layers, None, edit, inputs, mesh=mesh)
    yield from each_layer(PlainParameters(params, config), batch, config, request)


def hidden(
    params: Params,
    batch: BatchLike,
    config: Architecture,
    *,
    edit: Edits | None = None,
    inputs: Any = None,
    memory: float | str | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "batch pos embed"]:
    """Returns the residual stream after the last block; for GPT-2 after the final norm, as in Hugging Face.

    Arguments as for `forward`; `memory` bounds the temporaries, not the result.

    Raises:
      JaxqkvError: on ids that do not exist, text longer than the positions, and invalid edits.
    """
    batch = as_batch(batch, config)
    request = Request.of_all_layers(config, batch, edit, inputs, memory, mesh)
    return final_hidden(PlainParameters(params, config), batch, config, request)


def logits(
    params: Params,
    batch: BatchLike,
    config: Architecture,
    *,
    edit: Edits | None = None,
    inputs: Any = None,
    memory: float | str | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "batch pos vocab"]:
    """Returns logits: GPT-2's for the next token, BERT's for the token at each position.

    Before the softmax, in nats up to a constant for each position. The output embedding is the checkpoint's own, or the
    token embedding if they are tied. Arguments as for `forward`.

    Raises:
      JaxqkvError: for parameters without a head, on ids that do not exist, text longer than the positions, and invalid
        edits.
    """
    batch = as_batch(batch, config)
    request = Request.of_all_layers(config, batch, edit, inputs, memory, mesh)
    return next_token_logits(PlainParameters(params, config), batch, config, request)


# --- the same, from any source of parameters ---


def collect(source: Source, batch: Batch, config: Architecture, request: Request) -> Any:
    """Returns what `forward` returns."""
    if request.check:
        _check_reducer(source, batch, config, request)
    head = source.head(config) if "logits" in request.outputs else None  # there may be none
    by_layer: dict[int, Any] = {}
    stream: Sequence[Array | None] = ()
    for step in run_layers(source, batch, config, request):
        stream = step.stream
        if step.layer in request.layers:
            by_layer[step.layer] = step.result
    results = [by_layer.pop(layer) for layer in request.layers]
    if request.reduce:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)
    fields: dict[str, Any] = {}
    if request.outputs:
        hidden = _final(source.final(), microbatches.joined(stream), config=config)
        fields |= {"hidden": hidden} if "hidden" in request.outputs else {}
        fields |= {} if head is None else {"logits": _logits(head, hidden, config=config)}
    for name in sorted(request.capture):  # one at a time and then freed, so that only one field is in memory twice
        fields[name] = jnp.stack([getattr(result, name) for result in results])
        results = [dataclasses.replace(result, **{name: None}) for result in results]
    return Activations(mask=batch.mask, layers=request.layers, **fields)


def _check_reducer(source: Source, batch: Batch, config: Architecture, request: Request) -> None:
    """Refuses a reducer whose results change with other sequences or, without inputs, with pads.

    Raises:
      JaxqkvError: if they change, and inside `jax.jit`, where there are no results to compare.
    """
    request = dataclasses.replace(request, check=False, memory=None, mesh=None, progress=None)
    whole = collect(source, batch, config, request)
    if not all(is_concrete(leaf) for leaf in jax.tree.leaves(whole)):
        raise JaxqkvError("`check` compares values, which are unknown inside jax.jit and the like; use it outside")
    alone = collect(source, batch, config, dataclasses.replace(request, memory=1))
    microbatches.check_same(whole, alone, request.layers, "other sequences of the batch")
    if request.inputs is None and batch.ids.shape[1] < config.n_positions:
        wider = jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, 1))), batch)
        padded = collect(source, wider, config, request)
        microbatches.check_same(whole, padded, request.layers, "values at pads")


def each_layer(source: Source, batch: Batch, config: Architecture, request: Request) -> Iterator[tuple[int, Attention]]:
    """Yields what `layerwise` yields."""
    if request.outputs:
        names = " and ".join(sorted(request.outputs))
        raise JaxqkvError(f"{names}: not a field of layers, which `layerwise` yields; `run` and `forward` return it")
    # The caller may leave the loop early, so a layer's broken weights are warned of when it has been run.
    for step in run_layers(source, batch, config, request, check_each=True):
        if step.layer in request.layers:
            yield step.layer, step.result


def final_hidden(
    source: Source, batch: Batch, config: Architecture, request: Request
) -> Float[Array, "batch pos embed"]:
    """Returns what `hidden` returns."""
    pieces: Sequence[Array | None] = ()
    for step in run_layers(source, batch, config, request):
        pieces = step.stream
    return _final(source.final(), microbatches.joined(pieces), config=config)


def next_token_logits(
    source: Source, batch: Batch, config: Architecture, request: Request
) -> Float[Array, "batch pos vocab"]:
    """Returns what `logits` returns."""
    head = source.head(config)  # before the run: there may be none
    return _logits(head, final_hidden(source, batch, config, request), config=config)
