"""The figures of the study `adjustment-magnitudes`."""

import jax
import numpy as np
from jaxtyping import Float

from jaxqkv.errors import NotDrawable
from jaxqkv.figures import style
from jaxqkv.figures.displays import Display, layer_lines, layer_points, reach
from jaxqkv.figures.distributions import Bars
from jaxqkv.figures.panels import Image, Line, Lines, Panel
from jaxqkv.kernels import freedman_diaconis_histogram, linear_regression, moments
from jaxqkv.studies.adjustment_magnitudes import STUDY
from jaxqkv.studies.adjustment_magnitudes.run import AdjustmentMagnitudesRun

# Percentiles at the ends of figure 3's colours.
COLOURS = (5, 95)
Norms = Float[np.ndarray, "layer batch pos"]


def log(values: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Returns natural logarithms; −∞ for 0, without a warning."""
    with np.errstate(divide="ignore"):
        return np.log(values)


def mean_by_position(run: AdjustmentMagnitudesRun, norms: Norms) -> Float[np.ndarray, "layer pos"]:
    """Returns the log of the mean norm at each position, over the texts that reach it."""
    count = run.batch.mask.sum(axis=0)
    return log(np.where(run.batch.mask, norms, 0).sum(axis=1, dtype=np.float64) / count).astype(np.float32)


def by_layer(values: Float[np.ndarray, " layer"], marker: str, title: str, ylabel: str) -> Panel:
    """Returns a panel with a point for each layer."""
    return Lines(
        lines=layer_points(values, marker), title=title, xlabel="Transformer layer", ylabel=ylabel, integer_x=True
    )


@STUDY.define(
    "1",
    "which positions are real, and how long the texts are",
    "mask [batch, pos], lengths [batch], counts [bin], edges [edge]",
)
def figure_1(run: AdjustmentMagnitudesRun) -> Display:
    mask = np.asarray(run.batch.mask)
    counts, edges = freedman_diaconis_histogram(run.lengths)
    panels = [
        Image(
            values=mask.astype(float), cmap="gray", xlabel="Token position", ylabel="Text", title="A) Real positions"
        ),
        Bars(heights=counts, edges=edges, color=style.MEAN, xlabel="Tokens", ylabel="Texts", title="B) Lengths"),
    ]
    return Display(
        arrays={"mask": mask, "lengths": run.lengths, "counts": counts, "edges": edges},
        panels=[panels],
        title=run.label,
        caption=f"Real positions (white) of the texts, padded on the right, and the histogram of their "
        f"lengths.{run.of_texts}",
        size=(10, 3.9),
    )


@STUDY.define(
    "2",
    "distributions of the log norms by layer",
    "mean, std [layer], density_LAYER [bin], edges_LAYER [edge]",
)
def figure_2(run: AdjustmentMagnitudesRun, norms: Norms) -> Display:
    later = np.asarray(run.batch.mask)[:, 1:]
    if not later.any():
        raise NotDrawable("figure 2 needs a text of 2 tokens or more")
    logs = log(norms[:, :, 1:][:, later])
    mean, std = (np.asarray(each) for each in jax.vmap(moments)(logs))
    arrays: dict[str, np.ndarray] = {"mean": mean, "std": std}
    curves = []
    for layer, values in enumerate(logs):
        heights, edges = freedman_diaconis_histogram(values, density=True)
        arrays |= {f"density_{layer}": heights, f"edges_{layer}": edges}
        curves.append((edges[:-1], heights))
    points = layer_points(mean, "h", face=0.45)
    for point, spread in zip(points, std, strict=True):
        point.error = np.array([spread])
    lines = [Line(x=x, y=y, color=layer / len(curves)) for layer, (x, y) in enumerate(curves)]
    panels = [
        Lines(
            lines=lines,
            xlabel="Log norm of the attention output",
            ylabel="Density",
            title="A) Distributions",
            colorbar="Transformer layer",
        ),
        Lines(
            lines=points,
            xlabel="Transformer layer",
            ylabel="Mean log norm",
            title="B) Mean ± standard deviation",
            integer_x=True,
        ),
    ]
    return Display(
        arrays=arrays,
        panels=[panels],
        title=run.label,
        caption=f"Log norms of what attention adds in each layer of {run.name}, at every position but the first: "
        f"densities (at left edges), and mean ± population standard deviation.{run.of_texts}",
        size=(12, 4.1),
    )


@STUDY.define("3", "log of the mean norm by layer and position", "log_norm [layer, pos], count [pos]")
def figure_3(run: AdjustmentMagnitudesRun, norms: Norms) -> Display:
    log_norm, count = mean_by_position(run, norms), np.asarray(run.batch.mask).sum(axis=0)
    finite = log_norm[np.isfinite(log_norm)]
    low, high = (float(each) for each in np.percentile(finite, COLOURS)) if finite.size else (0.0, 1.0)
    n_layer, pos = log_norm.shape
    panels = [
        Image(
            values=log_norm,
            origin="lower",
            extent=(-0.5, pos - 0.5, -0.5, n_layer - 0.5),
            vmin=low,
            vmax=high,
            xlabel="Token position",
            ylabel="Transformer layer",
            title="A) Log mean norm",
            colorbar="Log mean norm",
            integer_y=True,
        ),
        Lines(
            lines=[Line(x=np.arange(pos), y=count, color=style.MEAN, marker="o")],
            xlabel="Token position",
            ylabel="Texts",
            title="B) Texts that reach a position",
            ylim=(0, None),
            integer_x=True,
        ),
    ]
    return Display(
        arrays={"log_norm": log_norm, "count": count},
        panels=[panels],
        title=run.label,
        caption=f"Log of the mean norm of what attention adds, by layer of {run.name} and position, over the texts "
        f"that reach the position; colours from the 5th to the 95th percentile, {low:.2f} to "
        f"{high:.2f}.{run.of_texts}",
        size=(12, 4.1),
    )


@STUDY.define("4", "regression of the log mean norm on position by layer", "intercept, slope [layer]")
def figure_4(run: AdjustmentMagnitudesRun, norms: Norms) -> Display:
    last = run.fitted
    if last < 2:
        raise NotDrawable("figure 4 needs a text of 3 tokens or more")
    positions = np.arange(1, last + 1)
    log_norm = mean_by_position(run, norms)[:, 1 : last + 1]
    regressor = (positions - 1).astype(np.float32)[:, None]
    beta = np.asarray(jax.vmap(linear_regression, in_axes=(None, 0))(regressor, log_norm))
    intercept, slope = beta.T
    panels: list[Panel] = [
        Lines(
            lines=layer_lines([positions] * len(log_norm), log_norm),
            xlabel="Token position",
            ylabel="Log mean norm",
            title="A) Curves",
            colorbar="Transformer layer",
        ),
        by_layer(intercept, "s", "B) Intercepts", "Log mean norm at position 1"),
        by_layer(slope, "o", "C) Slopes", "Log mean norm per position"),
    ]
    return Display(
        arrays={"intercept": intercept, "slope": slope},
        panels=[panels],
        title=run.label,
        caption=f"Figure 3's log mean norms of {run.name} at positions 1 to {last}, and their regression on position "
        f"in each layer: intercept (at position 1) and slope.{run.of_texts}{run.fitted_note}",
        size=(13, 4.1),
    )


@STUDY.define(
    "5",
    "regression of the log norm on those of the two positions before by layer",
    "beta [layer, constant/t-2/t-1]",
)
def figure_5(run: AdjustmentMagnitudesRun, norms: Norms) -> Display:
    # Position t with t − 2 and t − 1 before it, none of them the first.
    now = np.asarray(run.batch.mask)[:, 3:]
    if not now.any():
        raise NotDrawable("figure 5 needs a text of 4 tokens or more")
    logs = log(np.where(run.batch.mask, norms, 1))
    before = np.stack([logs[:, :, 1:-2], logs[:, :, 2:-1]], axis=-1).reshape(len(norms), -1, 2)
    target = logs[:, :, 3:].reshape(len(norms), -1)
    beta = np.asarray(jax.vmap(linear_regression, in_axes=(0, 0, None))(before, target, now.ravel()))
    names = ("A) Constant", "B) Log norm at t − 2", "C) Log norm at t − 1")
    panels = [by_layer(values, "o", name, "Coefficient") for values, name in zip(beta.T, names, strict=True)]
    same = reach(beta[:, 1:], np.zeros(1))
    for panel in panels[1:]:
        panel.ylim = same
    return Display(
        arrays={"beta": beta},
        panels=[panels],
        title=run.label,
        caption=f"Regression of the log norm of what attention adds at position t on a constant and the log norms at "
        f"t − 2 and t − 1 of the same text, in each layer of {run.name}, without first positions: "
        f"{int(now.sum()):,} positions.{run.of_texts}",
        size=(13, 4.1),
    )
