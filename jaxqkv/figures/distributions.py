"""Panels of distributions and shares: histograms, violins, pies, stacked bars, trees of clusters."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxqkv.figures.panels import DENSE, Line, Panel, extremes, integer_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(kw_only=True)
class Bars(Panel):
    """A histogram: `heights` over the bins between `edges`."""

    heights: np.ndarray
    edges: np.ndarray
    color: str = "gray"
    outline: bool = True
    curve: Line | None = None  # over the bars
    label: str = ""  # of the bars, in a legend
    note: str = ""  # lines of text in the upper left corner

    def _draw(self, ax: "Axes") -> None:
        ax.stairs(self.heights, self.edges, fill=True, color=self.color, alpha=0.8, label=self.label or None)
        if self.outline:
            ax.stairs(self.heights, self.edges, color="k", linewidth=0.6, fill=False)
        if self.curve is not None:
            ax.plot(self.curve.x, self.curve.y, color=self.curve.color, label=self.curve.label or None)
        if self.label:
            ax.legend(fontsize=9)
        if self.note:
            ax.annotate(self.note, (0.02, 0.97), xycoords="axes fraction", ha="left", va="top", fontsize=9)


@dataclasses.dataclass(kw_only=True)
class Violins(Panel):
    """Samples side by side: every value as a point, jittered with `seed`, and a violin over them."""

    samples: Sequence[np.ndarray]
    names: Sequence[str]
    colors: Sequence[str]
    seed: int
    zero_y: bool = False  # a dashed line at y = 0
    points: bool = True
    boxes: bool = False  # box plots instead of violins

    def _draw(self, ax: "Axes") -> None:
        from matplotlib.colors import to_rgba

        places = np.arange(1, len(self.samples) + 1)
        ink = ax.xaxis.label.get_color()
        if self.points:
            self._draw_points(ax, places)
        if self.boxes:
            thin = {"color": ink, "linewidth": 0.8}
            lines: dict[str, Any] = dict.fromkeys(("whiskerprops", "capprops", "medianprops"), thin)
            outliers = {"marker": ".", "markersize": 3, "markeredgecolor": ink, "alpha": 0.5}
            parts = ax.boxplot(list(self.samples), positions=places, patch_artist=True, flierprops=outliers, **lines)
            for box, color in zip(parts["boxes"], self.colors, strict=True):
                box.set(facecolor=to_rgba(color, 0.6), edgecolor=ink, linewidth=0.8)
        else:
            violins: dict[str, Any] = ax.violinplot(list(self.samples), places)
            for body, color in zip(violins["bodies"], self.colors, strict=True):
                body.set(facecolor=color, alpha=0.6)
            for name in ("cbars", "cmins", "cmaxes"):
                violins[name].set(edgecolor=ink, linewidth=0.7)
        if self.zero_y:
            ax.axhline(0, linestyle="--", color="0.7", linewidth=1, zorder=-3)
        ax.set_xticks(places, self.names)

    def _draw_points(self, ax: "Axes", places: np.ndarray) -> None:
        from matplotlib.colors import to_rgba

        generator = np.random.default_rng(self.seed)
        for place, sample, color in zip(places, self.samples, self.colors, strict=True):
            x = generator.normal(place, 0.04, sample.size)
            face, edge = to_rgba(color, 0.25), to_rgba(color, 0.5)
            ax.plot(x, sample, "o", markersize=3, markerfacecolor=face, markeredgecolor=edge, markeredgewidth=0.3,
                    rasterized=sample.size > DENSE)  # fmt: skip


@dataclasses.dataclass(kw_only=True)
class Pie(Panel):
    """A pie chart; small shares are named only in the legend."""

    values: Sequence[float]
    names: Sequence[str]
    colors: Sequence[str]

    def _draw(self, ax: "Axes") -> None:
        total = sum(self.values)
        wedges, *_ = ax.pie(
            self.values,
            colors=self.colors,
            autopct=lambda percent: f"{percent:.1f} %" if percent > 3 else "",
            pctdistance=0.75,
            startangle=90,
            counterclock=False,
            textprops={"color": "w", "fontsize": 9, "fontweight": "bold"},
        )
        labels = [f"{name} ({value / total:.2%})" for name, value in zip(self.names, self.values, strict=True)]
        ax.legend(wedges, labels, loc="upper center", bbox_to_anchor=(0.5, 0.02), fontsize=9)


@dataclasses.dataclass(kw_only=True)
class StackedBars(Panel):
    """A stacked bar at each x, of `heights [piece, x]`."""

    x: np.ndarray
    heights: np.ndarray
    names: Sequence[str]
    colors: Sequence[str]

    def _draw(self, ax: "Axes") -> None:
        base = np.zeros(len(self.x))
        for height, name, color in zip(self.heights, self.names, self.colors, strict=True):
            ax.bar(self.x, height, bottom=base, label=name, color=color, width=0.8)
            base += height
        integer_ticks(ax.xaxis, *extremes(self.x))
        ax.set_ylim(0, 1.3 * base.max())  # room for the legend
        ax.legend(fontsize=9, ncols=len(self.names), loc="upper center")


@dataclasses.dataclass(kw_only=True)
class Dendrogram(Panel):
    """A tree of clusters, from SciPy's linkage."""

    linkage: np.ndarray
    color: str

    def _draw(self, ax: "Axes") -> None:
        from scipy.cluster.hierarchy import dendrogram

        tree = dendrogram(self.linkage, no_plot=True)
        for x, y in zip(tree["icoord"], tree["dcoord"], strict=True):
            ax.plot(x, y, color=self.color, linewidth=1.2)
        leaves = tree["leaves"]
        ax.set_xticks(5 + 10 * np.arange(len(leaves)), leaves, fontsize=8 if len(leaves) < 20 else 6)
        ax.set_ylim(0, None)
