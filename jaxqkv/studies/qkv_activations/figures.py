"""The figures of the study `qkv-activations`."""

from typing import Any

import numpy as np
from jaxtyping import Float

from jaxqkv.figures import style
from jaxqkv.figures.displays import Display, head_images, layer_map
from jaxqkv.figures.panels import Image, Line, Lines, Panel
from jaxqkv.studies.qkv_activations import STUDY
from jaxqkv.studies.qkv_activations.run import EDGES, MEASURES, SHOWN_EDGES, QkvActivationsRun, Reduced

ORIGINAL_GRID = (4, 5)
NAMES = list(style.QKV)
TITLES = ("A) Mean", "B) Mean of absolute values", "C) Variance")
SIDES = {"Target": style.TARGET, "Non-target": style.NON_TARGET}


@STUDY.define("1", "Q, K and V of the target in every occurrence", "activations [occurrence, qkv·head·head_dim]")
def figure_1(run: QkvActivationsRun, shown: Reduced) -> Display:
    activations = shown["activations"]
    width = activations.shape[1] // 3
    panel = Image(
        values=activations,
        vmin=-1,
        vmax=1,
        vlines=[width - 0.5, 2 * width - 0.5],
        xlabel="Dimension (Q, K, V)",
        ylabel="Occurrence of the target",
        colorbar="Activation",
    )
    return Display(
        arrays={"activations": activations},
        panels=[[panel]],
        title=run.heading,
        caption=f"Q, K and V of the target side by side in {run.where}, a row an occurrence, colours from −1 to "
        f"1.{run.of_rows}{run.layer_note}",
        size=(11, 4.5),
    )


@STUDY.define(
    "2a",
    "mean, absolute mean and variance of Q, K and V, target and non-target",
    "mean, l1, variance [qkv, target/non-target]",
)
def figure_2a(run: QkvActivationsRun, shown: Reduced) -> Display:
    values = shown["rows"].mean(axis=0)
    panels: list[Panel] = []
    for index, title in enumerate(TITLES):
        lines = [
            Line(x=np.arange(3), y=values[:, side, index], label=name, color=color, marker="os"[side], linestyle="")
            for side, (name, color) in enumerate(SIDES.items())
        ]
        panels.append(
            Lines(
                lines=lines,
                title=title,
                ylabel="Squared activation" if index == 2 else "Activation",
                xticks=range(3),
                xnames=NAMES,
                xlim=(-0.5, 2.5),
                zero_y=not index,
            )
        )
    return Display(
        arrays=dict(zip(MEASURES, np.moveaxis(values, -1, 0), strict=True)),
        panels=[panels],
        title=run.heading,
        caption=f"Mean, mean of absolute values, and sample variance over the dimensions of Q, K and V in {run.where}, "
        f"at the target and at the token before it, averaged over occurrences.{run.of_rows}{run.layer_note}",
        size=(11, 4),
    )


@STUDY.define(
    "2b",
    "distributions of Q, K and V, target and non-target",
    "edges [edge], density [qkv, target/non-target, bin]",
)
def figure_2b(run: QkvActivationsRun, shown: Reduced) -> Display:
    values = shown["density"]
    panels = [
        Lines(
            lines=[
                Line(x=SHOWN_EDGES[:-1], y=values[index, side], label=label, color=color)
                for side, (label, color) in enumerate(SIDES.items())
            ],
            xlabel=f"{name} activation",
            ylabel="Density",
            title=name,
            xlim=(-7, 7),
        )
        for index, name in enumerate(NAMES)
    ]
    return Display(
        arrays={"edges": SHOWN_EDGES, "density": values},
        panels=[panels],
        title=run.heading,
        caption=f"Densities of Q, K and V in {run.where} at the target and at the token before it: {values.shape[-1]} "
        f"bins from −7 to 7, at left edges.{run.of_rows}{run.layer_note}",
        size=(13, 4.1),
    )


def by_layer(
    values: Float[np.ndarray, "layer qkv"],
    title: str,
    ylabel: str,
    *intervals: Float[np.ndarray, "layer qkv"],
    **axes: Any,
) -> Panel:
    """Returns a panel with a curve for each of Q, K and V, and shaded intervals if their ends are given."""
    lines = []
    for index, (name, color) in enumerate(style.QKV.items()):
        between = (intervals[0][:, index], intervals[1][:, index]) if intervals else None
        look: dict[str, Any] = {"label": name, "color": color, "marker": style.MARKERS[name], "interval": between}
        lines.append(Line(x=np.arange(len(values)), y=values[:, index], **look))
    return Lines(lines=lines, title=title, xlabel="Transformer layer", ylabel=ylabel, integer_x=True, **axes)


@STUDY.define(
    "3a",
    "mean, absolute mean and variance of Q, K and V by layer",
    "mean, l1, variance [layer, qkv, target/non-target]",
)
def figure_3a(run: QkvActivationsRun, layers: Reduced) -> Display:
    values = layers["rows"].mean(axis=1)
    average = values.mean(axis=2)
    panels = [by_layer(average[..., index], title, "Activation") for index, title in enumerate(TITLES)]
    panels[2].ylabel = "Squared activation"
    return Display(
        arrays=dict(zip(MEASURES, np.moveaxis(values, -1, 0), strict=True)),
        panels=[panels],
        title=run.label,
        caption=f"Figure 2a's measures in each layer of {run.name}, averaged over the target and the token before "
        f"it.{run.of_rows}",
        size=(13, 4.1),
    )


@STUDY.define("3b", "target against non-target by layer", "difference, low, high [layer, qkv, mean/l1/variance]")
def figure_3b(run: QkvActivationsRun, layers: Reduced) -> Display:
    rows = layers["rows"][..., 0, :] - layers["rows"][..., 1, :]
    difference = rows.mean(axis=1)
    low, high = run.interval(np.moveaxis(rows, 1, 0))
    panels = [
        by_layer(difference[..., i], title, "Target − non-target", low[..., i], high[..., i], zero_y=True)
        for i, title in enumerate(TITLES)
    ]
    return Display(
        arrays={"difference": difference, "low": low, "high": high},
        panels=[panels],
        title=run.label,
        caption=f"Figure 2a's measures in each layer of {run.name}, target − non-target (the original draws the "
        f"opposite sign); shaded, 95 % bootstrap intervals over occurrences ({run.samples:,} resamples, seed "
        f"{run.seed}).{run.of_rows}",
        size=(13, 4.1),
    )


@STUDY.define("4", "distributions of Q, K and V by layer", "edges [edge], density [layer, qkv, target/non-target, bin]")
def figure_4(run: QkvActivationsRun, layers: Reduced) -> Display:
    values = layers["density"]
    panels = [
        [
            layer_map(
                values[:, index, side],
                EDGES,
                cmap="magma",
                vmax=0.4,
                xlabel="Activation" if side else "",
                title=f"{name}, {label.lower()}",
                colorbar="Density" if index == 2 else "",
            )
            for index, name in enumerate(NAMES)
        ]
        for side, label in enumerate(SIDES)
    ]
    return Display(
        arrays={"edges": EDGES, "density": values},
        panels=panels,
        title=run.label,
        caption=f"Densities of Q, K and V in each layer of {run.name}, at the target and at the token before it, "
        f"colours from 0 to 0.4.{run.of_rows}",
        size=(12, 7),
    )


@STUDY.define("5a", "Q of every head of one layer", "q [head, pos, head_dim]")
def figure_5a(run: QkvActivationsRun, shown: Reduced) -> Display:
    heads = shown["q"].reshape(len(shown["q"]), run.config.n_head, -1).swapaxes(0, 1)
    panels, grid = head_images(heads.swapaxes(1, 2), "Qh", ORIGINAL_GRID, vmin=-2, vmax=2, origin="lower")
    corner = panels[-1][0]
    corner.xlabel, corner.ylabel = "Token position", "Head dim"
    return Display(
        arrays={"q": heads},
        panels=panels,
        title=run.heading,
        caption=f"Q of every head of {run.where} at the first occurrence and the {run.context} tokens before it, "
        f"colours from −2 to 2.{grid}{run.layer_note}",
        size=(12, 0.3 + 1.6 * len(panels)),
    )


@STUDY.define("5b", "standard deviation over positions by layer", "std [layer, qkv]")
def figure_5b(run: QkvActivationsRun, layers: Reduced) -> Display:
    return Display(
        arrays={"std": layers["std"]},
        panels=[[by_layer(layers["std"], "", "Standard deviation over positions")]],
        title=run.label,
        caption=f"Sample standard deviation of Q, K and V over the positions of a row, averaged over rows, heads and "
        f"dimensions, in each layer of {run.name}.{run.of_rows}",
        size=(8, 4.3),
    )
