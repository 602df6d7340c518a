"""Panels: NumPy arrays and labels that draw themselves on an axis that they are given.

Nothing is computed here but pixels.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Shaped

from jaxqkv.errors import escaped
from jaxqkv.figures.style import LineStyle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# More points than this are drawn as pixels in svg and pdf.
DENSE = 2000


@dataclasses.dataclass(kw_only=True)
class Panel:
    """What every panel has: title, labels, limits, ticks."""

    title: str = ""
    xlabel: str = ""
    ylabel: str = ""
    xlim: tuple[float, float] | None = None
    ylim: tuple[float | None, float | None] | None = None
    xticks: Sequence[float] | None = None
    yticks: Sequence[float] | None = None
    wide: bool = False  # alone in its row, as wide as all columns

    def draw(self, ax: "Axes") -> None:
        """Draws the panel on `ax`."""
        self._draw(ax)
        ax.set(title=self.title, xlabel=self.xlabel, ylabel=self.ylabel)
        if self.xlim is not None:
            ax.set_xlim(self.xlim)
        if self.ylim is not None:
            ax.set_ylim(*self.ylim)
        if self.xticks is not None:
            ax.set_xticks(self.xticks)
        if self.yticks is not None:
            ax.set_yticks(self.yticks)

    def _draw(self, ax: "Axes") -> None:
        raise NotImplementedError


@dataclasses.dataclass(kw_only=True)
class Image(Panel):
    """A matrix as colours. `extent` is left, right, bottom, top in data units."""

    values: np.ndarray
    cmap: str = "plasma"
    vmin: float | None = None
    vmax: float | None = None
    extent: tuple[float, float, float, float] | None = None
    origin: Literal["upper", "lower"] = "upper"
    aspect: Literal["auto", "equal"] = "auto"
    colorbar: str = ""  # its label; pointed at an end that values lie beyond
    vlines: Sequence[float] = ()
    texts: Sequence[Sequence[str]] = ()  # a word in each cell
    cells: bool = False  # a line between cells
    tag: str = ""  # a word in the corner, readable on any colour
    integer_y: bool = False

    def _draw(self, ax: "Axes") -> None:
        from matplotlib.patheffects import withStroke

        image = ax.imshow(
            self.values,
            cmap=self.cmap,
            vmin=self.vmin,
            vmax=self.vmax,
            extent=self.extent,
            origin=self.origin,
            aspect=self.aspect,
            interpolation="nearest",
        )
        for x in self.vlines:
            ax.axvline(x, linestyle="--", color="w", linewidth=1)
        shades = np.asarray(image.norm(self.values))
        for row, words in enumerate(self.texts):
            for column, word in enumerate(words):
                light = shades[row, column] < 0.5
                ax.text(column, row, word, ha="center", va="center", color="w" if light else "k", fontsize=9)
        if self.cells:
            ax.set_xticks(np.arange(0.5, self.values.shape[1] - 1), minor=True)
            ax.set_yticks(np.arange(0.5, self.values.shape[0] - 1), minor=True)
            ax.grid(which="minor", color="0.5")
            ax.tick_params(which="minor", length=0)
            ax.spines[["top", "right"]].set_visible(True)
        if self.tag:
            effect = [withStroke(linewidth=3, foreground="k")]
            place: dict[str, Any] = {"xy": (0.03, 0.95), "xycoords": "axes fraction", "ha": "left", "va": "top"}
            ax.annotate(self.tag, **place, color="w", fontweight="bold", fontsize=12, path_effects=effect)
        if self.integer_y:
            _integer_ticks(ax.yaxis)
        if self.colorbar:
            ax.figure.colorbar(image, ax=ax, pad=0.01, label=self.colorbar, extend=self._beyond())

    def _beyond(self) -> Literal["neither", "min", "max", "both"]:
        """The ends of the colours that values lie beyond."""
        below = self.vmin is not None and bool((self.values < self.vmin).any())
        above = self.vmax is not None and bool((self.values > self.vmax).any())
        if below and above:
            return "both"
        return "min" if below else "max" if above else "neither"


@dataclasses.dataclass(kw_only=True)
class Line:
    """One curve, or one set of points, of a `Lines` panel; a number as colour is a place, 0…1, on its `cmap`."""

    x: np.ndarray
    y: np.ndarray
    label: str = ""
    color: str | float | None = None
    marker: str = ""
    linestyle: LineStyle = "-"
    alpha: float = 1.0
    face: float = 0.45  # opacity of the markers' faces
    size: float | None = None  # of the markers, in points; by their number unless given
    band: np.ndarray | None = None  # half-width of a shaded band around y
    error: np.ndarray | None = None  # half-length of an error bar at each point


@dataclasses.dataclass(kw_only=True)
class Lines(Panel):
    """Curves or points over a common axis, with a legend when they are named.

    `colorbar` is the label of a scale for lines coloured in order by `cmap`: a step a line, numbered from 0.
    """

    lines: Sequence[Line]
    integer_x: bool = False
    log_y: bool = False
    grid: bool = False
    zero_x: bool = False  # a dashed line at x = 0
    zero_y: bool = False  # and at y = 0
    colorbar: str = ""
    cmap: str = "plasma"

    def _draw(self, ax: "Axes") -> None:
        from matplotlib import colormaps
        from matplotlib.colors import to_rgba

        for line in self.lines:
            color = colormaps[self.cmap](line.color) if isinstance(line.color, float) else line.color
            face = None if color is None else to_rgba(color, line.face * line.alpha)
            size = line.size or (7 if line.x.size <= 24 else 5 if line.x.size <= DENSE else 3)
            many: dict[str, Any] = {"rasterized": True} if line.marker and line.x.size > DENSE else {}
            ax.plot(
                line.x,
                line.y,
                label=line.label or None,
                color=color,
                marker=line.marker,
                linestyle=line.linestyle,
                markerfacecolor=face,
                markersize=size,
                alpha=line.alpha,
                **many,
            )
            if line.band is not None:
                ax.fill_between(line.x, line.y - line.band, line.y + line.band, color=color, alpha=0.25, linewidth=0)
            if line.error is not None:
                ax.errorbar(line.x, line.y, line.error, fmt="none", color=color)
        if any(line.label for line in self.lines):
            ax.legend(fontsize=9, handlelength=3)
        if self.integer_x:
            _integer_ticks(ax.xaxis, *extremes(*(line.x for line in self.lines)))
        if self.log_y:
            ax.set_yscale("log", nonpositive="mask")
        if self.grid:
            ax.grid(linestyle="--", linewidth=0.4)
        if self.zero_x:
            ax.axvline(0, linestyle="--", color="0.7", linewidth=1, zorder=-3)
        if self.zero_y:
            ax.axhline(0, linestyle="--", color="0.7", linewidth=1, zorder=-3)
        if self.colorbar:
            self._draw_colorbar(ax)

    def _draw_colorbar(self, ax: "Axes") -> None:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, Normalize

        places = [line.color for line in self.lines if isinstance(line.color, float)]
        steps = ListedColormap([colormaps[self.cmap](place) for place in places])
        mappable = ScalarMappable(Normalize(-0.5, len(places) - 0.5), steps)
        bar = ax.figure.colorbar(mappable, ax=ax, pad=0.02, label=self.colorbar)
        _integer_ticks(bar.ax.yaxis)


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
    boxes: bool = False  # a box plot in the violins' place

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
    """Shares of a whole; slivers are named in the legend alone."""

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
    """A bar at each x, of pieces on top of each other: `heights [piece, x]`."""

    x: np.ndarray
    heights: np.ndarray
    names: Sequence[str]
    colors: Sequence[str]

    def _draw(self, ax: "Axes") -> None:
        base = np.zeros(len(self.x))
        for height, name, color in zip(self.heights, self.names, self.colors, strict=True):
            ax.bar(self.x, height, bottom=base, label=name, color=color, width=0.8)
            base += height
        _integer_ticks(ax.xaxis, *extremes(self.x))
        ax.set_ylim(0, 1.3 * base.max())  # room for the legend
        ax.legend(fontsize=9, ncols=len(self.names), loc="upper center")


@dataclasses.dataclass(kw_only=True)
class Dendrogram(Panel):
    """A tree of clusters, from a linkage as SciPy makes it."""

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


@dataclasses.dataclass(kw_only=True)
class Table(Panel):
    """Rows of text under a heading; the first `left` columns begin at the left, the others end at the right."""

    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def _draw(self, ax: "Axes") -> None:
        ax.axis("off")
        place: dict[str, Any] = {"bbox": (0, 0, 1, 1)} if self.wide else {}
        table = ax.table(
            cellText=[[plain(cell) for cell in row] for row in self.rows],
            colLabels=list(self.heading),
            cellLoc="right",
            colWidths=self._widths(),
            loc="center",
            **place,
        )
        table.auto_set_font_size(False)
        table.set_fontsize(10)
        if not self.wide:
            table.scale(1, 1.5)
        for (row, column), cell in table.get_celld().items():
            cell.set(facecolor="none", edgecolor=cell.get_text().get_color(), linewidth=0.4)
            cell.visible_edges = "B" if row == 0 else ""
            cell.get_text().set_horizontalalignment("left" if column < self.left else "right")
            if row == 0:
                cell.get_text().set_fontweight("bold")

    def _widths(self) -> list[float]:
        longest = [max(map(len, column)) + 2 for column in zip(self.heading, *self.rows, strict=True)]
        return [width / sum(longest) for width in longest]

    def text(self) -> str:
        """The same table for a terminal."""
        rows = [[escaped(cell) for cell in row] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(self.heading, *rows, strict=True)]
        lines = []
        for row in (self.heading, ["-" * width for width in widths], *rows):
            cells = [
                cell.ljust(width) if column < self.left else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def _integer_ticks(axis: "Axis", low: float | None = None, high: float | None = None) -> None:
    """Ticks at whole numbers alone, from `low` to `high` where those are given, else in the axis's limits."""
    from matplotlib.ticker import MaxNLocator

    locator = MaxNLocator(integer=True, min_n_ticks=1)
    axis.set_major_locator(locator)
    if low is not None and high is not None:
        axis.set_ticks([tick for tick in locator() if low <= tick <= high])


def extremes(*values: Shaped[np.ndarray, "..."]) -> tuple[float, float]:
    """The smallest and the largest value that is finite; 0 and 1 where none is."""
    finite = np.concatenate([each[np.isfinite(each)] for each in values])
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)


def plain(name: str) -> str:
    """A name that is shown as it is, not read as mathematics, and in one line."""
    return escaped(name).replace("$", r"\$")
