"""Runs a model: pure functions of explicit parameters.

The driver is a Python loop over one jitted block. All layers have the same shapes, so that the block is compiled once
whatever the depth. Each layer's weights can be read just before they are used, and the loop stops at the last layer
that is needed. Inside an outer `jax.jit` the loop unrolls.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxqkv.architectures.activations import Activations, Attention
from jaxqkv.architectures.attention import visible_keys
from jaxqkv.architectures.base import Architecture, Params
from jaxqkv.architectures.sites import Editing, Site
from jaxqkv.errors import JaxqkvError
from jaxqkv.model import editing, microbatches
from jaxqkv.model.editing import Edits, Placed
from jaxqkv.model.reducers import Bound, Reducer
from jaxqkv.model.request import Layers, Progress, Request
from jaxqkv.model.sources import PlainParameters, Source
from jaxqkv.runtime.arrays import is_concrete
from jaxqkv.runtime.devices import Execution, check_split, execution, jit, place_batch
from jaxqkv.text.batches import Batch, BatchLike, as_batch
from jaxqkv.typing import AnyArray

# Reducers whose programs are kept in memory; the least recently used are dropped.
PROGRAMS = 32


@jit(static_argnames="config")
def _embed(params: Params, batch: Batch, *, config: Architecture) -> Float[Array, "batch pos embed"]:
    return config.embed(params, batch.ids, batch.positions, batch.token_types)


def site_of(layer: Any, mask: Any, config: Architecture, inputs: Any = None) -> Site:
    """Returns the site of a layer's values: queries see real keys, in a causal model no later ones; pads see none."""
    visible = visible_keys(jnp.asarray(mask), config.causal) & jnp.asarray(mask)[:, :, None]
    return Site(jnp.asarray(layer), mask, visible, inputs)


def _run_block(
    params: Params,
    x: Float[Array, "batch pos embed"],
    mask: Bool[AnyArray, "batch pos"],
    inputs: Any = None,
    edit: Placed | None = None,
    *,
    layer: Int[AnyArray, ""] | np.int32,
    config: Architecture,
    capture: frozenset[str],
    reduce: Bound | None,
    goes_on: bool,
    execution: Execution,
) -> tuple[Float[Array, "batch pos embed"] | None, Any]:
    """Runs one layer. If `goes_on` is false the residual stream is not returned, so that XLA does not compute it."""
    site = site_of(layer, mask, config, inputs)
    x, attention = config.block(params, x, site.visible, layer, execution, Editing(edit or {}, site))
    if reduce is None:
        result = attention.select(capture)
    else:
        attention = dataclasses.replace(attention, layer=jnp.asarray(layer))
        result = reduce(attention, mask) if inputs is None else reduce(attention, mask, inputs)
    return x if goes_on else None, result


STATIC = ("config", "capture", "reduce", "goes_on", "execution")
_block = jit(_run_block, static_argnames=STATIC)


@functools.lru_cache(maxsize=PROGRAMS)
def _block_with(reduce: Bound | None, structure: Any) -> Callable[..., Any]:
    """Returns `_block` for a reducer and for edits of a structure; the last `PROGRAMS` of them are kept."""
    return jit(functools.partial(_run_block, reduce=reduce), static_argnames=[n for n in STATIC if n != "reduce"])


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


class Step(NamedTuple):
    """A layer that has been run.

    Attributes:
      layer: number of the layer.
      stream: residual stream after it, in microbatches; None if it was not computed.
      result: captured fields, or the reducer's result.
    """

    layer: int
    stream: Sequence[Array | None]
    result: Any


def run_layers(
    source: Source, batch: Batch, config: Architecture, request: Request, check_each: bool = False
) -> Iterator[Step]:
    """Yields each layer once it has been run, up to the last one that is selected.

    If no layer is selected, all are run for the stream; else the last one's stream is not computed. Weights with NaN or
    infinite values are warned of at the end or, with `check_each`, after their layer.
    """
    embedding, ids, rows = source.embed(batch.ids)
    embedding_config = dataclasses.replace(config, vocab_size=rows) if rows else config
    mesh, reduce = request.mesh, request.reduce
    parts = 1 if mesh is None else mesh.shape["data"]
    whole = dataclasses.replace(batch, ids=ids)
    pieces = microbatches.cut(
        (whole, request.inputs), ids.shape, config, request.memory, parts, whole=reduce is not None
    )
    sizes = [len(piece.ids) for piece, _ in pieces]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    if mesh is not None:
        check_split(mesh.shape["head"], config.n_head, config.n_inner)
        pieces = [place_batch(piece, mesh) for piece in pieces]
    stream: list[Any] = [_embed(embedding, piece, config=embedding_config) for piece, _ in pieces]
    # With outputs all layers are run, as for the stream alone.
    last, how = config.n_layer if request.outputs else max(request.layers, default=config.n_layer), execution(mesh)
    depth, first_wanted = min(last + 1, config.n_layer), min(request.layers, default=None)
    results: list[Any] = []
    entering: list[Array] = []  # the last layer's input, if its output is not computed
    for layer in range(depth):
        wanted = layer in request.layers
        if layer == last:
            entering = list(stream)
        block = functools.partial(
            _chosen_block(reduce if wanted else None, request.edit),
            source.layer(layer, after=(stream, results)),
            layer=np.int32(layer),
            config=config,
            capture=request.capture if wanted else frozenset(),
            goes_on=layer < last,
            execution=how,
        )
        if layer == first_wanted and reduce and (request.memory is not None or sizes[0] % parts):
            microbatches.check_batch_axis(block, stream[0], pieces[0][1])
        results, edits = [], editing.of_layer(request.edit, np.int32(layer))
        for index, (piece, inputs) in enumerate(pieces):
            edit = editing.of_texts(edits, functools.partial(_of_piece, starts[index], sizes[index], mesh))
            stream[index], result = block(stream[index], piece.mask, inputs, edit)
            results.append(microbatches.first(sizes[index], result, parts))
            if request.progress:
                jax.block_until_ready((stream[index], result))
                request.progress(layer * len(pieces) + index + 1, depth * len(pieces))
        if check_each or layer + 1 == depth:
            source.check(entering or stream, layer + 1, made=not entering)
        made = [microbatches.first(*pair, parts) for pair in zip(sizes, stream, strict=True)]
        yield Step(layer, made, microbatches.joined(results))


def _chosen_block(reduce: Bound | None, edit: Placed | None) -> Callable[..., Any]:
    if reduce is None and edit is None:
        return functools.partial(_block, reduce=None)
    return _block_with(reduce, editing.structure(edit))


def _of_piece(start: int, size: int, mesh: Mesh | None, array: Any) -> Any:
    """Returns the part of an edit's array `[batch, …]` for a microbatch, on its devices."""
    piece = array if size == len(array) else array[start : start + size]
    return piece if mesh is None else place_batch(piece, mesh)
