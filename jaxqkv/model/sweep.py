"""A metric after an edit of each head alone, in one pass over the layers.

The clean stream goes through the blocks once. At each layer an edited copy of it branches off for every head, and all
branches so far continue together, in chunks of one shape. Nothing before an edit is computed twice, each layer's
weights are read once, and logits are computed only at the positions that the metric looks at.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxqkv.architectures.base import Architecture, Params
from jaxqkv.architectures.sites import Editing
from jaxqkv.metrics import Metric
from jaxqkv.model import microbatches
from jaxqkv.model.branches import Branches
from jaxqkv.model.driver import embed, run_block, site_of
from jaxqkv.model.request import Progress
from jaxqkv.model.sources import Source
from jaxqkv.runtime.devices import Execution, check_split, execution, jit
from jaxqkv.text.batches import Batch

# Bytes that the branches of a sweep may take, unless `memory` is given.
BRANCH_BYTES = 1 << 30
# Positions whose logits are computed together. The output embedding is read anew for each group: with groups of 12
# positions a sweep of GPT-2 was a tenth slower on a CPU.
LOGIT_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What is asked of a sweep, checked.

    Attributes:
      branches: all branches, those of a layer together.
      layers: layer of each branch, ascending.
      metrics: metrics by name.
      memory: bytes for the branches and the temporaries of a block.
      mesh: devices that share the branches.
      progress: called after each microbatch.
    """

    branches: Branches
    layers: tuple[int, ...]
    metrics: Mapping[str, Metric]
    memory: int | None = None
    mesh: Mesh | None = None
    progress: Progress | None = None


@jit(static_argnames=("config", "execution", "count"))
def _branch_off(
    params: Params,
    x: Any,
    mask: Any,
    branches: Branches,
    layer: Any,
    start: Any,
    streams: Any,
    place: Any,
    *,
    config: Architecture,
    execution: Execution,
    count: int,
) -> tuple[Any, Any]:
    """Returns the clean stream after a layer, and the streams of `count` branches, `[branch · batch, pos, embed]`.

    If `streams` of more branches are given, those of these are put among them, at a branch's number `place`.
    """
    site = site_of(layer, mask, config)

    def run(edit: Mapping[str, Any]) -> Any:
        return config.block(params, x, site.visible, layer, execution, Editing(edit, site))[0]

    edited = branches.map(lambda edit: run(branches.at(edit, config, layer, start, len(x))), count)
    edited = edited.reshape(-1, *x.shape[1:])
    if streams is not None:
        edited = jax.lax.dynamic_update_slice_in_dim(streams, edited, place * len(x), axis=0)
    return run({}), edited


@jit(static_argnames=("config", "count"))
def measure(
    final: Params,
    head: Params | None,
    metrics: Mapping[str, Metric],
    places: Mapping[str, Any],
    clean: Any,
    streams: Sequence[Any],
    *,
    config: Architecture,
    count: int,
) -> dict[str, Any]:
    """Returns metrics `[branch, batch, …]` of the residual streams of several chunks of `count` branches.

    Args:
      final, head: parameters after the last block.
      metrics: metrics by name.
      places: positions `[batch, n]` of each metric.
      clean: stream of the clean run `[batch, pos, embed]`, or None if no metric needs it.
      streams: stream of each chunk, `[branch · batch, pos, embed]`.
      config: config of the model.
      count: number of branches in a chunk.
    """
    chunks = [stream.reshape(count, -1, *stream.shape[1:]) for stream in streams]
    found = {}
    for name, metric in metrics.items():
        index = jnp.asarray(places[name])[:, :, None]

        def values(taken: Any, metric: Metric = metric) -> Any:
            hidden = config.final(final, taken)
            return config.logits(head, hidden) if metric.of_logits and head is not None else hidden

        before = values(jnp.take_along_axis(clean, index, axis=1)) if metric.of_clean else None
        taken = jnp.concatenate([jnp.take_along_axis(chunk, index[None], axis=2) for chunk in chunks])
        found[name] = jax.vmap(lambda branch: metric(values(branch), before))(taken)  # noqa: B023
    return found


class Readout:
    """Metrics of final residual streams, for the sequences of one piece of the batch."""

    def __init__(self, source: Source, config: Architecture, metrics: Mapping[str, Metric], batch: Batch):
        self._source, self._config, self._metrics = source, config, metrics
        self._head = source.head(config) if any(metric.of_logits for metric in metrics.values()) else None
        self._places = {name: metric.places(batch) for name, metric in metrics.items()}
        self.of_clean = any(metric.of_clean for metric in metrics.values())

    def arguments(self, sequences: slice) -> tuple[Params, Params | None, dict[str, Metric], dict[str, Any]]:
        """Returns the first arguments of `measure` for some sequences."""
        metrics = {name: _of_sequences(metric, sequences) for name, metric in self._metrics.items()}
        places = {name: each[sequences] for name, each in self._places.items()}
        return self._source.final(), self._head, metrics, places

    @property
    def rows(self) -> int:
        """Number of positions in a sequence at which logits are computed."""
        return max(
            (self._places[name].shape[1] for name, metric in self._metrics.items() if metric.of_logits), default=1
        )

    def __call__(self, streams: Sequence[Any], clean: Any, sequences: slice, count: int) -> dict[str, Any]:
        """Returns metrics `[branch, batch, …]` of chunks of `count` branches, on the host."""
        arguments = self.arguments(sequences)
        found = measure(*arguments, clean if self.of_clean else None, streams, config=self._config, count=count)
        return jax.tree.map(np.asarray, found)


def _of_sequences(metric: Metric, sequences: slice) -> Metric:
    tokens = tuple(each[sequences] if each.ndim else each for each in metric.tokens)
    # The positions themselves are passed as `places`; here only whether there is a single one matters.
    return dataclasses.replace(metric, tokens=tokens, positions=None if metric.is_single else np.zeros(1, np.int32))


def exact(source: Source, batch: Batch, config: Architecture, sweep: Sweep) -> dict[str, Any]:
    """Returns metrics `[branch, batch, …]` of every branch."""
    return Passes(source, batch, config, sweep).results()


@dataclasses.dataclass
class _Chunk:
    """Branches that continue together.

    Attributes:
      parts: those that branch off together: their layer and their numbers. Layers ascend.
      piece: number of the piece of the batch.
      streams: `[part · branch · batch, pos, embed]`, from the first part's layer on.
    """

    parts: Sequence[tuple[int, np.ndarray]]
    piece: int
    streams: Any = None

    @property
    def first(self) -> int:
        """The layer where the first branches branch off."""
        return self.parts[0][0]


class Passes:
    """The passes of one sweep: one, or as many as the branches need to fit in memory."""

    def __init__(self, source: Source, batch: Batch, config: Architecture, sweep: Sweep):
        self.source, self.config, self.sweep, self.how = source, config, sweep, execution(sweep.mesh)
        self.devices = 1 if sweep.mesh is None else sweep.mesh.shape["data"]
        if sweep.mesh is not None:
            check_split(sweep.mesh.shape["head"], config.n_head, config.n_inner)
        self.readout = Readout(source, config, sweep.metrics, batch)  # before the run: there may be no logits
        size, pos = batch.ids.shape
        fit = microbatches.sequences_that_fit(pos, config, sweep.memory and max(1, sweep.memory // 2))
        step = -(-size // -(-size // fit))
        self.pieces = [slice(start, min(start + step, size)) for start in range(0, size, step)]
        embedding, ids, rows = source.embed(batch.ids)
        at = dataclasses.replace(config, vocab_size=rows) if rows else config
        pieces = [dataclasses.replace(batch, ids=ids)[piece] for piece in self.pieces]
        self.clean = [embed(embedding, piece, config=at) for piece in pieces]
        self.masks = [piece.mask for piece in pieces]
        layers = np.asarray(sweep.layers)
        self.of_layer = {int(layer): np.flatnonzero(layers == layer) for layer in np.unique(layers)}
        # Branches in a part of a chunk, and parts in a chunk. All chunks have one shape, so that the layers after an
        # edit are one program.
        most = max(map(len, self.of_layer.values()))
        self.count = min(-(-most // self.devices), max(1, fit // step)) * self.devices
        parts = sum(-(-len(numbers) // self.count) for numbers in self.of_layer.values())
        alike = min(microbatches.sequences_to_join(pos), fit) // (self.count * step) if sweep.mesh is None else 1
        self.slots = max(1, min(alike, parts))
        self.rows = [self._split(jnp.tile(jnp.asarray(mask), (self.slots * self.count, 1))) for mask in self.masks]
        self.branch_bytes = size * pos * config.n_embd * self.clean[0].dtype.itemsize
        # Chunks whose logits are computed together.
        most = LOGIT_ROWS if sweep.memory is None else min(LOGIT_ROWS, sweep.memory // (16 * config.vocab_size))
        chunks = -(-parts // self.slots)
        fit = max(1, most // (self.slots * self.count * step * self.readout.rows)) if self.devices == 1 else 1
        self.together = -(-chunks // -(-chunks // fit))

    def results(self) -> dict[str, Any]:
        """Returns metrics `[branch, batch, …]`."""
        groups, found, done = self._groups(), [], 0
        total = sum(self.config.n_layer - chunk.first for group in groups for chunk in group)
        entering = {group[0].first: self.clean for group in groups}  # clean streams at the first layer of each group
        for number, group in enumerate(groups):
            first, last = group[0].first if number else 0, group[-1].parts[-1][0]
            clean = entering[first] if number else self.clean
            for layer in range(first, self.config.n_layer):
                if number == 0 and layer in entering:
                    entering[layer] = clean
                begun = [chunk for chunk in group if chunk.streams is not None]
                params = self.source.layer(layer, after=(clean, [chunk.streams for chunk in begun]))
                for chunk in begun:
                    chunk.streams = self.block(params, layer, chunk.streams, self.rows[chunk.piece])
                if number == 0 or layer <= last:
                    clean = self._branched(params, layer, clean, group)
                done += sum(chunk.streams is not None for chunk in group)
                if self.sweep.progress:
                    jax.block_until_ready([chunk.streams for chunk in group])
                    self.sweep.progress(done, total)
            if number == 0:
                final = clean
            self.source.check([chunk.streams for chunk in group], self.config.n_layer, made=True)
            found += self._measured(group, final)
        return self._joined(found)

    def _measured(self, chunks: Sequence[_Chunk], final: Sequence[Any]) -> list[tuple[_Chunk, dict[str, Any]]]:
        """Returns the metrics of each chunk, several of one piece at a time, and frees their streams."""
        measured, count = [], self.slots * self.count
        for piece, sequences in enumerate(self.pieces):
            own = [chunk for chunk in chunks if chunk.piece == piece]
            for start in range(0, len(own), self.together):
                some = own[start : start + self.together]
                streams = [chunk.streams for chunk in some]
                streams += streams[-1:] * (self.together - len(some))
                found = self.readout(streams, final[piece], sequences, count)
                for index, chunk in enumerate(some):
                    own_rows = slice(index * count, (index + 1) * count)
                    measured.append((chunk, jax.tree.map(lambda leaf: leaf[own_rows], found)))  # noqa: B023
                    chunk.streams = None
        return measured

    def _groups(self) -> list[list[_Chunk]]:
        """Returns the chunks, in as few groups as fit in memory one after another."""
        limit = BRANCH_BYTES if self.sweep.memory is None else self.sweep.memory // 2
        room = max(1, limit * self.devices // (self.branch_bytes * self.count * self.slots)) * self.slots
        parts = [
            (layer, numbers[start : start + self.count])
            for layer, numbers in self.of_layer.items()
            for start in range(0, len(numbers), self.count)
        ]
        groups = (parts[start : start + room] for start in range(0, len(parts), room))
        return [
            [
                _Chunk(group[start : start + self.slots], piece)
                for start in range(0, len(group), self.slots)
                for piece in range(len(self.pieces))
            ]
            for group in groups
        ]

    def block(self, params: Params, layer: int, x: Any, mask: Any) -> Any:
        """Returns a stream after a layer in which nothing is edited."""
        options: dict[str, Any] = {"config": self.config, "capture": frozenset(), "reduce": None, "execution": self.how}
        return run_block(params, x, mask, layer=np.int32(layer), goes_on=True, **options)[0]

    def _branched(self, params: Params, layer: int, clean: Sequence[Any], chunks: Sequence[_Chunk]) -> list[Any]:
        """Lets the branches of a layer branch off, and returns the clean streams after it."""
        after: list[Any] = [None] * len(clean)
        for chunk in chunks:
            piece = chunk.piece
            for slot, (own_layer, own) in enumerate(chunk.parts):
                if own_layer != layer:
                    continue
                numbers = np.pad(own, (0, self.count - len(own)), mode="edge")
                if chunk.streams is None and self.slots > 1:  # zeros, where no part has branched off yet
                    shape = (self.slots * self.count * len(clean[piece]), *clean[piece].shape[1:])
                    chunk.streams = jnp.zeros(shape, clean[piece].dtype)
                after[piece], streams = _branch_off(
                    params,
                    clean[piece],
                    self.masks[piece],
                    self.sweep.branches.chosen(numbers).map_own(self._split),
                    np.int32(layer),
                    np.int32(self.pieces[piece].start),
                    chunk.streams,
                    np.int32(slot * self.count),
                    config=self.config,
                    execution=self.how,
                    count=self.count,
                )
                chunk.streams = self._split(streams)
        return [
            self.block(params, layer, clean[piece], self.masks[piece]) if each is None else each
            for piece, each in enumerate(after)
        ]

    def _split(self, array: Any) -> Any:
        """Returns an array `[branch, …]` split over the devices, if there are several."""
        if self.sweep.mesh is None:
            return array
        return jax.device_put(array, NamedSharding(self.sweep.mesh, PartitionSpec("data")))

    def _joined(self, found: Sequence[tuple[_Chunk, dict[str, Any]]]) -> dict[str, Any]:
        """Puts the chunks' metrics together, in the order of branches and sequences."""
        shape = (len(self.sweep.layers), self.pieces[-1].stop)
        joined = jax.tree.map(lambda leaf: np.empty((*shape, *leaf.shape[2:]), leaf.dtype), found[0][1])

        def put(whole: Any, rows: Any, chunk: _Chunk) -> None:
            for slot, (_, numbers) in enumerate(chunk.parts):
                whole[numbers, self.pieces[chunk.piece]] = rows[slot * self.count :][: len(numbers)]

        for chunk, metrics in found:
            jax.tree.map(lambda whole, part: put(whole, part, chunk), joined, metrics)  # noqa: B023
        return joined
