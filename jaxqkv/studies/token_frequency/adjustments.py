"""Figures of the tokens, and of what attention adds to the residual stream at frequent and rare tokens."""

import numpy as np
from jaxtyping import Float, Int

from jaxqkv.figures import style
from jaxqkv.figures.displays import Display, layer_points
from jaxqkv.figures.panels import Image, Line, Lines
from jaxqkv.figures.tables import Table
from jaxqkv.studies.significance import stars
from jaxqkv.studies.token_frequency import STUDY
from jaxqkv.studies.token_frequency.run import TokenFrequencyRun, undefined
from jaxqkv.text.counting import TokenCounts

MOST_FREQUENT = 20


@STUDY.define("1", "log frequency by token", "counts, log_frequency [vocab], documents []")
def figure_1(run: TokenFrequencyRun, counts: TokenCounts) -> Display:
    occurrences, log_frequency = counts.counts, counts.log_frequency
    order = np.argsort(-occurrences, kind="stable")[:MOST_FREQUENT]
    order = order[occurrences[order] > 0]
    rows = [
        (f"{token!r}", f"{occurrences[i]:,}", f"{np.exp(log_frequency[i]):.2%}")
        for i, token in zip(order, run.model.tokenizer.tokens(order.tolist()), strict=True)
    ]
    seen = np.flatnonzero(occurrences)
    panel = Lines(
        lines=[Line(x=seen, y=log_frequency[seen], color=style.POINTS, marker="o", linestyle="")],
        xlabel="Token index",
        ylabel="Token log-frequency",
        title=f"Empirical proportions in {counts.tokens:,} tokens",
        xlim=(0, occurrences.size),
        ylim=(min(-14, np.nanmin(log_frequency) - 0.5), None),
    )
    whole = f" The corpus has fewer than {run.tokens:,}." if counts.whole else ""
    return Display(
        arrays={"counts": occurrences, "log_frequency": log_frequency, "documents": counts.documents},
        panels=[[panel]],
        title=run.label,
        caption=f"Natural logarithm of each token's share of {counts.tokens:,} tokens, from "
        f"{counts.documents:,} documents of {run.corpus.name}, by the tokenizer of {run.name}; "
        f"{seen.size:,} of {occurrences.size:,} tokens occur.{whole}",
        size=(10, 3.3),
        text=Table(heading=("token", "occurrences", "share"), rows=rows).text(),
    )


@STUDY.define("2", "the batch of tokens", "ids [batch, pos]")
def figure_2(run: TokenFrequencyRun, ids: Int[np.ndarray, "sequence pos"]) -> Display:
    size, length = ids.shape
    image = Image(
        values=ids,
        cmap="magma",
        origin="lower",
        extent=(0, length, 0, size),
        xlabel="Token index",
        ylabel="Sequence",
        colorbar="Token id",
    )
    return Display(
        arrays={"ids": ids},
        panels=[[image]],
        title=run.label,
        caption=f"Token indices of the batch: the first {length} tokens of the first {size} documents of "
        f"{run.corpus.name} that have as many.",
        size=(8, 4.3),
    )


@STUDY.define(
    "4a",
    "adjustment by log frequency in three layers",
    "log_frequency [batch, pos], adjustment [first/middle/last, batch, pos], r, layers [first/middle/last], "
    "left_out []",
)
def figure_4a(
    run: TokenFrequencyRun,
    counts: TokenCounts,
    ids: Int[np.ndarray, "sequence pos"],
    adjustments: Float[np.ndarray, "layer sequence pos"],
    correlations: Float[np.ndarray, " layer"],
    left_out: int,
) -> Display:
    x, panels = counts.log_frequency[ids], []
    for layer, y, each in zip(run.shown, adjustments, correlations.tolist(), strict=True):
        lines = [
            Line(x=x[:, 1:].ravel(), y=y[:, 1:].ravel(), color=style.POINTS, alpha=0.3, marker="o", linestyle=""),
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
        arrays={
            "log_frequency": x,
            "adjustment": adjustments,
            "r": correlations,
            "layers": np.array(run.shown),
            "left_out": left_out,
        },
        panels=[panels],
        title=run.label,
        caption="Logarithm of the norm of what attention adds to the residual stream, against the token's log "
        f"frequency, in the first, middle and last layer of {run.name}; crosses, the first position; r over the "
        f"others.{undefined(correlations)}{run.of_batch(left_out)}",
        size=(12, 4.2),
        legend=True,
    )


@STUDY.define(
    "4b",
    "correlation of adjustment and log frequency by layer",
    "r [layer], left_out []; with --significance: p, q_value [layer]",
)
def figure_4b(run: TokenFrequencyRun, layer_correlations: Float[np.ndarray, " layer"], left_out: int) -> Display:
    tests, marks, tested = run.correlation_tests(layer_correlations), [], ""
    if tests:
        marks = [stars(np.arange(len(layer_correlations)), layer_correlations, tests["q_value"], style.FIRST)]
        tested = (
            " Stars: q < 0.05 of two-sided tests in which the frequencies of the batch's distinct tokens are permuted "
            f"({run.permutations:,} times, seed {run.seed})."
        )
    panel = Lines(
        lines=[*layer_points(layer_correlations, "s"), *marks],
        xlabel="Transformer layer",
        ylabel="Correlation coefficient",
        title="Attention adjustment magnitudes vs. token frequency",
        integer_x=True,
        zero_y=True,
    )
    return Display(
        arrays={"r": layer_correlations, "left_out": left_out, **tests},
        panels=[[panel]],
        title=run.label,
        caption=f"Figure 4a's correlation in each layer of {run.name}.{undefined(layer_correlations)}"
        f"{run.of_batch(left_out)}{tested}",
        size=(8, 3.3),
    )


def _r(value: float) -> str:
    return "r undefined" if np.isnan(value) else f"r = {value:.2f}"
