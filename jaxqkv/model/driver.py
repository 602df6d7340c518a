"""The driver of a model: a Python loop over one jitted block.

All layers have the same shapes, so that the block is compiled once whatever the depth. Each layer's weights can be read
just before they are used, and the loop stops at the last layer that is needed. Inside an outer `jax.jit` the loop
unrolls.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxqkv.architectures.attention import visible_keys
from jaxqkv.architectures.base import Architecture, Params
from jaxqkv.architectures.sites import Editing, Site
from jaxqkv.model import editing, microbatches
from jaxqkv.model.editing import Placed
from jaxqkv.model.reducers import Bound
from jaxqkv.model.request import Request
from jaxqkv.model.sources import Source
from jaxqkv.runtime.devices import Execution, check_split, execution, jit, place_batch
from jaxqkv.text.batches import Batch
from jaxqkv.typing import AnyArray

# Reducers whose programs are kept in memory; the least recently used are dropped.
PROGRAMS = 32


@jit(static_argnames="config")
def embed(params: Params, batch: Batch, *, config: Architecture) -> Float[Array, "batch pos embed"]:
    """Returns the residual stream before the first block."""
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
    reduce: Callable[..., Any] | None,
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
run_block = jit(_run_block, static_argnames=STATIC)


class _Latest:
    """Calls the latest of equal reducers; an earlier one may see other values by now, when a new shape is compiled."""

    reduce: Bound

    def __call__(self, *arguments: Any) -> Any:
        return self.reduce(*arguments)


@functools.lru_cache(maxsize=PROGRAMS)
def _run_block_with(reduce: Bound | None, structure: Any) -> tuple[Callable[..., Any], _Latest]:
    """Returns `run_block` for a reducer and for edits of a structure, and where its reducer is put.

    The last `PROGRAMS` of them are kept.
    """
    latest = _Latest()
    block = functools.partial(_run_block, reduce=None if reduce is None else latest)
    return jit(block, static_argnames=[name for name in STATIC if name != "reduce"]), latest


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
    stream: list[Any] = [embed(embedding, piece, config=embedding_config) for piece, _ in pieces]
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
        return functools.partial(run_block, reduce=None)
    block, latest = _run_block_with(reduce, editing.structure(edit))
    if reduce is not None:
        latest.reduce = reduce
    return block


def _of_piece(start: int, size: int, mesh: Mesh | None, array: Any) -> Any:
    """Returns the part of an edit's array `[batch, …]` for a microbatch, on its devices."""
    piece = array if size == len(array) else array[start : start + size]
    return piece if mesh is None else place_batch(piece, mesh)
