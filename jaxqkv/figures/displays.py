"""Displays: a figure as arrays, panels in a grid and a caption, before it is drawn.

All matplotlib code of the project is in this folder.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Shaped

from jaxqkv.figures.panels import Image, Line, Panel, extremes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(kw_only=True)
class Display:
    """A figure that is not drawn yet.

    Attributes:
      arrays: plotted arrays, by their names in the .npz file.
      panels: rows of panels; a short last row leaves places empty.
      caption: what the figure shows, and of which checkpoint and layer.
      size: width and height in inches.
      title: above all panels.
      heights: relative heights of the rows; equal unless given.
      legend: whether one legend below all panels, that of the first with named lines, replaces their own.
      text: text to print when the figure is made, usually a table.
    """

    arrays: Mapping[str, Any]
    panels: Sequence[Sequence[Panel]]
    caption: str
    size: tuple[float, float]
    title: str = ""
    heights: Sequence[float] | None = None
    legend: bool = False
    text: str = ""

    def draw(self, figure: "Figure") -> None:
        """Draws the panels on an empty figure."""
        columns = max(map(len, self.panels))
        grid = figure.add_gridspec(len(self.panels), columns, height_ratios=self.heights)
        for i, row in enumerate(self.panels):
            for j, panel in enumerate(row):
                panel.draw(figure.add_subplot(grid[i, :] if panel.wide else grid[i, j]))
        if self.legend:
            handles, labels = next(filter(any, (axes.get_legend_handles_labels() for axes in figure.axes)))
            columns = min(len(labels), 4) if len(labels) % 3 else 3
            figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3)
            for legend in filter(None, (axes.get_legend() for axes in figure.axes)):
                legend.remove()
        if self.title:
            figure.suptitle(self.title)
        for axes in figure.axes:
            for spine in axes.spines.values():
                spine.set_in_layout(False)  # the box of the axes counts anyway, and measuring a spine takes long


def rows_of(panels: Sequence[Panel], columns: int) -> list[Sequence[Panel]]:
    """Arranges panels in rows of `columns`."""
    return [panels[start : start + columns] for start in range(0, len(panels), columns)]


def symmetric(*values: Shaped[np.ndarray, "..."]) -> dict[str, Any]:
    """Returns colour limits that all of the images share, with 0 in the middle."""
    largest = float(max(np.abs(each, where=np.isfinite(each), out=np.zeros_like(each)).max() for each in values))
    return {"vmin": -largest, "vmax": largest}


def reach(*values: Shaped[np.ndarray, "..."]) -> tuple[float, float]:
    """Returns axis limits that show all of the values, with a small margin."""
    smallest, largest = extremes(*values)
    margin = 0.05 * (largest - smallest) or 0.5
    return smallest - margin, largest + margin


def head_grid(n_head: int) -> tuple[int, int]:
    """Returns the rows and columns of a grid of `n_head` panels, no higher than wide: 12 → 3×4, 25 → 5×5."""
    rows = max(int(n_head**0.5), 1)
    return rows, -(-n_head // rows)


def head_images(
    heads: Shaped[np.ndarray, "head row column"], tag: str, original_grid: tuple[int, int], **image: Any
) -> tuple[list[Sequence[Panel]], str]:
    """Returns an image for each head, in rows, and the caption's note if the original has another grid."""
    rows, columns = head_grid(len(heads))
    panels = [Image(values=head, tag=f"{tag}{h}", xticks=(), yticks=(), **image) for h, head in enumerate(heads)]
    original = "×".join(map(str, original_grid))
    note = "" if (rows, columns) == original_grid else f" ({rows}×{columns} heads; {original} in the original.)"
    return rows_of(panels, columns), note


def layer_map(densities: Shaped[np.ndarray, "layer bin"], edges: Shaped[np.ndarray, "edge"], **image: Any) -> Image:
    """Returns an image of densities `[layer, bin]`, a row for each layer from the bottom up, over bins of `edges`."""
    extent = (float(edges[0]), float(edges[-1]), -0.5, len(densities) - 0.5)
    return Image(
        values=densities, extent=extent, origin="lower", vmin=0, ylabel="Transformer layer", integer_y=True, **image
    )


def head_map(values: Shaped[np.ndarray, "layer head"], **image: Any) -> Image:
    """Returns changes `[layer, head]` as an image, a column for each layer.

    Colours go to ± twice the mean of absolute values.
    """
    finite = values[np.isfinite(values)]
    limit = (2 * float(np.abs(finite).mean()) if finite.size else 0.0) or 1.0
    about: dict[str, Any] = {
        "xlabel": "Transformer layer",
        "ylabel": "Head",
        "integer_x": True,
        "integer_y": True,
        "origin": "lower",
    } | image
    return Image(values=values.T, cmap="RdBu_r", vmin=-limit, vmax=limit, **about)


def strongest(values: Shaped[np.ndarray, "layer head"], count: int = 3) -> str:
    """Returns in words the heads of the largest finite magnitudes, which may lie beyond the colours of `head_map`."""
    magnitudes = np.where(np.isfinite(values), np.abs(values), -1)
    order = np.argsort(-magnitudes, axis=None, kind="stable")[: min(count, int((magnitudes >= 0).sum()))]
    places = zip(*np.unravel_index(order, values.shape), strict=True)
    named = [f"{layer}.{head} ({values[layer, head]:.2f})" for layer, head in places]
    return ", ".join(named) or "none"


def layer_points(values: Shaped[np.ndarray, "layer"], marker: str, face: float = 1.0) -> list[Line]:
    """Returns a point for each layer, in the colours of `layer_lines`."""
    points = layer_lines([np.array([layer]) for layer in range(len(values))], values[:, None])
    return [dataclasses.replace(point, marker=marker, face=face) for point in points]


def layer_lines(x: Iterable[Shaped[np.ndarray, "point"]], y: Shaped[np.ndarray, "layer point"]) -> list[Line]:
    """Returns a curve for each layer, coloured from the first to the last."""
    return [Line(x=a, y=b, color=layer / len(y)) for layer, (a, b) in enumerate(zip(x, y, strict=True))]
