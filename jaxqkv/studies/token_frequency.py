"""Study 3: token frequencies, attention adjustments and QKᵀ, on documents of a corpus.

Source: Mike X Cohen, "50 ML projects to understand LLMs", project 39, token frequencies, attention
adjustments, and QK^T.
"""

import argparse
import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from jaxqkv.activations import AnyArray, Attention
from jaxqkv.attention import merge_heads, scaled_scores
from jaxqkv.corpus import DEFAULT, PYTHON_DOCS, open_corpus
from jaxqkv.counting import count_and_batch
from jaxqkv.devices import jit
from jaxqkv.errors import JaxqkvError
from jaxqkv.figures import style
from jaxqkv.figures.displays import Display, Image, Line, Lines, Panel, Table, layer_lines
from jaxqkv.figures.registry import Study
from jaxqkv.kernels import bin_index, binned_moments, pearson, percentile_edges
from jaxqkv.studies.options import load_model, pick_layer

TOKENS, BATCH = 1_000_000, 64
MEMORY = 2_000_000_000
SCORE_LAYER, BINNED_LAYER = 5, 7
BINS = 40
EVERY = 500
MOST_FREQUENT = 20

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
) -> dict[str, Any]:
    """What is kept of a layer: norms `[batch, pos]`, every 500th score, the binned scores `[batch, bin]`."""
    results: dict[str, Any] = {}
    if ADJUSTMENT in names:
        results[ADJUSTMENT] = jnp.log(jnp.linalg.norm(attention.attn_out, axis=-1))
    if PAIRS in names or BINNED in names:
        score = mean_score(attention).reshape(len(mask), -1)
        if PAIRS in names:
            results[PAIRS] = score[:, ::EVERY]
        if BINNED in names:
            _, *results[BINNED] = jax.lax.map(lambda one: binned_moments(*one, n_bin=BINS), (score, index))
    return results


def mean_score(attention: Attention) -> Float[Array, "batch query key"]:
    """The mean over heads of QKᵀ/√head_dim, which is one product over the whole width."""
    n_head, head_dim = attention.q.shape[1], attention.q.shape[-1]
    return scaled_scores(merge_heads(attention.q), merge_heads(attention.k), 1 / (head_dim**0.5 * n_head))


@jit
def _adjustment_correlations(
    adjustment: Float[AnyArray, "layer batch pos"], log_frequency: Float[AnyArray, "batch pos"]
) -> Float[Array, " layer"]:
    """r of each layer over all positions but the first, where there is a log frequency."""
    x = log_frequency[:, 1:]
    known = ~jnp.isnan(x)
    return jax.vmap(lambda y: pearson(x, y, known))(adjustment[:, :, 1:])


@jit
def _row_correlations(x: Float[AnyArray, "row bin"], y: Float[AnyArray, "row bin"]) -> Float[Array, " row"]:
    """r of each row, over the bins that are not empty."""
    return jax.vmap(lambda a, b: pearson(a, b, ~jnp.isnan(b)))(x, y)


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
            cache=self.cache,
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
        index = np.full((len(self.ids), 1), -1, np.int8)
        if BINNED in names:
            self.edges = np.stack([percentile_edges(_pair_sums(row), BINS) for row in self.log_frequency])
            binned = zip(self.log_frequency, self.edges, strict=True)
            index = np.stack([bin_index(_pair_sums(row), edges).ravel().astype(np.int8) for row, edges in binned])
        with tqdm(desc="layers × microbatches", unit="block", delay=1, disable=None) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            results = self.model.run(
                self.ids,
                layers=self.layers,
                reduce=functools.partial(_reduce, names=names),
                inputs=index,
                memory=self.memory,
                progress=progress,
            )
        self.reductions = jax.tree.map(np.asarray, results)

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


def _pair_sums(log_frequency: Float[np.ndarray, " pos"]) -> Float[np.ndarray, "query key"]:
    """The sum of the log frequencies of every pair of tokens."""
    return log_frequency[:, None] + log_frequency[None, :]


STUDY = Study(
    name="token-frequency",
    title="Token frequencies, attention adjustments, QKᵀ",
    models=("bert-large-uncased",),
    demo="demo-bert",
    run=Run,
    options=("corpus", "documents", "text_column", "tokens", "batch", "length", "memory", "no_cache", "tokenizer"),
)

POINTS = {"marker": "o", "linestyle": ""}
SUM = "Log-probability sum"


@STUDY.figure("1", "log frequency by token", needs={COUNTS})
def figure_1(run: Run) -> Display:
    counts, log_frequency = run.counts.counts, run.counts.log_frequency
    order = np.argsort(-counts, kind="stable")[:MOST_FREQUENT]
    order = order[counts[order] > 0]
    rows = [
        (f"{token!r}", f"{counts[i]:,}", f"{np.exp(log_frequency[i]):.2%}")
        for i, token in zip(order, run.model.tokenizer.tokens(order.tolist()), strict=True)
    ]
    seen = np.flatnonzero(counts)
    panel = Lines(
        lines=[Line(x=seen, y=log_frequency[seen], color=style.POINTS, **POINTS)],
        xlabel="Token index",
        ylabel="Token log-frequency",
        title=f"Empirical proportions in {run.counts.tokens:,} tokens",
        xlim=(0, counts.size),
    )
    whole = f" The corpus has fewer than {run.tokens:,}." if run.counts.whole else ""
    return Display(
        arrays={"counts": counts, "log_frequency": log_frequency},
        panels=[[panel]],
        caption=f"Natural logarithm of each token's share of {run.counts.tokens:,} tokens, from "
        f"{run.counts.documents:,} documents of {run.corpus.name}, by the tokenizer of {run.name}; "
        f"{seen.size:,} of {counts.size:,} tokens occur.{whole}",
        size=(10, 3),
        text=Table(heading=("token", "occurrences", "share"), rows=rows).text(),
    )


@STUDY.figure("2", "the batch of tokens", needs={IDS})
def figure_2(run: Run) -> Display:
    size, length = run.ids.shape
    image = Image(
        values=run.ids,
        cmap="magma",
        origin="lower",
        extent=(0, length, 0, size),
        xlabel="Token position",
        ylabel="Sequence",
        colorbar="Token index",
    )
    return Display(
        arrays={"ids": run.ids},
        panels=[[image]],
        caption=f"Token indices of the batch: the first {length} tokens of the first {size} documents of "
        f"{run.corpus.name} that have as many.",
        size=(8, 4),
    )


@STUDY.figure("4a", "adjustment by log frequency in three layers", needs={COUNTS, IDS, ADJUSTMENT})
def figure_4a(run: Run) -> Display:
    adjustment = run.of_layers(ADJUSTMENT, run.shown)
    r = np.asarray(_adjustment_correlations(adjustment, run.log_frequency.astype(np.float32)))
    x, panels = run.log_frequency, []
    for layer, y, each in zip(run.shown, adjustment, r.tolist(), strict=True):
        lines = [
            Line(x=x[:, 1:].ravel(), y=y[:, 1:].ravel(), color=style.POINTS, alpha=0.3, **POINTS),
            Line(x=x[:, 0], y=y[:, 0], color=style.FIRST, marker="x", size=6, linestyle="", label="first position"),
        ]
        panels.append(
            Lines(
                lines=lines,
                xlabel="Log token proportion",
                ylabel="Log vector norm",
                title=f"Layer {layer} ({_r(each)})",
            )
        )
    return Display(
        arrays={"log_frequency": x, "adjustment": adjustment, "r": r, "left_out": run.left_out},
        panels=[panels],
        caption="Logarithm of the norm of what attention adds to the residual stream, against the token's log "
        f"frequency, in the first, middle and last layer of {run.name}; crosses, the first position; r over the "
        f"others.{_undefined(r)}{run.of_batch}",
        size=(12, 3.4),
    )


@STUDY.figure(
    "4b", "correlation of adjustment and log frequency by layer", needs={COUNTS, IDS, ADJUSTMENT, EVERY_LAYER}
)
def figure_4b(run: Run) -> Display:
    adjustment = run.of_layers(ADJUSTMENT, range(run.config.n_layer))
    r = np.asarray(_adjustment_correlations(adjustment, run.log_frequency.astype(np.float32)))
    points = layer_lines([np.array([layer]) for layer in range(len(r))], r[:, None])
    for point in points:
        point.marker, point.face = "s", 1.0
    panel = Lines(
        lines=points,
        xlabel="Transformer layer",
        ylabel="Correlation coefficient",
        title="Attention adjustment magnitudes vs. token frequency",
        integer_x=True,
        zero_y=True,
    )
    return Display(
        arrays={"r": r, "left_out": run.left_out},
        panels=[[panel]],
        caption=f"Figure 4a's correlation in each layer of {run.name}.{_undefined(r)}{run.of_batch}",
        size=(8, 3),
    )


@STUDY.figure("5a", "log frequencies of every pair of one sequence", needs={COUNTS, IDS})
def figure_5a(run: Run) -> Display:
    sums = _pair_sums(run.log_frequency[0])
    image = Image(
        values=sums,
        cmap="viridis",
        aspect="equal",
        xlabel="Token position",
        ylabel="Token position",
        title="Token proportion product pairs",
        colorbar=SUM,
    )
    return Display(
        arrays={"pair_log_frequency": sums, "left_out": run.left_out},
        panels=[[image]],
        caption=f"Sum of the log frequencies of every pair of tokens of the first sequence.{run.of_batch}",
        size=(6, 5),
    )


@STUDY.figure("5b", "score by log frequency of the pair", needs={COUNTS, IDS, PAIRS})
def figure_5b(run: Run) -> Display:
    sums = np.stack([_pair_sums(row).ravel()[::EVERY] for row in run.log_frequency])
    (scores,) = run.of_layers(PAIRS, [run.score_layer])
    known = ~np.isnan(sums)
    lines = [
        Line(x=a[k], y=b[k], color=color, size=3, alpha=0.5, **POINTS)
        for a, b, k, color in zip(sums, scores, known, _sequence_colors(run), strict=True)
    ]
    panel = Lines(lines=lines, xlabel=SUM, ylabel=r"$\mathbf{QK^\top}$", title=f"Layer {run.score_layer}")
    return Display(
        arrays={"pair_log_frequency": sums[known], "score": scores[known], "left_out": run.left_out},
        panels=[[panel]],
        caption=f"Mean over heads of the scores in layer {run.score_layer} of {run.name} against the sum of the pair's "
        f"log frequencies, every {EVERY}th pair of every sequence, a colour a sequence.{run.of_batch}{run.score_note}",
        size=(7, 4.6),
    )


@STUDY.figure("5-edges", "edges of bins with equal counts and with equal widths", needs={COUNTS, IDS})
def figure_5_edges(run: Run) -> Display:
    sums = _pair_sums(run.log_frequency[-1])
    percentile = percentile_edges(sums, BINS)
    ends = percentile[[0, -1]]
    linear = np.linspace(*ends, BINS + 1)
    lines = [
        Line(x=ends, y=ends, color="0.5", linestyle="--"),
        Line(x=percentile, y=linear, color=style.V, marker="h", linestyle=""),
    ]
    panel = Lines(
        lines=lines,
        xlabel="Edges from percentiles (equal counts)",
        ylabel="Edges from linspace (equal widths)",
    )
    return Display(
        arrays={"percentile_edges": percentile, "linear_edges": linear, "left_out": run.left_out},
        panels=[[panel]],
        caption=f"Edges of {BINS} bins of the sums of log frequencies of the last sequence's pairs: equally many pairs "
        f"a bin, against equal widths; dashed, where they would be the same.{run.of_batch}",
        size=(6, 5),
    )


def _binned(run: Run) -> tuple[np.ndarray, ...]:
    """Centres, means and standard deviations `[batch, bin]` of the layer, and their correlations `[batch]`."""
    mean, std = (each[0] for each in run.of_layers(BINNED, [run.binned_layer]))
    centres = run.centres
    r = [np.asarray(_row_correlations(centres.astype(np.float32), y)) for y in (mean, std)]
    return centres, mean, std, *r


@STUDY.figure("5c", "score in bins of the pair's log frequency", needs={COUNTS, IDS, BINNED})
def figure_5c(run: Run) -> Display:
    centres, mean, std, *_ = _binned(run)
    panels = [
        Lines(
            lines=[
                Line(x=x, y=y, color=color, marker="h", size=4, alpha=0.5, linestyle="")
                for x, y, color in zip(centres, values, _sequence_colors(run), strict=True)
            ],
            xlabel="Token pair log-probability",
            ylabel=rf"$\mathbf{{QK^\top}}$ {name}",
            title=f"{letter}) {title} scores by token probabilities, layer {run.binned_layer}",
        )
        for letter, values, name, title in (
            ("A", mean, "mean", "Average"),
            ("B", std, "standard deviation", "Spread of"),
        )
    ]
    return Display(
        arrays={"centres": centres, "mean": mean, "std": std, "left_out": run.left_out},
        panels=[panels],
        caption=f"Mean and population standard deviation of the scores (mean over heads) in layer {run.binned_layer} "
        f"of {run.name}, in {BINS} bins of equally many pairs, a colour a sequence.{run.of_batch}{run.binned_note}",
        size=(11, 3.6),
    )


@STUDY.figure("5d", "correlation of log frequency with binned scores by sequence", needs={COUNTS, IDS, BINNED})
def figure_5d(run: Run) -> Display:
    *_, r_mean, r_std = _binned(run)
    x = np.arange(len(r_mean))
    lines = [
        Line(x=x, y=r_std, label=r"$\mathbf{QK^\top}$ standard deviation", color=style.STD, marker="o"),
        Line(x=x, y=r_mean, label=r"$\mathbf{QK^\top}$ mean", color=style.MEAN, marker="s"),
    ]
    panel = Lines(
        lines=lines,
        xlabel="Batch sequence number",
        ylabel="Correlation coefficient",
        title=r"Relations between token frequencies and QK$^\top$ features",
        integer_x=True,
        zero_y=True,
    )
    return Display(
        arrays={"r_mean": r_mean, "r_std": r_std, "left_out": run.left_out},
        panels=[[panel]],
        caption=f"Correlation over the bins of figure 5c of their centres with the mean and with the standard "
        f"deviation of the score, by sequence.{_undefined(r_mean, r_std)}{run.of_batch}{run.binned_note}",
        size=(8, 3.2),
    )


@STUDY.figure("6", "binned scores by layer", needs={COUNTS, IDS, BINNED, EVERY_LAYER})
def figure_6(run: Run) -> Display:
    n_layer = run.config.n_layer
    by_sequence = run.of_layers(BINNED, range(n_layer))
    # A bin that is empty in a sequence leaves that sequence out of the bin's averages.
    known = ~np.isnan(by_sequence[0])
    averages = [
        np.where(known, each, 0).sum(axis=1) / np.where(known.any(axis=1), known.sum(axis=1), np.nan)
        for each in (np.broadcast_to(run.centres, known.shape), *by_sequence)
    ]
    centres, mean, std = averages
    r_mean, r_std = (np.asarray(_row_correlations(*map(np.float32, (centres, y)))) for y in (mean, std))
    shared = {"xlabel": "Token pair log-probability", "colorbar": "Transformer layer", "scale": (0, n_layer)}
    curves: list[Panel] = []
    for letter, values, name in (("A", mean, "mean"), ("B", std, "standard deviation")):
        lines = layer_lines(centres, values)
        for line in lines:
            line.marker = "."
        title = rf"{letter}) $\mathbf{{QK^\top}}$ {name}"
        curves.append(Lines(lines=lines, ylabel=name.capitalize(), title=title, **shared))
    points: list[Panel] = []
    for letter, values, name, marker in (("C", r_mean, "mean", "s"), ("D", r_std, "standard deviation", "o")):
        lines = layer_lines([np.array([layer]) for layer in range(n_layer)], values[:, None])
        for line in lines:
            line.marker, line.face = marker, 1.0
        points.append(
            Lines(
                lines=lines,
                xlabel="Transformer layer",
                ylabel="Correlation coefficient",
                title=f"{letter}) Correlation of log-probability and {name}",
                integer_x=True,
                zero_y=True,
            )
        )
    return Display(
        arrays={
            "centres": centres,
            "mean": mean,
            "std": std,
            "r_mean": r_mean,
            "r_std": r_std,
            "left_out": run.left_out,
        },
        panels=[curves, points],
        caption=f"Figure 5c's means and standard deviations in each layer of {run.name}, averaged over the sequences, "
        f"and their correlations with the centres of the bins.{_undefined(r_mean, r_std)}{run.of_batch}",
        size=(12, 6.4),
    )


def _sequence_colors(run: Run) -> list[float]:
    """A place on the colour map for each sequence."""
    return (np.arange(len(run.ids)) / len(run.ids)).tolist()


def _r(value: float) -> str:
    return "r undefined" if np.isnan(value) else f"r = {value:.2f}"


def _undefined(*correlations: Float[np.ndarray, " each"]) -> str:
    """What a caption says of correlations with a constant."""
    count = int(sum(np.isnan(each).sum() for each in correlations))
    return f" {count} correlations are undefined, since one side is constant; they are NaN." if count else ""
