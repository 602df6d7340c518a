"""The figures of the study `prediction-divergence`."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxqkv.figures import style
from jaxqkv.figures.displays import Display
from jaxqkv.figures.distributions import Bars
from jaxqkv.figures.panels import Line, Lines, Panel
from jaxqkv.kernels import freedman_diaconis_histogram, require_finite
from jaxqkv.studies.prediction_divergence import STUDY
from jaxqkv.studies.prediction_divergence.divergences import (
    BINS,
    EDGE_COUNTS,
    LayerTests,
    by_edge_count,
    edges_between,
)
from jaxqkv.studies.prediction_divergence.run import PredictionDivergenceRun
from jaxqkv.studies.significance import LEVEL, marked

# Number of positions in figure 2a's running average, which ends at each position.
WINDOW = 50
# Standard deviation of the jitter of figure 2a's points.
JITTER = 0.02
SIDES = {"correct": style.CORRECT, "incorrect": style.INCORRECT}
NORM = "Log norm of the attention output"

Norms = Float[np.ndarray, "layer pos"]
Predicted = Int[np.ndarray, "pos"]


def divergence_name(run: PredictionDivergenceRun) -> str:
    """Returns the label of the divergence's axes."""
    return "Divergence (as published)" if run.as_published else "Jensen–Shannon divergence (nats)"


def as_published(run: PredictionDivergenceRun) -> str:
    """Returns the caption's sentence on the original's definition; empty unless it is used."""
    if not run.as_published:
        return ""
    return (
        " As published: ½ KL(M‖C) + ½ KL(M‖I), with 1e-15 added to C and I inside the logarithms, divided by the "
        "number of bins."
    )


@STUDY.define("2a", "which next tokens are predicted, and the share of them along the text", "correct, share [pos]")
def figure_2a(run: PredictionDivergenceRun, predicted: Predicted) -> Display:
    correct = run.correct
    totals = np.concatenate([[0], np.cumsum(correct)])
    ends = np.arange(1, len(correct) + 1)
    begins = np.maximum(ends - WINDOW, 0)
    share = ((totals[ends] - totals[begins]) / (ends - begins)).astype(np.float32)
    jitter = np.random.default_rng(run.seed).normal(0, JITTER, len(correct))
    lines = []
    for (name, color), chosen in zip(SIDES.items(), (correct, ~correct), strict=True):
        points: dict[str, Any] = {"marker": "o", "linestyle": "", "color": color, "alpha": 0.6, "size": 3}
        lines.append(Line(x=run.pos[chosen], y=(correct + jitter)[chosen], label=name.capitalize(), **points))
    lines.append(Line(x=run.pos, y=share, label=f"Share correct, {WINDOW} positions", color="0.5"))
    panel = Lines(
        lines=lines,
        xlabel="Token position",
        ylabel="Prediction",
        yticks=(0, 0.5, 1),
        ylim=(-0.15, 1.35),
        integer_x=True,
    )
    return Display(
        arrays={"correct": correct, "share": share},
        panels=[[panel]],
        title=run.label,
        caption=f"Positions at which the largest logit of {run.name} is that of the next token (1, jittered), and the "
        f"share of them among the position and up to {WINDOW - 1} before it.{run.of_text}",
        size=(11, 4),
    )


@STUDY.define(
    "2b",
    "length of the next token where it is predicted and where it is not",
    "length [pos], density_SIDE [bin], edges_SIDE [edge], mean [correct/incorrect]; SIDE: correct, incorrect",
)
def figure_2b(run: PredictionDivergenceRun, predicted: Predicted) -> Display:
    run.need_both("figure 2b")
    words = run.model.tokenizer.tokens(run.next[run.first :].tolist())
    length = np.array([len(word) for word in words], np.int32)
    arrays: dict[str, np.ndarray] = {"length": length}
    lines, means = [], []
    for (name, color), chosen in zip(SIDES.items(), (run.correct, ~run.correct), strict=True):
        values = length[chosen]
        heights, edges = freedman_diaconis_histogram(values, density=True)
        arrays |= {f"density_{name}": heights, f"edges_{name}": edges}
        means.append(values.mean())
        label = f"{name.capitalize()}, mean {means[-1]:.2f}"
        lines.append(Line(x=edges[:-1], y=heights, label=label, color=color, marker="o"))
    panel = Lines(lines=lines, xlabel="Characters of the next token", ylabel="Density")
    return Display(
        arrays=arrays | {"mean": np.array(means, np.float32)},
        panels=[[panel]],
        title=run.label,
        caption="Characters of the next token, its leading space among them, where it is predicted and where it is "
        f"not: densities at left edges, means in the legend.{run.of_text}",
        size=(8, 4),
    )


def histograms(
    run: PredictionDivergenceRun, norm: Float[np.ndarray, "pos"]
) -> tuple[Float[np.ndarray, "edge"], list[Float[np.ndarray, "bin"]]]:
    """Returns the edges of `BINS` bins, and the shares of correct and of incorrect positions in each."""
    edges = edges_between(norm, BINS + 1)
    counts = [np.histogram(norm[chosen], edges)[0] for chosen in (run.correct, ~run.correct)]
    return edges, [(each / each.sum()).astype(np.float32) for each in counts]


@STUDY.define(
    "3",
    "norms where the next token is predicted and where it is not",
    "edges [edge], correct_probability, incorrect_probability [bin]",
)
def figure_3(run: PredictionDivergenceRun, predicted: Predicted, norms: Norms) -> Display:
    norm = require_finite(norms[run.layer])
    run.need_both("figure 3")
    edges, shares = histograms(run, norm)
    lines = [
        Line(x=edges[:-1], y=share, label=name.capitalize(), color=color)
        for (name, color), share in zip(SIDES.items(), shares, strict=True)
    ]
    return Display(
        arrays={"edges": edges} | {f"{name}_probability": share for name, share in zip(SIDES, shares, strict=True)},
        panels=[[Lines(lines=lines, xlabel=NORM, ylabel="Probability")]],
        title=run.heading,
        caption=f"Log norms of what attention adds in {run.where}, where the next token is predicted and where it is "
        f"not: {BINS} bins, at left edges.{run.of_text}{run.layer_note}",
        size=(8, 4),
    )


@STUDY.define("4", "divergence by the number of bins", "edges_count, divergence [edge_count]")
def figure_4(run: PredictionDivergenceRun, predicted: Predicted, norms: Norms) -> Display:
    norm = require_finite(norms[run.layer])
    run.need_both("figure 4")
    divergence = by_edge_count(norm, run.correct, run.as_published)
    line = Line(x=EDGE_COUNTS, y=divergence, color=style.MEAN, marker="o")
    return Display(
        arrays={"edges_count": EDGE_COUNTS, "divergence": divergence},
        panels=[[Lines(lines=[line], xlabel="Edges of bins", ylabel=divergence_name(run))]],
        title=run.heading,
        caption=f"Divergence of figure 3's distributions in {run.where}, by the number of bins' edges: it grows with "
        f"that number, whatever the tokens.{as_published(run)}{run.of_text}{run.layer_note}",
        size=(8, 4),
    )


def tested(run: PredictionDivergenceRun, norms: Norms, tests: LayerTests | None, what: str) -> LayerTests:
    """Returns the tests, or refuses the figure with the reason why there are none."""
    require_finite(norms)
    run.need_both(what)
    assert tests is not None  # there are tests if all norms are finite and both kinds of positions exist
    return tests


@STUDY.define(
    "5",
    "divergence against permuted predictions",
    "null [permutation], observed, p [], counts [bin], edges [edge]",
)
def figure_5(run: PredictionDivergenceRun, predicted: Predicted, norms: Norms, tests: LayerTests | None) -> Display:
    tests = tested(run, norms, tests, "figure 5")
    null, observed, p = tests.null[:, run.layer], tests.divergence[run.layer], tests.p[run.layer]
    counts, edges = freedman_diaconis_histogram(null)
    height = float(counts.max())
    panel = Bars(
        heights=counts,
        edges=edges,
        color=style.POINTS,
        outline=False,
        label="Permuted",
        curve=Line(x=np.full(2, observed), y=np.array([0, height]), color=style.FIRST, label=f"Observed, p = {p:.3g}"),
        xlabel=divergence_name(run),
        ylabel="Permutations",
    )
    return Display(
        arrays={"null": null, "observed": observed, "p": p, "counts": counts, "edges": edges},
        panels=[[panel]],
        title=run.heading,
        caption=f"Divergence of figure 3's distributions in {run.where} ({observed:.4f}), and those of "
        f"{len(null):,} permutations of correct and incorrect (seed {run.seed}); p = {p:.3g}, one-sided. "
        f"Neighbouring positions are not independent: see figure 6's p_shift."
        f"{as_published(run)}{run.of_text}{run.layer_note}",
        size=(8, 4),
    )


@STUDY.define(
    "6",
    "means, divergences and differences by layer",
    "mean [layer, correct/incorrect], divergence, null_mean, null_low, null_high, p, q_value, difference, "
    "difference_p, difference_q_value, p_shift [layer]",
)
def figure_6(run: PredictionDivergenceRun, predicted: Predicted, norms: Norms, tests: LayerTests | None) -> Display:
    tests = tested(run, norms, tests, "figure 6")
    correct, layers = run.correct, np.arange(len(norms))
    mean = np.stack([norms[:, chosen].mean(axis=1) for chosen in (correct, ~correct)], axis=1)
    null = {name: getattr(tests.null, how)(axis=0) for name, how in (("mean", "mean"), ("low", "min"), ("high", "max"))}
    by_divergence = (tests.p if run.as_published else tests.q_value) < LEVEL
    by_difference = by_divergence if run.as_published else tests.difference_q_value < LEVEL
    means = [
        Line(x=layers, y=mean[:, side], label=name.capitalize(), color=color, marker="o")
        for side, (name, color) in enumerate(SIDES.items())
    ]
    chance = [
        Line(x=layers, y=null["mean"], label="Permuted: mean", color="0.5"),
        Line(x=layers, y=null["high"], label="smallest and largest", color="0.5", linestyle="--"),
        Line(x=layers, y=null["low"], color="0.5", linestyle="--"),
    ]
    axes: dict[str, Any] = {"xlabel": "Transformer layer", "integer_x": True}
    panels: list[Panel] = [
        Lines(lines=means, ylabel=NORM, title="A) Means", **axes),
        Lines(
            lines=[*marked(layers, tests.divergence, by_divergence, label="Observed", color=style.MEAN), *chance],
            ylabel=divergence_name(run),
            title="B) Divergence",
            ylim=(0, 1.35 * float(max(null["high"].max(), tests.divergence.max()))),  # room for the legend
            **axes,
        ),
        Lines(
            lines=marked(layers, tests.difference, by_difference, color=style.STD),
            ylabel="Correct − incorrect",
            title="C) Difference of the means",
            zero_y=True,
            **axes,
        ),
    ]
    marks = "p < 0.05 in B, in C too" if run.as_published else "q < 0.05"
    names = ("divergence", "p", "q_value", "difference", "difference_p", "difference_q_value", "p_shift")
    return Display(
        arrays={"mean": mean}
        | {name: getattr(tests, name) for name in names}
        | {f"null_{name}": values for name, values in null.items()},
        panels=[panels],
        title=run.label,
        caption=f"Log norms of what attention adds in each layer of {run.name}: A, means; B, divergence, with mean, "
        f"smallest and largest of {len(tests.null):,} permutations of correct and incorrect; C, correct − incorrect. "
        f"Filled: {marks}. Permutations take positions to be independent, which is generous; with circular shifts "
        f"of the predictions p of the divergence is below 0.05 in {int((tests.p_shift < LEVEL).sum())} of "
        f"{len(layers)} layers.{as_published(run)}{run.of_text}",
        size=(14, 4.1),
    )
