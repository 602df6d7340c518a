"""Figures of the attention weights of one layer and of all layers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from jaxqkv.errors import NotDrawable
from jaxqkv.figures.displays import Display, reach, rows_of, symmetric
from jaxqkv.figures.distributions import Bars, Violins
from jaxqkv.figures.panels import Image, Line, Lines, Panel
from jaxqkv.kernels import distribution_shape, ks_normal
from jaxqkv.runtime.devices import jit
from jaxqkv.studies.weight_tour import STUDY
from jaxqkv.studies.weight_tour.run import ENDS, ORIGINAL_WIDTH, ByCheckpoint, Tour, WeightTourRun
from jaxqkv.typing import AnyArray

BINS = 50
# Rows and columns of the two windows, of a matrix 768 × 2,304.
WINDOWS = (((0, 300), (100, 300)), ((300, 600), (200, 400)))
LEAST_P = 1e-300


@jit
def _histogram_statistics(wide: Float[AnyArray, "embed three_embed"]) -> dict[str, Array]:
    shape = distribution_shape(wide)
    return shape._asdict() | {"ks": ks_normal(wide, shape.mean, shape.std)}


# --- attention weights of one layer ---


@STUDY.define(
    "weight-histogram",
    "distribution of the attention weights of one layer",
    "density [bin], edges [edge], mean, std, skewness, kurtosis, ks, p []; with more checkpoints: *_NAME",
)
def figure_weight_histogram(run: WeightTourRun) -> Display:
    panels: list[Panel] = []
    texts, by_tour = [], {}
    for tour in run.tours:
        if broken := int(np.sum(~np.isfinite(tour.wide))):
            raise NotDrawable(f"weight-histogram: {broken:,} weights of {tour.where} are NaN or infinite")
    limits = reach(*(tour.wide for tour in run.tours))
    for tour in run.tours:
        heights, edges = np.histogram(tour.wide, bins=BINS, density=True)
        numbers = {name: float(value) for name, value in _histogram_statistics(tour.wide).items()}
        p = _ks_p(numbers["ks"], tour.wide.size)
        by_tour[tour.name] = {"density": heights, "edges": edges} | numbers | {"p": p}
        mean, std = numbers["mean"], numbers["std"]
        x = np.linspace(mean - 4 * std, mean + 4 * std, 200)
        spread = std or 1.0
        normal = np.exp(-0.5 * ((x - mean) / spread) ** 2) / (spread * np.sqrt(2 * np.pi))
        lines = [
            f"Skewness: {numbers['skewness']:.3f}",
            f"Excess kurtosis: {numbers['kurtosis']:.3f}",
            f"Mean: {mean:.3g}",
            f"Std: {std:.3f}",
            f"KS statistic: {numbers['ks']:.4f}",
            f"KS p: {_p(p)}",
        ]
        texts.append(f"{tour.name}, layer {tour.layer}: {', '.join(lines)}")
        panels.append(
            Bars(
                heights=heights,
                edges=edges,
                color=tour.color,
                label="Weights",
                curve=Line(x=x, y=normal, color="r", label="Normal distribution"),
                note="\n".join(lines),
                xlim=limits,
                xlabel="Weight value",
                ylabel="Density",
                title=f"Distribution of attention weights, {tour.where}",
            )
        )
    return Display(
        arrays=run.arrays(lambda tour: by_tour[tour.name]),
        panels=rows_of(panels, 1),
        caption=f"All weights of W_Q, W_K and W_V in {BINS} bins, with a normal distribution of the same mean and "
        f"standard deviation, and Kolmogorov and Smirnov's distance from it; {run.at_layers}.",
        size=(10, 4.6 * len(panels)),
        text="\n".join(texts),
    )


def _ks_p(statistic: float, n: int) -> float:
    """Returns the two-sided p-value of a Kolmogorov–Smirnov statistic, as `scipy.stats.kstest` gives it."""
    from scipy.special import kolmogorov

    if kolmogorov(statistic * n**0.5) == 0:  # then the exact value is 0 too, and its slow import is not needed
        return 0.0
    from scipy.stats import kstwo

    return float(kstwo.sf(statistic, n))


def _p(p: float) -> str:
    return "< 1e-300" if p < LEAST_P else f"{p:.3g}"


def _weight_image(values: np.ndarray, title: str, extent: tuple[int, int, int, int], limits: dict[str, Any]) -> Image:
    return Image(
        values=values,
        cmap="RdBu",
        extent=extent,
        title=title,
        xlabel="Output dimension (Q, K, V)",
        ylabel="Input dimension",
        colorbar="Weight value",
        **limits,
    )


@STUDY.define(
    "weights",
    "the attention weights of one layer",
    "weights [embed, qkv·head·head_dim]; with more checkpoints: *_NAME",
)
def figure_weights(run: WeightTourRun) -> Display:
    limits, panels = symmetric(*(tour.wide for tour in run.tours)), []
    for tour in run.tours:
        rows, columns = tour.wide.shape
        title = f"Attention weights, {tour.where}"
        panels.append(_weight_image(tour.wide, title, (0, columns, rows, 0), limits))
    return Display(
        arrays=run.arrays(lambda tour: {"weights": tour.wide}),
        panels=rows_of(panels, 1),
        caption=f"W_Q, W_K and W_V side by side; {run.at_layers}. White is 0, the ends of the colours the largest "
        "magnitude of all.",
        size=(12, 6 * len(panels)),
    )


# A window's rows (top, bottom) and columns (left, right).
Window = tuple[tuple[int, int], tuple[int, int]]


def _windows(shape: tuple[int, int]) -> list[Window]:
    """Returns the original's windows, or windows at the same fractions of the matrix if they do not fit."""
    axes = []
    for bounds, size, original_size in zip(
        zip(*WINDOWS, strict=True), shape, (ORIGINAL_WIDTH, 3 * ORIGINAL_WIDTH), strict=True
    ):
        ends = np.ravel(bounds)
        axes.append((ends if ends.max() <= size else ends * size // original_size).tolist())
    rows, columns = ([(ends[0], ends[1]), (ends[2], ends[3])] for ends in axes)
    return list(zip(rows, columns, strict=True))


@STUDY.define(
    "weights-zoom",
    "two windows of the attention weights",
    "window_NUMBER [row, column], rows_NUMBER, columns_NUMBER [start/stop]; NUMBER: 1, 2; with more checkpoints: "
    "*_NAME",
)
def figure_weights_zoom(run: WeightTourRun) -> Display:
    def arrays(tour: Tour) -> dict[str, Any]:
        cut = {}
        for number, ((top, bottom), (left, right)) in enumerate(_windows(tour.wide.shape), start=1):
            cut[f"window_{number}"] = tour.wide[top:bottom, left:right]
            cut[f"rows_{number}"], cut[f"columns_{number}"] = np.array([top, bottom]), np.array([left, right])
        return cut

    limits, rows = symmetric(*(tour.wide for tour in run.tours)), []
    for tour in run.tours:
        row = []
        for (top, bottom), (left, right) in _windows(tour.wide.shape):
            title = f"{tour.where[0].upper()}{tour.where[1:]}: rows {top}–{bottom}, columns {left}–{right}"
            row.append(_weight_image(tour.wide[top:bottom, left:right], title, (left, right, bottom, top), limits))
        rows.append(row)
    small = [tour.name for tour in run.tours if tuple(_windows(tour.wide.shape)) != WINDOWS]
    note = f" (In {', '.join(small)}, at the same fractions as the original's windows of 768 × 2,304.)" if small else ""
    return Display(
        arrays=run.arrays(arrays),
        panels=rows,
        caption=f"Two windows of the matrix of figure `weights`, in the same colours; {run.at_layers}.{note}",
        size=(14, 5.4 * len(rows)),
    )


# --- layers ---


@STUDY.define(
    "pca-variance",
    "variance explained by principal components",
    "layers [shown_layer], explained [shown_layer, component]; with more checkpoints: *_NAME",
)
def figure_pca_variance(run: WeightTourRun, components: ByCheckpoint) -> Display:
    def explained(tour: Tour) -> Float[np.ndarray, "layer component"]:
        return np.cumsum(components[tour.name][0], axis=1)

    panels = []
    for tour in run.tours:
        shown = len(tour.ends)
        lines = [
            Line(x=np.arange(1, curve.size + 1), y=curve, label=f"Layer {layer}", color=place / shown)
            for place, (layer, curve) in enumerate(zip(tour.ends, explained(tour), strict=True))
        ]
        panels.append(
            Lines(
                lines=lines,
                xlabel="Number of components",
                ylabel="Cumulative explained variance",
                title=f"Cumulative explained variance, {tour.label}",
                ylim=(0, 1.02),
                grid=True,
            )
        )
    return Display(
        arrays=run.arrays(lambda tour: {"layers": np.array(tour.ends), "explained": explained(tour)}),
        panels=[panels],
        caption="Share of the variance of W_Q, W_K and W_V (rows are samples, columns standardised) that the first "
        f"principal components explain, in the first and last layers of {run.names}.",
        size=(8 * len(panels), 4.6),
    )


@STUDY.define(
    "pca-scatter",
    "rows of the attention weights on two principal components",
    "layers [shown_layer], scores [shown_layer, embed, PC1/PC2], explained [shown_layer]; with more checkpoints: "
    "*_NAME",
)
def figure_pca_scatter(run: WeightTourRun, components: ByCheckpoint) -> Display:
    def arrays(tour: Tour) -> dict[str, Any]:
        explained, scores = components[tour.name]
        return {"layers": np.array(tour.ends), "scores": scores, "explained": explained[:, 0]}

    limits = [reach(*(components[tour.name][1][..., axis] for tour in run.tours)) for axis in (0, 1)]
    panels: list[Sequence[Panel]] = []
    for tour in run.tours:
        explained, scores = components[tour.name]
        each = [
            Lines(
                lines=[Line(x=x, y=y, color=tour.color, marker="o", linestyle="", size=4, alpha=0.6)],
                xlabel="First principal component",
                ylabel="Second principal component",
                title=f"Layer {layer} of {tour.label} ({share:.1%})",
                xlim=limits[0],
                ylim=limits[1],
            )
            for layer, (x, y), share in zip(tour.ends, scores.swapaxes(1, 2), explained[:, 0].tolist(), strict=True)
        ]
        panels += rows_of(each, min(ENDS, len(each)))
    return Display(
        arrays=run.arrays(arrays),
        panels=panels,
        caption="The rows of W_Q, W_K and W_V (columns standardised) on their first two principal components, in the "
        f"first and last layers of {run.names}; in the titles, the share of the variance that the first explains.",
        size=(13, 4 * len(panels)),
    )


@STUDY.define(
    "layer-statistics",
    "mean, standard deviation, maximum and minimum by layer",
    "mean, std, max, min [layer]; with more checkpoints: *_NAME",
)
def figure_layer_statistics(run: WeightTourRun, statistics: ByCheckpoint) -> Display:
    titles = {
        "mean": "Mean weight value",
        "std": "Weight standard deviation",
        "max": "Maximum weight value",
        "min": "Minimum weight value",
    }
    panels = [
        Lines(
            lines=run.overlaid(lambda tour: statistics[tour.name][name], marker="o"),  # noqa: B023
            xlabel="Layer",
            title=title,
            integer_x=True,
            grid=True,
        )
        for name, title in titles.items()
    ]
    return Display(
        arrays=run.arrays(lambda tour: statistics[tour.name]),
        panels=rows_of(panels, 2),
        caption="Mean, population standard deviation, maximum and minimum of W_Q, W_K and W_V together, by layer of "
        f"{run.names}.",
        size=(12, 7.4 if len(run.tours) > 1 else 7),
        legend=len(run.tours) > 1,
    )


@STUDY.define(
    "row-variance",
    "variance of the rows of the attention weights by layer",
    "variance [layer, embed]; with more checkpoints: *_NAME",
)
def figure_row_variance(run: WeightTourRun, row_variance: ByCheckpoint) -> Display:
    limits, rows = reach(*(row_variance[tour.name] for tour in run.tours)), []
    for tour in run.tours:
        variance = row_variance[tour.name]
        names = [str(layer) if len(variance) <= 24 or layer % 4 == 0 else "" for layer in range(len(variance))]
        rows.append(
            [
                Violins(
                    samples=list(variance),
                    names=names,
                    colors=[tour.color] * len(variance),
                    seed=run.seed,
                    points=False,
                    boxes=boxes,
                    xlabel="Layer",
                    ylabel="Variance",
                    ylim=limits,
                    title=f"Weight variances, {tour.label} ({kind})",
                )
                for boxes, kind in ((True, "box plot"), (False, "violin plot"))
            ]
        )
    return Display(
        arrays=run.arrays(lambda tour: {"variance": row_variance[tour.name]}),
        panels=rows,
        caption=f"Variance of each row of W_Q, W_K and W_V side by side, by layer of {run.names}.",
        size=(14, 4.6 * len(rows)),
    )
