"""Panels, which draw arrays and labels on an axis: images and curves.

Other kinds of panels are in `distributions.py` and `tables.py`.
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

# Number of points above which they are drawn as pixels in svg and pdf.
DENSE = 2000


@dataclasses.dataclass(kw_only=True)
class Panel:
    """The base class of panels, with title, labels, limits and ticks."""

    title: str = ""
    xlabel: str = ""
    ylabel: str = ""
    xlim: tuple[float, float] | None = None
    ylim: tuple[float | None, float | None] | None = None
    xticks: Sequence[float] | None = None
    xnames: Sequence[str] | None = None  # of these ticks
    yticks: Sequence[float] | None = None
    ynames: Sequence[str] | None = None  # of these ticks
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
            ax.set_xticks(self.xticks, self.xnames)
        if self.yticks is not None:
            ax.set_yticks(self.yticks, self.ynames)

    def _draw(self, ax: "Axes") -> None:
        raise NotImplementedError


@dataclasses.dataclass(kw_only=True)
class Image(Panel):
    """A matrix shown as colours. `extent` is left, right, bottom, top in data units."""

    values: np.ndarray
    cmap: str = "plasma"
    vmin: float | None = None
    vmax: float | None = None
    extent: tuple[float, float, float, float] | None = None
    origin: Literal["upper", "lower"] = "upper"
    aspect: Literal["auto", "equal"] = "auto"
    colorbar: str = ""  # its label; the bar is pointed at an end that values lie beyond
    vlines: Sequence[float] = ()
    hlines: Sequence[float] = ()
    boundaries: Sequence[float] = ()  # thin lines both down and across, between groups of rows and of columns
    texts: Sequence[Sequence[str]] = ()  # a word in each cell
    cells: bool = False  # a line between cells
    tag: str = ""  # a word in the corner, readable on any colour
    integer_x: bool = False
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
        for y in self.hlines:
            ax.axhline(y, linestyle="--", color="w", linewidth=1)
        for boundary in self.boundaries:
            ax.axvline(boundary, color="0.5", linewidth=0.3)
            ax.axhline(boundary, color="0.5", linewidth=0.3)
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
            tag = ax.annotate(self.tag, **place, color="w", fontweight="bold", fontsize=12, path_effects=effect)
            tag.set_in_layout(False)  # it is inside of the axes, and measuring it takes long
        for integer, axis in ((self.integer_x, ax.xaxis), (self.integer_y, ax.yaxis)):
            if integer:
                integer_ticks(axis)
        if self.colorbar:
            ax.figure.colorbar(image, ax=ax, pad=0.01, label=self.colorbar, extend=self._beyond())

    def _beyond(self) -> Literal["neither", "min", "max", "both"]:
        """Returns which ends of the colour scale some values lie beyond."""
        below = self.vmin is not None and bool((self.values < self.vmin).any())
        above = self.vmax is not None and bool((self.values > self.vmax).any())
        if below and above:
            return "both"
        return "min" if below else "max" if above else "neither"


@dataclasses.dataclass(kw_only=True)
class Line:
    """One curve, or one set of points, in a `Lines` panel; a colour that is a number is a place, 0…1, on `cmap`."""

    x: np.ndarray
    y: np.ndarray
    label: str = ""
    color: str | float | None = None
    marker: str = ""
    linestyle: LineStyle = "-"
    alpha: float = 1.0
    face: float = 0.45  # opacity of the markers' faces; 0 hides the line behind them too
    size: float | None = None  # of the markers, in points; depends on their number unless given
    band: np.ndarray | None = None  # half-width of a shaded band around y
    interval: tuple[np.ndarray, np.ndarray] | None = None  # lower and upper edge of a band
    error: np.ndarray | None = None  # half-length of an error bar at each point


@dataclasses.dataclass(kw_only=True)
class Lines(Panel):
    """Curves or points over a common axis, with a legend if they are named.

    `colorbar` is the label of a colour scale for lines coloured in order by `cmap`, with a step for each line, numbered
    from 0.
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
            face: Any = None if color is None else to_rgba(color, line.face * line.alpha)
            if not line.face:
                face = ax.get_facecolor()
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
            if line.interval is not None:
                ax.fill_between(line.x, *line.interval, color=color, alpha=0.25, linewidth=0)
            if line.error is not None:
                ax.errorbar(line.x, line.y, line.error, fmt="none", color=color)
        if any(line.label for line in self.lines):
            ax.legend(fontsize=9, handlelength=3)
        if self.integer_x:
            integer_ticks(ax.xaxis, *extremes(*(line.x for line in self.lines)))
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
        integer_ticks(bar.ax.yaxis)


def integer_ticks(axis: "Axis", low: float | None = None, high: float | None = None) -> None:
    """Puts ticks only at whole numbers: from `low` to `high`, or else as many as the axis has room for."""
    from matplotlib.ticker import MaxNLocator

    within = low is not None and high is not None
    locator = MaxNLocator(10 if within else "auto", integer=True, min_n_ticks=1)
    axis.set_major_locator(locator)
    if low is not None and high is not None:
        axis.set_ticks([tick for tick in locator() if low <= tick <= high])


def extremes(*values: Shaped[np.ndarray, "..."]) -> tuple[float, float]:
    """Returns the smallest and the largest finite value; 0 and 1 if there is none."""
    finite = np.concatenate([each[np.isfinite(each)] for each in values])
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)


def plain(name: str) -> str:
    """Returns a name escaped so that it is shown as it is, in one line, and not read as mathematics."""
    return escaped(name).replace("$", r"\$")
