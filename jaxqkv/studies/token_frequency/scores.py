"""Figures of the scores of frequent and rare pairs of tokens."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxqkv.figures import style
from jaxqkv.figures.displays import Display, layer_lines, layer_points
from jaxqkv.figures.panels import Image, Line, Lines, Panel
from jaxqkv.kernels import percentile_edges
from jaxqkv.studies.significance import stars
from jaxqkv.studies.token_frequency import STUDY
from jaxqkv.studies.token_frequency.pool import BinMoments
from jaxqkv.studies.token_frequency.reductions import BINS, EVERY, pair_sums, row_correlations
from jaxqkv.studies.token_frequency.run import TokenFrequencyRun, undefined
from jaxqkv.text.counting import TokenCounts

SUM = "Log-probability sum"


@STUDY.define("5a", "log frequencies of every pair of one sequence", "pair_log_frequency [query, key], left_out []")
def figure_5a(run: TokenFrequencyRun, counts: TokenCounts, ends: Int[np.ndarray, "2 pos"], left_out: int) -> Display:
    sums = pair_sums(counts.log_frequency[ends[0]])
    image = Image(
        values=sums,
        cmap="viridis",
        aspect="equal",
        xlabel="Token index",
        ylabel="Token index",
        title="Token proportion product pairs",
        colorbar=SUM,
    )
    return Display(
        arrays={"pair_log_frequency": sums, "left_out": left_out},
        panels=[[image]],
        title=run.label,
        caption=f"Sum of the log frequencies of every pair of tokens of the first sequence.{run.of_batch(left_out)}",
        size=(6, 5.3),
    )


@STUDY.define(
    "5b",
    "score by log frequency of the pair",
    "pair_log_frequency, score [pair], layer, left_out, left_out_pairs []",
)
def figure_5b(
    run: TokenFrequencyRun,
    counts: TokenCounts,
    ids: Int[np.ndarray, "sequence pos"],
    pairs: Float[np.ndarray, "sequence pair"],
    left_out: int,
) -> Display:
    sums = np.stack([pair_sums(row).ravel()[::EVERY] for row in counts.log_frequency[ids]])
    known = ~np.isnan(sums)
    without = f" {(~known).sum():,} pairs of tokens without a frequency are left out." if not known.all() else ""
    lines = [
        Line(x=a[k], y=b[k], color=color, size=3, alpha=0.5, marker="o", linestyle="")
        for a, b, k, color in zip(sums, pairs, known, _sequence_colors(run), strict=True)
    ]
    panel = Lines(lines=lines, xlabel=SUM, ylabel=style.SCORE, title=f"Layer {run.score_layer}")
    return Display(
        arrays={
            "pair_log_frequency": sums[known],
            "score": pairs[known],
            "layer": run.score_layer,
            "left_out": left_out,
            "left_out_pairs": int((~known).sum()),
        },
        panels=[[panel]],
        title=run.label,
        caption=f"Mean over heads of the scores in layer {run.score_layer} of {run.name} against the sum of the pair's "
        f"log frequencies, every {EVERY}th pair of every sequence, a colour a sequence.{without}"
        f"{run.of_batch(left_out)}{run.score_note}",
        size=(7, 4.9),
    )


@STUDY.define(
    "5-edges",
    "edges of bins with equal counts and with equal widths",
    "percentile_edges, linear_edges [edge], left_out []",
)
def figure_5_edges(
    run: TokenFrequencyRun, counts: TokenCounts, ends: Int[np.ndarray, "2 pos"], left_out: int
) -> Display:
    sums = pair_sums(counts.log_frequency[ends[1]])
    percentile = percentile_edges(sums, n_bin=BINS)
    ends = percentile[[0, -1]]
    linear = np.linspace(ends[0], ends[1], BINS + 1)
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
        arrays={"percentile_edges": percentile, "linear_edges": linear, "left_out": left_out},
        panels=[[panel]],
        title=run.label,
        caption=f"Edges of {BINS} bins of the sums of log frequencies of the last sequence's pairs: equally many pairs "
        f"a bin, against equal widths; dashed, where they would be the same.{run.of_batch(left_out)}",
        size=(6, 5.3),
    )


@STUDY.define("5c", "score in bins of the pair's log frequency", "centres, mean, std [batch, bin], layer, left_out []")
def figure_5c(run: TokenFrequencyRun, bins: BinMoments, left_out: int) -> Display:
    centres, mean, std = bins
    panels = [
        Lines(
            lines=[
                Line(x=x, y=y, color=color, marker="h", size=4, alpha=0.5, linestyle="")
                for x, y, color in zip(centres, values, _sequence_colors(run), strict=True)
            ],
            xlabel="Token pair log-probability",
            ylabel=f"{style.SCORE} {name}",
            title=f"{letter}) {title} scores by token probabilities, layer {run.binned_layer}",
        )
        for letter, values, name, title in (
            ("A", mean, "mean", "Average"),
            ("B", std, "standard deviation", "Spread of"),
        )
    ]
    return Display(
        arrays={"centres": centres, "mean": mean, "std": std, "layer": run.binned_layer, "left_out": left_out},
        panels=[panels],
        title=run.label,
        caption=f"Mean and population standard deviation of the scores (mean over heads) in layer {run.binned_layer} "
        f"of {run.name}, in {BINS} bins of equally many pairs, a colour a sequence."
        f"{run.of_batch(left_out)}{run.binned_note}",
        size=(11, 3.9),
    )


@STUDY.define(
    "5d",
    "correlation of log frequency with binned scores by sequence",
    "r_mean, r_std [batch], layer, left_out []",
)
def figure_5d(run: TokenFrequencyRun, bins: BinMoments, left_out: int) -> Display:
    centres, *moments = bins
    r_mean, r_std = (np.asarray(row_correlations(centres.astype(np.float32), y)) for y in moments)
    x = np.arange(len(r_mean))
    lines = [
        Line(x=x, y=r_std, label=f"{style.SCORE} standard deviation", color=style.STD, marker="o"),
        Line(x=x, y=r_mean, label=f"{style.SCORE} mean", color=style.MEAN, marker="s"),
    ]
    panel = Lines(
        lines=lines,
        xlabel="Batch sequence number",
        ylabel="Correlation coefficient",
        title=f"Relations between token frequencies and {style.SCORE} features",
        integer_x=True,
        zero_y=True,
    )
    return Display(
        arrays={"r_mean": r_mean, "r_std": r_std, "layer": run.binned_layer, "left_out": left_out},
        panels=[[panel]],
        title=f"Layer {run.binned_layer} of {run.label}",
        caption=f"Correlation over the bins of figure 5c of their centres with the mean and with the standard "
        f"deviation of the score, by sequence.{undefined(r_mean, r_std)}{run.of_batch(left_out)}{run.binned_note}",
        size=(8, 4),
        legend=True,
    )


@STUDY.define(
    "6",
    "binned scores by layer",
    "centres, mean, std [layer, bin], r_mean, r_std [layer], left_out []; with --significance: p_mean, p_std, "
    "q_value_mean, q_value_std [layer]",
)
def figure_6(run: TokenFrequencyRun, layer_bins: BinMoments, left_out: int) -> Display:
    centres, mean, std = layer_bins
    r_mean, r_std = (
        np.asarray(row_correlations(centres.astype(np.float32), y.astype(np.float32))) for y in (mean, std)
    )
    tests, tested = run.bin_tests(r_mean, r_std), ""
    if tests:
        tested = (
            " Stars: q < 0.05 of two-sided tests in which the frequencies of the batch's distinct tokens are permuted, "
            f"and all pairs binned anew ({run.permutations:,} times, seed {run.seed})."
        )
    shared: dict[str, Any] = {"xlabel": "Token pair log-probability", "colorbar": "Transformer layer"}
    curves: list[Panel] = []
    for letter, values, name in (("A", mean, "mean"), ("B", std, "standard deviation")):
        lines = layer_lines(centres, values)
        for line in lines:
            line.marker = "."
        title = f"{letter}) {style.SCORE} {name}"
        curves.append(Lines(lines=lines, ylabel=name.capitalize(), title=title, **shared))
    points: list[Panel] = []
    for letter, values, short, name, marker in (
        ("C", r_mean, "mean", "mean", "s"),
        ("D", r_std, "std", "standard deviation", "o"),
    ):
        marks = [stars(np.arange(len(values)), values, tests[f"q_value_{short}"], style.FIRST)] if tests else []
        points.append(
            Lines(
                lines=[*layer_points(values, marker), *marks],
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
            "left_out": left_out,
            **tests,
        },
        panels=[curves, points],
        title=run.label,
        caption=f"Figure 5c's means and standard deviations in each layer of {run.name}, averaged over the sequences, "
        f"and their correlations with the centres of the bins.{undefined(r_mean, r_std)}{run.of_batch(left_out)}"
        f"{tested}",
        size=(12, 6.7),
    )


def _sequence_colors(run: TokenFrequencyRun) -> list[float]:
    """Returns a place on the colour map for each sequence."""
    return (np.arange(run.batch_size) / run.batch_size).tolist()
