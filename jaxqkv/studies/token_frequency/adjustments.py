"""Figures of the tokens, and of what attention adds to the residual stream at frequent and rare ones."""

import numpy as np

from jaxqkv.figures import style
from jaxqkv.figures.displays import Display, layer_points
from jaxqkv.figures.panels import Image, Line, Lines, Table
from jaxqkv.studies.token_frequency.run import (
    ADJUSTMENT,
    COUNTS,
    EACH_ADJUSTMENT,
    EVERY_LAYER,
    IDS,
    STUDY,
    Run,
    undefined,
)

MOST_FREQUENT = 20


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
        lines=[Line(x=seen, y=log_frequency[seen], color=style.POINTS, marker="o", linestyle="")],
        xlabel="Token index",
        ylabel="Token log-frequency",
        title=f"Empirical proportions in {run.counts.tokens:,} tokens",
        xlim=(0, counts.size),
        ylim=(min(-14, np.nanmin(log_frequency) - 0.5), None),
    )
    whole = f" The corpus has fewer than {run.tokens:,}." if run.counts.whole else ""
    return Display(
        arrays={"counts": counts, "log_frequency": log_frequency, "documents": run.counts.documents},
        panels=[[panel]],
        title=run.label,
        caption=f"Natural logarithm of each token's share of {run.counts.tokens:,} tokens, from "
        f"{run.counts.documents:,} documents of {run.corpus.name}, by the tokenizer of {run.name}; "
        f"{seen.size:,} of {counts.size:,} tokens occur.{whole}",
        size=(10, 3.3),
        text=Table(heading=("token", "occurrences", "share"), rows=rows).text(),
    )


@STUDY.figure("2", "the batch of tokens", needs={IDS})
def figure_2(run: Run) -> Display:
    ids = run.pool[IDS]
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


@STUDY.figure("4a", "adjustment by log frequency in three layers", needs={COUNTS, IDS, ADJUSTMENT, EACH_ADJUSTMENT})
def figure_4a(run: Run) -> Display:
    adjustment, r = run.pool[EACH_ADJUSTMENT].swapaxes(0, 1), run.correlations(run.shown)
    x, panels = run.log_frequency, []
    for layer, y, each in zip(run.shown, adjustment, r.tolist(), strict=True):
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
            "adjustment": adjustment,
            "r": r,
            "layers": np.array(run.shown),
            "left_out": run.left_out,
        },
        panels=[panels],
        title=run.label,
        caption="Logarithm of the norm of what attention adds to the residual stream, against the token's log "
        f"frequency, in the first, middle and last layer of {run.name}; crosses, the first position; r over the "
        f"others.{undefined(r)}{run.of_batch}",
        size=(12, 4.2),
        legend=True,
    )


@STUDY.figure("4b", "correlation of adjustment and log frequency by layer", needs={COUNTS, ADJUSTMENT, EVERY_LAYER})
def figure_4b(run: Run) -> Display:
    r = run.correlations(range(run.config.n_layer))
    panel = Lines(
        lines=layer_points(r, "s"),
        xlabel="Transformer layer",
        ylabel="Correlation coefficient",
        title="Attention adjustment magnitudes vs. token frequency",
        integer_x=True,
        zero_y=True,
    )
    return Display(
        arrays={"r": r, "left_out": run.left_out},
        panels=[[panel]],
        title=run.label,
        caption=f"Figure 4a's correlation in each layer of {run.name}.{undefined(r)}{run.of_batch}",
        size=(8, 3.3),
    )


def _r(value: float) -> str:
    return "r undefined" if np.isnan(value) else f"r = {value:.2f}"
