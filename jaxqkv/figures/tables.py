"""Tables, for pictures and terminals."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxqkv.errors import escaped
from jaxqkv.figures.panels import Panel, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(kw_only=True)
class Table(Panel):
    """Rows of text under a heading; the first `left` columns are aligned to the left, the others to the right."""

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
        """Returns the same table for a terminal."""
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
