"""The run of the study: the corpus counted, a batch of it, and the layers reduced."""

import argparse
import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from jaxqkv import distributed
from jaxqkv.activations import AnyArray, Attention
from jaxqkv.attention import merge_heads, scaled_scores
from jaxqkv.corpus import DEFAULT, PYTHON_DOCS, open_corpus
from jaxqkv.counting import count_and_batch
from jaxqkv.errors import JaxqkvError
from jaxqkv.figures.registry import Study
from jaxqkv.kernels import bin_index, binned_moments, percentile_edges
from jaxqkv.studies.options import load_model, pick_layer

TOKENS, BATCH = 1_000_000, 64
MEMORY = 2_000_000_000
SCORE_LAYER, BINNED_LAYER = 5, 7
BINS = 40
EVERY = 500

# What figures need: the corpus counted, a batch of it, and reductions of layers.
COUNTS, IDS = "counts", "batch"
ADJUSTMENT, PAIRS, BINNED = "adjustment", "pairs", "binned"
REDUCTIONS = {ADJUSTMENT, PAIRS, BINNED}
# Of every layer; without it, of the few that are shown.
EVERY_LAYER = "every layer"


def _reduce(
    attention: Attention,
    mask: Bool[AnyArray, "batch pos"],
    index: Int[AnyArray, "batch pair"],
    *,
    names: tuple[str, ...],
    sharded: bool,
) -> dict[str, Any]:
    """What is kept of a layer: norms `[batch, pos]`, every 500th score, the binned scores `[batch, bin]`."""
    attention, results = attention.astype(jnp.float32), {}
    if ADJUSTMENT in names:
        results[ADJUSTMENT] = jnp.log(jnp.linalg.norm(attention.attn_out, axis=-1))
    if PAIRS in names or BINNED in names:
        score = mean_score(attention).reshape(len(mask), -1)
        if PAIRS in names:
            results[PAIRS] = score[:, ::EVERY]
        if BINNED in names:
            bins = functools.partial(binned_moments, n_bin=BINS)
            # One sequence after another is faster on a CPU; sequences on several devices go at once.
            _, *results[BINNED] = (
                jax.vmap(bins)(score, index) if sharded else jax.lax.map(lambda one: bins(*one), (score, index))
            )
    return results


def mean_score(attention: Attention) -> Float[Array, "batch query key"]:
    """The mean over heads of QKᵀ/√head_dim, which is one product over the whole width."""
    n_head, head_dim = attention.q.shape[1], attention.q.shape[-1]
    return scaled_scores(merge_heads(attention.q), merge_heads(attention.k), 1 / (head_dim**0.5 * n_head))


class Run:
    """Model and corpus; after `prepare` the counts, the batch and the reductions of layers."""

    def __init__(self, options: argparse.Namespace):
        self.model = load_model(options, STUDY)
        self.config = self.model.config
        self.name = self.model.checkpoint.name
        default = PYTHON_DOCS if options.demo else DEFAULT
        self.corpus = open_corpus(
            options.corpus or default,
            documents=options.documents or "files",
            text_column=options.text_column or "text",
        )
        self.cache = not options.no_cache
        self.tokens, self.batch_size = options.tokens or TOKENS, options.batch or BATCH
        self.memory = options.memory or MEMORY
        self.length = options.length or self.config.n_positions
        if self.length > self.config.n_positions:
            raise JaxqkvError(f"--length {self.length}: {self.name} has {self.config.n_positions} positions")
        depth = self.config.n_layer
        self.score_layer, self.score_note = pick_layer(options, SCORE_LAYER, depth, self.name)
        self.binned_layer, self.binned_note = pick_layer(options, BINNED_LAYER, depth, self.name)
        self.shown = [0, depth // 2, depth - 1]
        self.numbers: dict[str, Any] = {}
        self.notes: list[str] = []

    def describe(self) -> dict[str, Any]:
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

    def prepare(self, needs: Collection[str]) -> None:
        """One pass over the corpus, then one over the layers, to the last that is needed."""
        counts, ids = count_and_batch(
            self.corpus,
            self.model.tokenizer,
            self.config.vocab_size,
            tokens=self.tokens if COUNTS in needs else None,
            batch=self.batch_size if IDS in needs else None,
            length=self.length,
            cache=self.cache and distributed.count() == 1,
        )
        if counts is not None:
            self.counts = counts
            self.numbers |= {"counted": counts.tokens, "counted documents": counts.documents}
            if counts.whole:
                self.notes.append(
                    f"{self.corpus.name} has {counts.tokens:,} tokens, fewer than {self.tokens:,}; all are counted"
                )
        if ids is not None:
            self.ids = ids
        if counts is not None and ids is not None:
            self.log_frequency = counts.log_frequency[ids]
            self.left_out = int(np.isnan(self.log_frequency).sum())
            self.numbers["left out"] = self.left_out
            self.notes.append(
                f"{self.left_out:,} of the batch's {ids.size:,} tokens were never counted and are left out"
            )
        names = tuple(sorted(REDUCTIONS & set(needs)))
        if names:
            self._run_model(names, EVERY_LAYER in needs)

    def _run_model(self, names: tuple[str, ...], every_layer: bool) -> None:
        chosen = {ADJUSTMENT: self.shown, PAIRS: [self.score_layer], BINNED: [self.binned_layer]}
        few = sorted({layer for name in names for layer in chosen[name]})
        self.layers = list(range(self.config.n_layer)) if every_layer else few
        if len(self.ids) < distributed.count():
            raise JaxqkvError(f"{distributed.count()} processes need as many sequences; --batch is {len(self.ids)}")
        mine = distributed.share(len(self.ids))
        index = np.full((len(self.ids[mine]), 1), -1, np.int8)
        if BINNED in names:
            edges, index = map(np.stack, zip(*map(_bins, self.log_frequency[mine]), strict=True))
            self.edges = distributed.joined(edges)
        mesh = self.model.mesh
        with tqdm(desc="layers × microbatches", unit="block", delay=1, disable=None) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            results = self.model.run(
                self.ids[mine],
                layers=self.layers,
                reduce=functools.partial(_reduce, names=names, sharded=mesh is not None and mesh.size > 1),
                inputs=index,
                memory=self.memory,
                progress=progress,
            )
        self.reductions = jax.tree.map(lambda leaf: distributed.joined(np.asarray(leaf), axis=1), results)

    def of_layers(self, name: str, layers: Collection[int]) -> Any:
        """A reduction's arrays at some layers."""
        places = [self.layers.index(layer) for layer in layers]
        return jax.tree.map(lambda array: array[places], self.reductions[name])

    @property
    def centres(self) -> Float[np.ndarray, "batch bin"]:
        """The middle of each sequence's bins."""
        return (self.edges[:, :-1] + self.edges[:, 1:]) / 2

    @property
    def of_batch(self) -> str:
        """How a caption ends."""
        size, length = self.ids.shape
        left_out = ""
        if self.left_out:
            left_out = f" {self.left_out:,} of its {self.ids.size:,} tokens were never counted and are left out."
        return f" {size} documents of {self.corpus.name}, {length} tokens each.{left_out}"


def pair_sums(log_frequency: Float[np.ndarray, " pos"]) -> Float[np.ndarray, "query key"]:
    """The sum of the log frequencies of every pair of tokens."""
    return log_frequency[:, None] + log_frequency[None, :]


def _bins(log_frequency: Float[np.ndarray, " pos"]) -> tuple[Float[np.ndarray, "edge"], Int[np.ndarray, "pair"]]:
    """Edges of the bins of one sequence's pairs, and the bin of each pair."""
    sums = pair_sums(log_frequency).ravel()
    edges = percentile_edges(sums, BINS)
    return edges, bin_index(sums, edges).astype(np.int8)


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
    ),
)


def undefined(*correlations: Float[np.ndarray, " each"]) -> str:
    """What a caption says of correlations that there are not."""
    count = int(sum(np.isnan(each).sum() for each in correlations))
    size = sum(each.size for each in correlations)
    why = "one side is constant, or there are fewer than two points"
    return f" {count} of {size} correlations undefined ({why}): NaN." if count else ""
