"""Running GPT-2 and BERT: pure functions of explicit parameters.

The driver is a Python loop over one jitted block. All layers have the same shapes, so the block is
compiled once whatever the depth; each layer's weights can be read just before they are used; the
loop stops at the last layer that was asked for. Inside an outer `jax.jit` it unrolls.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxqkv.architectures import bert, gpt2
from jaxqkv.architectures.activations import FIELDS, Activations, Attention
from jaxqkv.architectures.attention import visible_keys
from jaxqkv.checkpoints.config import BertConfig, Config, GPT2Config
from jaxqkv.errors import JaxqkvError
from jaxqkv.model.streaming import EmbeddingStream, LayerStream
from jaxqkv.runtime.devices import Execution, check_split, execution, jit, place_batch
from jaxqkv.text.tokens import Batch, BatchLike, as_batch
from jaxqkv.typing import AnyArray

Params = Mapping[str, Any]
# One layer's attention, the mask, and `inputs` when there are any → what is kept of the layer.
Reducer = Callable[..., Any]
# Microbatches done, of all of a run.
Progress = Callable[[int, int], None]

# On a CPU, tokens of a microbatch: with more, activations leave the cache and a block is slower a token.
CPU_TOKENS = 2048


def _apply(module: nn.Module, params: Params, *arguments: Any) -> Any:
    return module.apply({"params": params}, *arguments)


@jit(static_argnames="config")
def _embed(params: Params, batch: Batch, *, config: Config) -> Float[Array, "batch pos embed"]:
    arguments = (batch.ids, batch.positions)
    if isinstance(config, BertConfig):
        return _apply(bert.Embed(config), params, *arguments, batch.token_types)
    assert isinstance(config, GPT2Config)
    return _apply(gpt2.Embed(config), params, *arguments)


@jit(static_argnames=("config", "capture", "reduce", "goes_on", "execution"))
def _block(
    params: Params,
    x: Float[Array, "batch pos embed"],
    mask: Bool[AnyArray, "batch pos"],
    inputs: Any = None,
    *,
    layer: Int[AnyArray, ""] | np.int32,
    config: Config,
    capture: frozenset[str],
    reduce: Reducer | None,
    goes_on: bool,
    execution: Execution,
) -> tuple[Float[Array, "batch pos embed"] | None, Any]:
    """One layer. With `goes_on` false the residual stream is not returned, so XLA drops its making."""
    block = (gpt2 if isinstance(config, GPT2Config) else bert).Block(config, execution)
    x, attention = _apply(block, params, x, visible_keys(mask, config.causal), layer)
    if reduce is None:
        result = attention.select(capture)
    else:
        result = reduce(attention, mask) if inputs is None else reduce(attention, mask, inputs)
    return x if goes_on else None, result


@jit(static_argnames="config")
def _final_norm(
    params: Params, x: Float[Array, "batch pos embed"], *, config: GPT2Config
) -> Float[Array, "batch pos embed"]:
    return _apply(gpt2.FinalNorm(config), params, x)


_unembed = jit(gpt2.unembed)


def forward(
    params: Params,
    batch: BatchLike,
    config: Config,
    *,
    capture: Collection[str] | None = None,
    layers: int | Iterable[int] | None = None,
    reduce: Reducer | None = None,
    inputs: Any = None,
    memory: int | None = None,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
) -> Any:
    """Runs the blocks and returns what was asked for from inside them.

    A pure function of its arrays: jit, differentiate and vmap it as it is.

    Args:
      params: `{"embed": …, "layers": [one dict a layer], "final": …}`, as `Model.params` gives.
      batch: from `Model.tokenize`, or token ids `[batch, pos]` without padding.
      config: the checkpoint's config (static under `jax.jit`).
      capture: names among `q k v scores pattern z attn_out resid_pre mlp_out`; q, k and v unless given.
      layers: the layers to return; all of them unless given. Later ones are not run.
      reduce: instead of `capture`, a function of one layer's `Attention` and the mask; it is traced
        into the block, and what it returns (any pytree of arrays) is stacked over layers.
      inputs: a pytree of arrays `[batch, …]` that `reduce` gets as its third argument.
      memory: bytes that the temporaries of a block may take; the batch is cut in microbatches that
        fit. A reducer's results must then have the batch as their leading axis. Without it a reducer
        gets the whole batch, and what is captured is computed in microbatches that suit the device.
      progress: called with the number of microbatches done and that of all layers' together.
      mesh: from `devices.make_mesh`: the batch is split over `data`, the layers over `head`. Where the
        batch does not divide evenly, a reducer's results must have it as their leading axis.

    Returns:
      `Activations` with `[layer, …]` arrays, or the reducer's results with a leading layer axis.

    Raises:
      JaxqkvError: on names, layers or ids that do not exist, and text longer than the positions.
    """
    batch = as_batch(batch, config)
    capture = _checked_capture(capture, reduce)
    selected = _checked_layers(layers, config.n_layer)
    results = []
    if inputs is not None:
        _check_inputs(inputs, reduce, len(batch.ids))
    for layer, _, result in _run(params, batch, config, capture, selected, reduce, inputs, memory, progress, mesh):
        if layer in selected:
            results.append(result)
    if reduce:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)
    fields = {}
    for name in sorted(capture):  # one after another, and each let go: no more than one is there twice
        fields[name] = jnp.stack([getattr(result, name) for result in results])
        results = [dataclasses.replace(result, **{name: None}) for result in results]
    return Activations(mask=batch.mask, layers=selected, **fields)


def layerwise(
    params: Params,
    batch: BatchLike,
    config: Config,
    *,
    capture: Collection[str] | None = None,
    layers: int | Iterable[int] | None = None,
    mesh: Mesh | None = None,
) -> Iterator[tuple[int, Attention]]:
    """Yields each selected layer's number and `Attention` as the run comes to it, and keeps none of them.

    For statistics over many layers of what would not fit in memory together. Arguments as for `forward`,
    whose errors it raises when the first layer is asked for.
    """
    batch = as_batch(batch, config)
    captured, selected = _checked_capture(capture, None), _checked_layers(layers, config.n_layer)
    # A loop over the layers may be left before its end, so what is wrong with a layer is said when it was run.
    for layer, _, result in _run(params, batch, config, captured, selected, mesh=mesh, check_each=True):
        if layer in selected:
            yield layer, result


def hidden(
    params: Params, batch: BatchLike, config: Config, *, memory: int | None = None, mesh: Mesh | None = None
) -> Float[Array, "batch pos embed"]:
    """The residual stream after the last block; for GPT-2 after the final norm, as Hugging Face has it.

    Arguments as for `forward`; `memory` bounds the temporaries, not the result.

    Raises:
      JaxqkvError: on ids that do not exist, and text longer than the positions.
    """
    batch = as_batch(batch, config)
    pieces: Sequence[Array | None] = ()
    for _, pieces, _ in _run(params, batch, config, frozenset(), (), memory=memory, mesh=mesh):  # noqa: B007
        pass
    x = _joined(pieces)
    if isinstance(config, GPT2Config):
        return _final_norm(params["final"], x, config=config)
    return x


def logits(
    params: Params, batch: BatchLike, config: Config, *, memory: int | None = None, mesh: Mesh | None = None
) -> Float[Array, "batch pos vocab"]:
    """Next-token logits of GPT-2, through the tied embedding or the checkpoint's own `lm_head`.

    Before the softmax, in nats up to a constant of each position. Arguments as for `forward`.

    Raises:
      JaxqkvError: for BERT, on ids that do not exist, and text longer than the positions.
    """
    if not isinstance(config, GPT2Config):
        raise JaxqkvError("logits are for GPT-2; a BERT checkpoint gives hidden states: call `hidden`")
    own = not config.tie_word_embeddings or "lm_head" in params["final"]
    embedding = params["final"]["lm_head"] if own else params["embed"]["wte"]
    return _unembed(hidden(params, batch, config, memory=memory, mesh=mesh), embedding["embedding"])


def _run(
    params: Params,
    batch: Batch,
    config: Config,
    capture: frozenset[str],
    selected: tuple[int, ...],
    reduce: Reducer | None = None,
    inputs: Any = None,
    memory: int | None = None,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
    check_each: bool = False,
) -> Iterator[tuple[int, Sequence[Array | None], Any]]:
    """Yields (layer, residual stream after it, what was asked of it), to the last layer that is selected.

    The stream is in microbatches. With no layer selected all are run, for the stream; else the last
    one's is not made, and None. Weights with NaN or infinite values are named at the end or, with
    `check_each`, at their layer.
    """
    embedding, embedding_config = params["embed"], config
    if isinstance(embedding, EmbeddingStream):
        embedding, ids, rows = embedding.of(batch.ids)
        batch, embedding_config = dataclasses.replace(batch, ids=ids), dataclasses.replace(config, vocab_size=rows)
    parts = 1 if mesh is None else mesh.shape["data"]
    pieces = _microbatches((batch, inputs), batch.ids.shape, config, memory, parts, whole=reduce is not None)
    sizes = [len(piece.ids) for piece, _ in pieces]
    if mesh is not None:
        check_split(mesh.shape["head"], config.n_head, config.n_inner)
        pieces = [place_batch(piece, mesh) for piece in pieces]
    stream: list[Any] = [_embed(embedding, piece, config=embedding_config) for piece, _ in pieces]
    last, how = max(selected, default=config.n_layer), execution(mesh)
    depth = min(last + 1, config.n_layer)
    layers = params["layers"]
    results: list[Any] = []
    entering: list[Array] = []  # what the last layer gets, where nothing goes on from it
    for layer in range(depth):
        busy = (stream, results)
        weights = layers.after(busy, layer) if isinstance(layers, LayerStream) else layers[layer]
        wanted = layer in selected
        if layer == last:
            entering = list(stream)
        block = functools.partial(
            _block,
            weights,
            layer=np.int32(layer),
            config=config,
            capture=capture if wanted else frozenset(),
            reduce=reduce if wanted else None,
            goes_on=layer < last,
            execution=how,
        )
        if wanted and reduce and (len(pieces) > 1 or sizes[0] % parts):
            _check_batch_axis(block, stream[0], pieces[0][1])
        results = []
        for index, (piece, piece_inputs) in enumerate(pieces):
            stream[index], result = block(stream[index], piece.mask, piece_inputs)
            results.append(_first(sizes[index], result, parts))
            if progress:
                jax.block_until_ready((stream[index], result))
                progress(layer * len(pieces) + index + 1, depth * len(pieces))
        if isinstance(layers, LayerStream) and (check_each or layer + 1 == depth):
            layers.check(entering or stream, layer + 1, made=not entering)
        yield layer, [_first(*pair, parts) for pair in zip(sizes, stream, strict=True)], _joined(results)


def _first(size: int, tree: Any, parts: int) -> Any:
    """Without what filled a batch up to equal parts."""
    return jax.tree.map(lambda leaf: leaf[:size], tree) if size % parts else tree


def _joined(results: Sequence[Any]) -> Any:
    """Microbatches' results put together along the batch axis."""
    return results[0] if len(results) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *results)


def _check_inputs(inputs: Any, reduce: Reducer | None, size: int) -> None:
    if reduce is None:
        raise JaxqkvError("`inputs` are for `reduce`, and none is given")
    wrong = [jnp.shape(leaf) for leaf in jax.tree.leaves(inputs) if jnp.shape(leaf)[:1] != (size,)]
    if wrong:
        raise JaxqkvError(f"`inputs` have the batch of {size} as their first axis; one of them is {list(wrong[0])}")


def _check_batch_axis(block: Callable[..., Any], x: Float[Array, "batch pos embed"], inputs: Any) -> None:
    """Refuses a reducer whose results cannot be joined: their first axis has to be the batch."""
    for size in (1, 2):
        x_piece, inputs_piece = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype),  # noqa: B023
            (x, inputs),
        )
        _, result = jax.eval_shape(block, x_piece, jax.ShapeDtypeStruct(x_piece.shape[:2], bool), inputs_piece)
        if any(leaf.shape[:1] != (size,) for leaf in jax.tree.leaves(result)):
            raise JaxqkvError(
                "the batch is cut to fit `memory` or filled up for the mesh, so each array that `reduce` returns must "
                "have it as its first axis"
            )


def _microbatches(
    tree: Any, shape: tuple[int, ...], config: Config, memory: int | None, parts: int, whole: bool
) -> list[Any]:
    """`tree` cut along the batch, in pieces that fit in `memory` on each of so many devices.

    Without a limit it is not cut if it is to stay `whole`.
    """
    size, pos = shape
    most = size
    if memory is not None:
        # Scores, pattern and the softmax's exponentials; Q, K, V, z and residuals; the MLP's two widths.
        floats = 3 * config.n_head * pos * pos + pos * (8 * config.n_embd + 2 * config.n_inner)
        most = max(1, memory // (4 * floats))
    if jax.default_backend() == "cpu" and not (memory is None and whole):
        most = min(most, max(1, CPU_TOKENS // pos))
    most *= parts
    step = -(-size // -(-size // most))
    step = -(-step // parts) * parts  # of the pieces only the last is uneven
    return [jax.tree.map(lambda leaf: leaf[start : start + step], tree) for start in range(0, size, step)]  # noqa: B023


def _checked_capture(capture: Collection[str] | None, reduce: Reducer | None) -> frozenset[str]:
    if reduce is not None and not callable(reduce):
        raise JaxqkvError(f"`reduce` is a function of one layer's Attention and the mask, not {reduce!r}")
    if capture is None:
        return frozenset() if reduce else frozenset("qkv")
    capture = frozenset([capture] if isinstance(capture, str) else capture)
    unknown = sorted(capture - set(FIELDS))
    if unknown:
        raise JaxqkvError(f"cannot capture {', '.join(unknown)}; there is {', '.join(FIELDS)}")
    if bool(capture) == bool(reduce):
        raise JaxqkvError("give either `capture`, names of what to return, or `reduce`, a function; not both, not none")
    return capture


def _checked_layers(layers: int | Iterable[int] | None, n_layer: int) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(n_layer))
    try:
        selected = tuple(sorted({operator.index(layer) for layer in np.atleast_1d(np.asarray(layers)).tolist()}))
    except (TypeError, ValueError):
        raise JaxqkvError(f"layers are whole numbers, not {layers!r}") from None
    bad = [layer for layer in selected if not 0 <= layer < n_layer]
    if bad or not selected:
        wrong = f"no layer {', '.join(map(str, bad))}" if bad else "no layer selected"
        raise JaxqkvError(f"{wrong}; the model's layers are 0 to {n_layer - 1}")
    return selected
