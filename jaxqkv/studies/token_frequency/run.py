"""The run of the study: counts a corpus, runs a batch of it, and reduces the layers."""

import dataclasses
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxqkv.errors import JaxqkvError
from jaxqkv.figures.panels import plain
from jaxqkv.model.reducers import Reducer
from jaxqkv.model.request import Progress
from jaxqkv.runtime import console, distributed
from jaxqkv.runtime.devices import precision
from jaxqkv.studies.layers import pick_layer
from jaxqkv.studies.opening import load_model
from jaxqkv.studies.study import Run
from jaxqkv.studies.token_frequency import STUDY, TokenFrequencyOptions
from jaxqkv.studies.token_frequency.chunks import Chunk, ahead, chunks
from jaxqkv.studies.token_frequency.frequencies import frequency_tests
from jaxqkv.studies.token_frequency.permuted_bins import bin_tests, correlation_null, cut_sums
from jaxqkv.studies.token_frequency.pool import ENDS, LEFT_OUT, MOMENTS, TOKENS, BinMoments, Pool, saved_key
from jaxqkv.studies.token_frequency.reductions import ADJUSTMENT, BINNED, BINS, PAIRS, TOKEN_PAIRS, pair_count, reducer
from jaxqkv.text.corpora import DEFAULT, PYTHON_DOCS, open_corpus
from jaxqkv.text.counting import Place, Row, TokenCounts, count_and_rows

SCORE_LAYER, BINNED_LAYER = 5, 7
# Sequences that are run together, on each part of a mesh's `data`; the next are read meanwhile.
TOGETHER = 64
# Seconds between two saves of the state of a long run.
SAVE_EVERY = 30

# Results made from layers, and the arrays kept for them: of the few layers shown, or of every layer.
OF_SHOWN_LAYERS = {"adjustments": ADJUSTMENT, "correlations": ADJUSTMENT, "pairs": PAIRS, "bins": BINNED}
OF_EVERY_LAYER = {"layer_correlations": ADJUSTMENT, "layer_bins": BINNED}
# Results that need the counts of the corpus. All except the counts themselves need the batch.
COUNTED = {"counts", "left_out", "correlations", "layer_correlations", "bins", "layer_bins"}


@STUDY.computation
class TokenFrequencyRun(Run):
    """One run of the study: a model and a corpus."""

    def __init__(self, options: TokenFrequencyOptions, folder: Path | None = None):
        # Weights are kept only for a batch that is run in several parts, which uses them again.
        self.model = load_model(options, STUDY, stream=None)
        self.config = self.model.config
        self.name = self.model.checkpoint.name
        self.label = plain(self.name)
        self.corpus = open_corpus(
            options.corpus or (PYTHON_DOCS if options.demo else DEFAULT),
            documents=options.documents,
            text_column=options.text_column,
        )
        self.cache = not options.no_cache and distributed.count() == 1
        self.tokens, self.batch_size, self.memory = options.tokens, options.batch, options.memory
        self.length = self.config.n_positions if options.length is None else options.length
        if self.length > self.config.n_positions:
            raise JaxqkvError(f"--length {self.length}: {self.name} has {self.config.n_positions} positions")
        depth = self.config.n_layer
        self.score_layer, self.score_note = pick_layer(options, SCORE_LAYER, depth, self.name)
        self.binned_layer, self.binned_note = pick_layer(options, BINNED_LAYER, depth, self.name)
        self.shown = [0, depth // 2, depth - 1]
        self.resume = options.resume
        self.seed, self.significance, self.permutations = options.seed, options.significance, options.permutations
        self.state = None if folder is None else folder / _state_name()
        self.key: dict[str, Any] = {}
        self.numbers: dict[str, Any] = {}
        self.notes: list[str] = []

    def describe(self) -> dict[str, Any]:
        """Returns what the manifest says of this run; after `compute` also what was counted and left out."""
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
        if self.significance:
            about |= {"permutations": self.permutations}
        return about | self.numbers | {"notes": self.notes}

    def compute(self, names: Collection[str]) -> dict[str, Any]:
        """Makes one pass over the corpus, and runs the model on it as it is read, to the last layer that is needed.

        Args:
          names: of the results.

        Returns:
          Of these, by name:
            counts: the `TokenCounts` of the corpus.
            left_out: how many tokens of the batch were never counted.
            ids: of the batch, `[sequence, pos]`.
            ends: ids of its first and last sequence, `[2, pos]`.
            adjustments: log norms of what attention adds, `[layer, sequence, pos]`, of the three layers `shown`.
            correlations: of adjustment and log frequency, over all positions but the first, in these layers.
            layer_correlations: the same in every layer.
            pairs: every 500th score of each sequence, `[sequence, pair]`, in `score_layer`.
            bins: `BinMoments` of the scores of each sequence in `binned_layer`.
            layer_bins: `BinMoments` of every layer, averaged over the sequences.
        """
        batched = bool(set(names) - {"counts"})
        counted = not COUNTED.isdisjoint(names)
        reductions = tuple(sorted({kept for name, kept in (OF_SHOWN_LAYERS | OF_EVERY_LAYER).items() if name in names}))
        self.layers = self._layers(names, reductions)
        vocab = self.config.vocab_size if self.significance and "layer_correlations" in names else 0
        self.bins_tested = self.significance and "layer_bins" in names
        self.pool = Pool(len(self.layers), BINS, self.length, self._kept_of_each(names), vocab)
        self.key = self._key(names)
        self._note_other_state(batched)
        counts = self._resumed(self.state) if self.resume and self.state is not None else None
        start = self._start()
        if counts is not None or start is not None:
            self.notes.append(f"{len(self.pool.numbers):,} sequences were run before; --resume goes on after them")
        new_counts, rows = count_and_rows(
            self.corpus,
            self.model.tokenizer,
            self.config.vocab_size,
            tokens=self.tokens if counted and counts is None else None,
            batch=self.batch_size if batched else None,
            length=self.length,
            start=start,
            cache=self.cache,
        )
        counts = new_counts or counts
        if counts is not None:
            self.numbers |= {"counted": counts.tokens, "counted documents": counts.documents}
            if counts.whole:
                self.notes.append(
                    f"{self.corpus.name} has {counts.tokens:,} tokens, fewer than {self.tokens:,}; all are counted"
                )
        if batched:
            self._run_batch(rows, counts, reductions)
        if batched and counts is not None:
            left_out, size = int(self.pool.sums[LEFT_OUT]), self.batch_size * self.length
            self.numbers["left out"] = left_out
            self.notes.append(f"{left_out:,} of the batch's {size:,} tokens were never counted and are left out")
        return self._results(names, counts)

    def _layers(self, names: Collection[str], reductions: Collection[str]) -> list[int]:
        """Returns the layers that are reduced."""
        if not OF_EVERY_LAYER.keys().isdisjoint(names):
            return list(range(self.config.n_layer))
        chosen = {ADJUSTMENT: self.shown, PAIRS: [self.score_layer], BINNED: [self.binned_layer]}
        return sorted({layer for each in reductions for layer in chosen[each]})

    def _kept_of_each(self, names: Collection[str]) -> dict[str, tuple[tuple[int, ...], type]]:
        """Returns shape and dtype of the arrays kept by sequence."""
        kept: dict[str, tuple[tuple[int, ...], type]] = {}
        if "ids" in names or self.bins_tested:
            kept["ids"] = ((self.length,), np.int32)
        if "adjustments" in names:
            kept["adjustments"] = ((len(self.shown), self.length), np.float32)
        if "pairs" in names:
            kept["pairs"] = ((pair_count(self.length),), np.float32)
        if "bins" in names:
            kept |= {"centres": ((BINS,), np.float64), "mean": ((BINS,), np.float32), "std": ((BINS,), np.float32)}
        if self.bins_tested:
            kept[TOKEN_PAIRS] = ((2, len(self.layers)), np.float32)
        return kept

    def _results(self, names: Collection[str], counts: TokenCounts | None) -> dict[str, Any]:
        pool, self.counts = self.pool, counts

        def correlations(layers: Sequence[int]) -> Float[np.ndarray, " layer"]:
            return pool.correlations()[[self.layers.index(layer) for layer in layers]].astype(np.float32)

        results: dict[str, Callable[[], Any]] = {
            "counts": lambda: counts,
            "left_out": lambda: int(pool.sums[LEFT_OUT]),
            "ids": lambda: pool["ids"],
            "ends": lambda: pool.sums[ENDS],
            "adjustments": lambda: pool["adjustments"].swapaxes(0, 1),
            "correlations": lambda: correlations(self.shown),
            "layer_correlations": lambda: correlations(range(self.config.n_layer)),
            "pairs": lambda: pool["pairs"],
            "bins": lambda: BinMoments(*(pool[name] for name in BinMoments._fields)),
            "layer_bins": pool.binned,
        }
        return {name: results[name]() for name in names}

    def correlation_tests(self, r: Float[np.ndarray, " layer"]) -> dict[str, Float[np.ndarray, " layer"]]:
        """Returns `p` and `q_value` of the correlations of every layer, with `--significance`."""
        if not self.significance or self.counts is None:
            return {}
        sums = self.pool.sums
        how = {"seed": self.seed, "permutations": self.permutations}
        tests = frequency_tests(sums[TOKENS], sums[MOMENTS][:, 5], self.counts.log_frequency, r, **how)
        return dict(zip(("p", "q_value"), tests, strict=True))

    def bin_tests(self, *r: Float[np.ndarray, " layer"]) -> dict[str, Float[np.ndarray, " layer"]]:
        """Returns p and q-values of the correlations over bins of every layer, with `--significance`."""
        return bin_tests(self.bin_null, *r) if self.bins_tested else {}

    # --- the batch, in parts ---

    @property
    def together(self) -> int:
        """Sequences in a chunk."""
        return TOGETHER * (1 if self.model.mesh is None else self.model.mesh.shape["data"])

    @property
    def in_parts(self) -> bool:
        """Returns whether the batch takes more than a chunk in each process, so that its state is saved."""
        return self.batch_size > self.together * distributed.count()

    def _run_batch(self, rows: Iterator[Row], counts: TokenCounts | None, reductions: tuple[str, ...]) -> None:
        """Runs chunk after chunk, while the next one is read; after each the state may be saved."""
        state = self.state if self.in_parts else None
        mesh = self.model.mesh
        reduce = reducer(reductions, mesh)  # one for all chunks: another one would be compiled anew
        last_saved = time.monotonic()
        last_run = max(self.pool.numbers, default=-1)
        rows = (row for row in rows if row.number > last_run)  # another process may have been less far
        with console.bar(total=self.batch_size, desc="sequences", unit="sequence") as bar:
            bar.update(len(self.pool.numbers) * distributed.count())
            for chunk in ahead(chunks(rows, self.together, counts, BINNED in reductions, mesh, self.bins_tested)):
                before, size = bar.n, len(chunk.ids) * distributed.count()

                def progress(done: int, total: int, before: int = before, size: int = size) -> None:
                    bar.update(before + size * done // total - bar.n)

                self._pool(chunk, self._reduced(chunk, reduce, progress) if reductions else {})
                progress(1, 1)
                if state is not None and time.monotonic() - last_saved > SAVE_EVERY:
                    self.pool.save(state, self.key, counts)
                    last_saved = time.monotonic()
        if state is not None:
            self.pool.save(state, self.key, counts)
        if self.bins_tested and counts is not None:
            how = {"seed": self.seed, "permutations": self.permutations}
            self.bin_null = correlation_null(self.pool["ids"], self.pool[TOKEN_PAIRS], counts.log_frequency, **how)
        self.pool = self.pool.joined()

    def _reduced(self, chunk: Chunk, reduce: Reducer, progress: Progress) -> dict[str, Any]:
        """Returns what `reduce` keeps of every layer, `[layer, sequence, …]`."""
        results = self.model.run(
            chunk.ids,
            layers=self.layers,
            reduce=reduce,
            inputs=chunk.inputs,
            memory=self.memory,
            progress=progress,
        )
        return jax.tree.map(np.asarray, results)

    def _pool(self, chunk: Chunk, reduced: dict[str, Any]) -> None:
        """Adds a chunk to the pool."""
        each: dict[str, np.ndarray] = {"ids": chunk.ids}
        centres = (chunk.edges[:, :-1] + chunk.edges[:, 1:]) / 2
        at = self.layers.index
        if ADJUSTMENT in reduced:
            adjustment = reduced[ADJUSTMENT]
            self.pool.add_moments(chunk.log_frequency[:, 1:], adjustment[:, :, 1:])
            if self.pool.sums[TOKENS].size:
                self.pool.add_tokens(chunk.ids[:, 1:], chunk.log_frequency[:, 1:], adjustment[:, :, 1:])
            each["adjustments"] = adjustment[[at(layer) for layer in self.shown]].swapaxes(0, 1)
        if PAIRS in reduced:
            each["pairs"] = reduced[PAIRS][at(self.score_layer)]
        if BINNED in reduced:
            mean, std = reduced[BINNED]
            self.pool.add_bins(centres, mean, std)
            each |= {"centres": centres, "mean": mean[at(self.binned_layer)], "std": std[at(self.binned_layer)]}
        if TOKEN_PAIRS in reduced:
            each[TOKEN_PAIRS] = cut_sums(reduced[TOKEN_PAIRS], chunk.occurrences)
        self.pool.sums[LEFT_OUT] += np.isnan(chunk.log_frequency).sum()
        self.pool.add(chunk.numbers, chunk.place, chunk.ids, self.batch_size, each)

    # --- a run that continues from a saved state ---

    def _key(self, names: Collection[str]) -> dict[str, Any]:
        """Returns the settings that a saved state must share with this run."""
        about = {name: value for name, value in self.describe().items() if name not in ("notes", "corpus", "memory")}
        key = about | {
            "corpus": self.corpus.fingerprint,
            "tokenizer": self.model.tokenizer.fingerprint,
            "dtype": self.model.weights.dtype.name,
            "precision": precision(),
            "figures' needs": sorted(names),
            "sequences together": self.together,
        }
        as_saved: dict[str, Any] = json.loads(json.dumps(key))
        return as_saved

    def _note_other_state(self, batched: bool) -> None:
        """Notes a saved state that this run does not continue."""
        if self.resume or self.state is None or not (other := saved_key(self.state)):
            return
        if other == self.key:
            note = "is of an interrupted run; --resume would go on from it, and this run begins anew"
            console.note(f"{self.state} {note}")
        elif batched and self.in_parts:
            console.note(f"{self.state} is of another run, interrupted or still running; this one replaces it")

    def _resumed(self, state: Path) -> TokenCounts | None:
        """Restores the saved state, if every process has one, and returns its counts."""
        there = distributed.gather(np.array([state.exists()]))
        if not all(each.all() for each in there):
            self.notes.append(f"there is no saved state in {state.parent}; the run begins with the first document")
            return None
        return self.pool.restore(state, self.key)

    def _start(self) -> Place | None:
        """Returns the place of the process that has read least, where all continue; None for the beginning."""
        places = np.stack(distributed.gather(np.array([dataclasses.astuple(self.pool.place)])))[:, 0]
        place = Place(*min(places.tolist()))
        return None if place == Place() else place

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Removes the saved states of all processes when the figures are written.

        Raises:
          KeyboardInterrupt: if interrupted; the message says how to continue if a state was saved.
        """
        if self.state is None:
            return
        if kind is None and distributed.index() == 0:  # the other processes end before the first has drawn
            for path in self.state.parent.glob(".state*.npz"):
                if saved_key(path) == self.key:
                    path.unlink(missing_ok=True)
        if isinstance(error, KeyboardInterrupt) and saved_key(self.state) == self.key:
            raise KeyboardInterrupt(f"--resume goes on from {self.state}") from None

    # --- for the captions ---

    def of_batch(self, left_out: int) -> str:
        """Returns the end of a caption, given how many tokens of the batch were never counted."""
        never = ""
        if left_out:
            size = self.batch_size * self.length
            never = f" {left_out:,} of its {size:,} tokens were never counted and are left out."
        return f" {self.batch_size} documents of {self.corpus.name}, {self.length} tokens each.{never}"


def _state_name() -> str:
    """Returns the name of the file in which this process saves its state."""
    process = "" if distributed.count() == 1 else f"-{distributed.index()}-of-{distributed.count()}"
    return f".state{process}.npz"


def undefined(*correlations: Float[np.ndarray, " each"]) -> str:
    """Returns a caption's sentence about undefined correlations."""
    count = int(sum(np.isnan(each).sum() for each in correlations))
    size = sum(each.size for each in correlations)
    why = "one side is constant, or there are fewer than two points"
    return f" {count} of {size} correlations undefined ({why}): NaN." if count else ""
