"""The run of the study: the corpus counted, a batch of it, and the layers reduced."""

import argparse
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxqkv.architectures.activations import Attention
from jaxqkv.architectures.attention import merge_heads, scaled_scores
from jaxqkv.errors import JaxqkvError
from jaxqkv.figures.panels import plain
from jaxqkv.kernels import bin_index, binned_moments, percentile_edges
from jaxqkv.model.request import Progress, Reducer
from jaxqkv.runtime import console, distributed
from jaxqkv.runtime.devices import execution, place_batch, precision
from jaxqkv.studies.options import load_model, pick_layer
from jaxqkv.studies.registry import Study
from jaxqkv.studies.token_frequency.pool import ENDS, LEFT_OUT, Pool, saved_key
from jaxqkv.text.corpora import DEFAULT, PYTHON_DOCS, open_corpus
from jaxqkv.text.counting import Place, Row, TokenCounts, count_and_rows
from jaxqkv.typing import AnyArray

TOKENS, BATCH = 1_000_000, 64
MEMORY = 2_000_000_000
SCORE_LAYER, BINNED_LAYER = 5, 7
BINS = 40
EVERY = 500
# Sequences that are run together, on each part of a mesh's `data`; the next are read meanwhile.
TOGETHER = 64
# Seconds between two savings of the state of a long run.
SAVE_EVERY = 30

# What figures need of the corpus: the counts, the batch; its ids, of every sequence.
COUNTS, BATCHED, IDS = "counts", "batch", "ids"
# Reductions of layers: over all sequences, except PAIRS.
ADJUSTMENT, PAIRS, BINNED = "adjustment", "pairs", "binned"
REDUCTIONS = {ADJUSTMENT, PAIRS, BINNED}
# Of every layer; without it, of the few that are shown.
EVERY_LAYER = "every layer"
# Of every sequence, for the layers that are shown.
EACH_ADJUSTMENT, EACH_BINNED = "adjustments", "bins"


def _reduce(
    attention: Attention,
    mask: Bool[AnyArray, "batch pos"],
    index: Int[AnyArray, "batch pair"],
    *,
    names: tuple[str, ...],
    sharded: bool,
) -> dict[str, Any]:
    """What is kept of a layer: norms `[batch, pos]`, every 500th score, the binned scores `[batch, bin]`."""
    attention = attention.astype(jnp.float32)
    results: dict[str, Any] = {}
    if ADJUSTMENT in names:
        results[ADJUSTMENT] = jnp.log(jnp.linalg.norm(attention.attn_out, axis=-1))
    if PAIRS in names or BINNED in names:
        score = mean_score(attention).reshape(len(mask), -1)
        if PAIRS in names:
            results[PAIRS] = score[:, ::EVERY]
        if BINNED in names:
            bins = functools.partial(binned_moments, n_bin=BINS)
            # One sequence after another is faster on a CPU; sequences on several devices go at once.
            _, mean, std = (
                jax.vmap(bins)(score, index) if sharded else jax.lax.map(lambda one: bins(*one), (score, index))
            )
            results[BINNED] = [mean, std]
    return results


def reducer(names: tuple[str, ...], mesh: Mesh | None) -> Reducer:
    """What `_reduce` keeps of a layer, for a model on that mesh."""
    return functools.partial(_reduce, names=names, sharded=execution(mesh).sharded)


def mean_score(attention: Attention) -> Float[Array, "batch query key"]:
    """The mean over heads of QKᵀ/√head_dim, which is one product over the whole width."""
    assert attention.q is not None  # which is captured, as k is
    assert attention.k is not None
    n_head, head_dim = attention.q.shape[1], attention.q.shape[-1]
    return scaled_scores(merge_heads(attention.q), merge_heads(attention.k), 1 / (head_dim**0.5 * n_head))


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Sequences that are run together, read while others run.

    Attributes:
      numbers: which ones of the batch.
      place: from where reading finds what comes after them.
      ids: their tokens.
      log_frequency: of those; NaN for a token that was never counted.
      edges: of each sequence's bins of pairs.
      index: the bin of each pair, on the device where that can be; −1 for a pair in none.
    """

    numbers: Int[np.ndarray, " sequence"]
    place: Place
    ids: Int[np.ndarray, "sequence pos"]
    log_frequency: Float[np.ndarray, "sequence pos"]
    edges: Float[np.ndarray, "sequence edge"]
    index: Int[AnyArray, "sequence pair"]


class Run:
    """Model and corpus; after `prepare` the counts, and what is kept of the batch and of its layers."""

    def __init__(self, options: argparse.Namespace):
        # A batch that is run in several parts uses the weights again; of one that is not, none are kept.
        self.model = load_model(options, STUDY, stream=None)
        self.config = self.model.config
        self.name = self.model.checkpoint.name
        self.label = plain(self.name)
        default = PYTHON_DOCS if options.demo else DEFAULT
        self.corpus = open_corpus(
            options.corpus or default,
            documents=options.documents or "files",
            text_column=options.text_column or "text",
        )
        self.cache = not options.no_cache and distributed.count() == 1
        self.tokens, self.batch_size = options.tokens or TOKENS, options.batch or BATCH
        self.memory = options.memory or MEMORY
        self.length = options.length or self.config.n_positions
        if self.length > self.config.n_positions:
            raise JaxqkvError(f"--length {self.length}: {self.name} has {self.config.n_positions} positions")
        depth = self.config.n_layer
        self.score_layer, self.score_note = pick_layer(options, SCORE_LAYER, depth, self.name)
        self.binned_layer, self.binned_note = pick_layer(options, BINNED_LAYER, depth, self.name)
        self.shown = [0, depth // 2, depth - 1]
        self.resume = bool(options.resume)
        self.state = self._state(options.out)
        self.key: dict[str, Any] = {}
        self.numbers: dict[str, Any] = {}
        self.notes: list[str] = []

    def describe(self) -> dict[str, Any]:
        """What the manifest says of this run."""
        about = {
            "checkpoint": [self.model.checkpoint.identity()],
            "corpus": self.corpus.about,
            "layer": {"5b": self.score_layer, "5c": self.binned_layer},
            "tokens": self.tokens,
            "batch": [self.batch_size, self.length],
            "memory": self.memory,
            "processes": distributed.count(),
            "mesh": None if self.model.mesh is None else dict(self.model.mesh.shape),
        }
        return about | self.numbers | {"notes": self.notes}

    @staticmethod
    def _state(out: Path | None) -> Path | None:
        """Where this process saves what it has; a run without a folder saves nothing."""
        if out is None:
            return None
        process = "" if distributed.count() == 1 else f"-{distributed.index()}-of-{distributed.count()}"
        return out / STUDY.name / f".state{process}.npz"

    @property
    def together(self) -> int:
        """Sequences in a chunk."""
        return TOGETHER * (1 if self.model.mesh is None else self.model.mesh.shape["data"])

    @property
    def in_parts(self) -> bool:
        """Whether the batch takes more than a chunk in each process, so that its state is saved."""
        return self.batch_size > self.together * distributed.count()

    def prepare(self, needs: Collection[str]) -> None:
        """One pass over the corpus, and the model run on it as it is read, to the last layer that is needed."""
        batched = bool(set(needs) - {COUNTS})
        names = tuple(sorted(REDUCTIONS & set(needs)))
        chosen = {ADJUSTMENT: self.shown, PAIRS: [self.score_layer], BINNED: [self.binned_layer]}
        few = sorted({layer for name in names for layer in chosen[name]})
        self.layers = list(range(self.config.n_layer)) if EVERY_LAYER in needs else few
        self.pool = Pool(len(self.layers), BINS, self.length, self._kept_of_each(needs))
        self.key = self._key(needs)
        if not self.resume and self.state is not None and (other := saved_key(self.state)):
            if other == self.key:
                note = "is of an interrupted run; --resume would go on from it, and this run begins anew"
                console.note(f"{self.state} {note}")
            elif batched and self.in_parts:
                console.note(f"{self.state} is of another run, interrupted or still running; this one replaces it")
        counts = self._resumed(self.state) if self.resume and self.state is not None else None
        start = self._start()
        if counts is not None or start is not None:
            self.notes.append(f"{len(self.pool.numbers):,} sequences were run before; --resume goes on after them")
        new_counts, rows = count_and_rows(
            self.corpus,
            self.model.tokenizer,
            self.config.vocab_size,
            tokens=self.tokens if COUNTS in needs and counts is None else None,
            batch=self.batch_size if batched else None,
            length=self.length,
            start=start,
            cache=self.cache,
        )
        counts = new_counts or counts
        if counts is not None:
            self.counts = counts
            self.numbers |= {"counted": counts.tokens, "counted documents": counts.documents}
            if counts.whole:
                self.notes.append(
                    f"{self.corpus.name} has {counts.tokens:,} tokens, fewer than {self.tokens:,}; all are counted"
                )
        if batched:
            self._run_batch(rows, counts, names)
        if batched and counts is not None:
            self.left_out = int(self.pool.sums[LEFT_OUT])
            self.numbers["left out"] = self.left_out
            size = self.batch_size * self.length
            self.notes.append(f"{self.left_out:,} of the batch's {size:,} tokens were never counted and are left out")

    def _kept_of_each(self, needs: Collection[str]) -> dict[str, tuple[tuple[int, ...], type]]:
        """Shape and type of what is kept of every sequence."""
        kept: dict[str, tuple[tuple[int, ...], type]] = {}
        if IDS in needs:
            kept[IDS] = ((self.length,), np.int32)
        if EACH_ADJUSTMENT in needs:
            kept[EACH_ADJUSTMENT] = ((len(self.shown), self.length), np.float32)
        if PAIRS in needs:
            kept[PAIRS] = ((len(range(0, self.length**2, EVERY)),), np.float32)
        if EACH_BINNED in needs:
            kept |= {"centres": ((BINS,), np.float64), "mean": ((BINS,), np.float32), "std": ((BINS,), np.float32)}
        return kept

    # --- a run in parts ---

    def _key(self, needs: Collection[str]) -> dict[str, Any]:
        """What has to be the same for a saved state to be of this run."""
        about = {name: value for name, value in self.describe().items() if name not in ("notes", "corpus", "memory")}
        key = about | {
            "corpus": self.corpus.fingerprint,
            "tokenizer": self.model.tokenizer.fingerprint,
            "dtype": self.model.weights.dtype.name,
            "precision": precision(),
            "figures' needs": sorted(needs),
            "sequences together": self.together,
        }
        as_saved: dict[str, Any] = json.loads(json.dumps(key))
        return as_saved

    def _resumed(self, state: Path) -> TokenCounts | None:
        """The saved state taken up, if every process has one; its counts."""
        there = distributed.gather(np.array([state.exists()]))
        if not all(each.all() for each in there):
            self.notes.append(f"there is no saved state in {state.parent}; the run begins with the first document")
            return None
        return self.pool.restore(state, self.key)

    def _start(self) -> Place | None:
        """Where all processes read on: at the place of the one that is least far; None for the beginning."""
        places = np.stack(distributed.gather(np.array([dataclasses.astuple(self.pool.place)])))[:, 0]
        place = Place(*min(places.tolist()))
        return None if place == Place() else place

    def _run_batch(self, rows: Iterator[Row], counts: TokenCounts | None, names: tuple[str, ...]) -> None:
        """Runs chunk after chunk, while the next one is read; after each the state may be saved."""
        state = self.state if self.in_parts else None
        reduce = reducer(names, self.model.mesh)  # one for all chunks: another one would be compiled anew
        last_saved = time.monotonic()
        last_run = max(self.pool.numbers, default=-1)
        rows = (row for row in rows if row.number > last_run)  # another process may have been less far
        with console.bar(total=self.batch_size, desc="sequences", unit="sequence") as bar:
            bar.update(len(self.pool.numbers) * distributed.count())
            for chunk in _ahead(self._chunks(rows, BINNED in names)):
                before, size = bar.n, len(chunk.ids) * distributed.count()

                def progress(done: int, total: int, before: int = before, size: int = size) -> None:
                    bar.update(before + size * done // total - bar.n)

                self._pool(chunk, self._reductions(chunk, reduce, progress) if names else {})
                progress(1, 1)
                if state is not None and time.monotonic() - last_saved > SAVE_EVERY:
                    self.pool.save(state, self.key, counts)
                    last_saved = time.monotonic()
        if state is not None:
            self.pool.save(state, self.key, counts)
        self.pool = self.pool.joined()

    def _chunks(self, rows: Iterator[Row], binned: bool) -> Iterator[Chunk]:
        """Rows together, and all that is computed from their tokens alone."""
        while group := list(itertools.islice(rows, self.together)):
            ids = np.stack([row.ids for row in group])
            log_frequency = self.counts.log_frequency[ids] if hasattr(self, "counts") else np.full(ids.shape, np.nan)
            edges, index = np.zeros((len(ids), 0)), np.full((len(ids), 1), -1, np.int8)
            if binned:
                edges, index = binned_pairs(log_frequency)
            mesh = self.model.mesh
            if mesh is None:
                index = jax.device_put(index)
            elif len(ids) % mesh.shape["data"] == 0:
                index = place_batch(index, mesh)
            numbers = np.array([row.number for row in group])
            yield Chunk(numbers, group[-1].place, ids, log_frequency, edges, index)

    def _reductions(self, chunk: Chunk, reduce: Reducer, progress: Progress) -> dict[str, Any]:
        """What `_reduce` makes of every layer, `[layer, sequence, …]`."""
        results = self.model.run(
            chunk.ids,
            layers=self.layers,
            reduce=reduce,
            inputs=chunk.index,
            memory=self.memory,
            progress=progress,
        )
        return jax.tree.map(np.asarray, results)

    def _pool(self, chunk: Chunk, reductions: dict[str, Any]) -> None:
        """Adds a chunk to the pool."""
        each: dict[str, np.ndarray] = {IDS: chunk.ids}
        centres = (chunk.edges[:, :-1] + chunk.edges[:, 1:]) / 2
        at = self.layers.index
        if ADJUSTMENT in reductions:
            adjustment = reductions[ADJUSTMENT]
            self.pool.add_moments(chunk.log_frequency[:, 1:], adjustment[:, :, 1:])
            each[EACH_ADJUSTMENT] = adjustment[[at(layer) for layer in self.shown]].swapaxes(0, 1)
        if PAIRS in reductions:
            each[PAIRS] = reductions[PAIRS][at(self.score_layer)]
        if BINNED in reductions:
            mean, std = reductions[BINNED]
            self.pool.add_bins(centres, mean, std)
            each |= {"centres": centres, "mean": mean[at(self.binned_layer)], "std": std[at(self.binned_layer)]}
        self.pool.sums[LEFT_OUT] += np.isnan(chunk.log_frequency).sum()
        self.pool.add(chunk.numbers, chunk.place, chunk.ids, self.batch_size, each)

    def finish(self) -> None:
        """What this run saved to go on from, in all its processes, is needed no more: the figures are there."""
        if self.state is not None:
            for path in self.state.parent.glob(".state*.npz"):
                if saved_key(path) == self.key:
                    path.unlink(missing_ok=True)

    def goes_on(self) -> list[str]:
        """Of an interrupted run: from where, if a state of it was saved."""
        if self.state is None or saved_key(self.state) != self.key:
            return []
        return [f"--resume goes on from {self.state}"]

    # --- for the figures ---

    @property
    def log_frequency(self) -> Float[np.ndarray, "batch pos"]:
        """Of every token of the batch."""
        return self.counts.log_frequency[self.pool[IDS]]

    @property
    def log_frequency_of_ends(self) -> Float[np.ndarray, "2 pos"]:
        """Of the tokens of the first and of the last sequence."""
        return self.counts.log_frequency[self.pool.sums[ENDS]]

    def correlations(self, layers: Sequence[int]) -> Float[np.ndarray, " layer"]:
        """r of log frequency and adjustment in some layers, over all positions but the first."""
        return self.pool.correlations()[[self.layers.index(layer) for layer in layers]].astype(np.float32)

    @property
    def of_batch(self) -> str:
        """How a caption ends."""
        left_out = ""
        if self.left_out:
            size = self.batch_size * self.length
            left_out = f" {self.left_out:,} of its {size:,} tokens were never counted and are left out."
        return f" {self.batch_size} documents of {self.corpus.name}, {self.length} tokens each.{left_out}"


Item = TypeVar("Item")


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; while one is used, a thread makes the next."""
    reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
    try:
        coming = reader.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = reader.submit(next, items, None)
            yield item
    finally:  # without waiting: what is being read may wait for another process
        reader.shutdown(wait=False, cancel_futures=True)


def pair_sums(log_frequency: Float[np.ndarray, " pos"]) -> Float[np.ndarray, "query key"]:
    """The sum of the log frequencies of every pair of tokens."""
    return log_frequency[:, None] + log_frequency[None, :]


def binned_pairs(
    log_frequency: Float[np.ndarray, "sequence pos"],
) -> tuple[Float[np.ndarray, "sequence edge"], Int[np.ndarray, "sequence pair"]]:
    """Edges of the bins of each sequence's pairs, and the bin of each pair; on all cores."""

    def one(row: Float[np.ndarray, " pos"]) -> tuple[np.ndarray, np.ndarray]:
        sums = pair_sums(row).ravel()
        edges = percentile_edges(sums, BINS)
        return edges, bin_index(sums, edges).astype(np.int8)

    with ThreadPoolExecutor() as threads:  # NumPy sorts and searches outside of Python's lock
        edges, index = zip(*threads.map(one, log_frequency), strict=True)
    return np.stack(edges), np.stack(index)


STUDY = Study(
    name="token-frequency",
    title="Token frequencies, attention adjustments, QKᵀ",
    models=("bert-large-uncased",),
    demo="demo-bert",
    run=Run,
    options=(
        "corpus",
        "documents",
        "text_column",
        "tokens",
        "batch",
        "length",
        "memory",
        "no_cache",
        "tokenizer",
        "dtype",
        "devices",
        "mesh",
        "distributed",
        "resume",
    ),
    finish=Run.finish,
    goes_on=Run.goes_on,
)


def undefined(*correlations: Float[np.ndarray, " each"]) -> str:
    """What a caption says of correlations that there are not."""
    count = int(sum(np.isnan(each).sum() for each in correlations))
    size = sum(each.size for each in correlations)
    why = "one side is constant, or there are fewer than two points"
    return f" {count} of {size} correlations undefined ({why}): NaN." if count else ""
