"""How objects are shown in a terminal and in a notebook: names, shapes and sizes, without values.

No values are read, so that arrays that are traced, on a device or in a file can be shown too.
"""

import dataclasses
import html
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

# Style of a table's cells. Colours are the page's own, for light and dark pages; lines are half transparent.
_CELL = "text-align: left; padding: .15em .8em; border-top: 1px solid #8884"


class ArrayInfo(NamedTuple):
    """One field of a struct: its shape with the names of its axes, its dtype and its size in bytes."""

    name: str
    shape: str
    dtype: str
    nbytes: int


class Arrays:
    """Base class of structs of arrays that are shown with every field that is set."""

    @property
    def _about(self) -> str:
        """Returns the part of the heading after the name of the class."""
        return ""

    def __repr__(self) -> str:
        fields = array_fields(self)
        rows = [(each.name, each.shape, each.dtype, f"{megabytes(each.nbytes)} MB") for each in fields]
        return "\n".join([self._heading(fields), *aligned(rows)])

    def _repr_html_(self) -> str:
        fields = array_fields(self)
        rows = [(each.name, each.shape, each.dtype, megabytes(each.nbytes)) for each in fields]
        return table(self._heading(fields), ("field", "shape", "dtype", "MB"), rows)

    def _heading(self, fields: Sequence[ArrayInfo]) -> str:
        total = megabytes(sum(each.nbytes for each in fields))
        return f"{type(self).__name__}{self._about}: {total} MB"


def array_fields(struct: Any) -> list[ArrayInfo]:
    """Returns the fields of a dataclass that hold arrays or trees; axes have the names of the annotation."""
    rows = []
    for field in dataclasses.fields(struct):
        value = getattr(struct, field.name)
        if value is None or not field.metadata.get("pytree_node", True):
            continue
        shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
        if shape is None or dtype is None:  # a tree transformation may put anything here
            rows.append(ArrayInfo(field.name, type(value).__name__, "", 0))
            continue
        words = shape_text(shape, axis_names(field.type))
        rows.append(ArrayInfo(field.name, words, str(dtype), nbytes(shape, dtype)))
    return rows


def axis_names(annotation: Any) -> tuple[str, ...]:
    """Returns the axes that a jaxtyping annotation names: those of the first array type in it."""
    for each in typing.get_args(annotation) or (annotation,):
        if hasattr(each, "dim_str"):
            return tuple(each.dim_str.split())
    return ()


def shape_text(shape: Sequence[int], names: Sequence[str]) -> str:
    """Returns a shape with the names of its axes, `[head=8, pos=5]`; without names unless there are as many."""
    sizes = [f"{n}={s}" for n, s in zip(names, shape, strict=True)] if len(names) == len(shape) else shape
    return f"[{', '.join(map(str, sizes))}]"


def nbytes(shape: Sequence[int], dtype: Any) -> int:
    """Returns the size in bytes of an array of that shape."""
    return math.prod(shape) * dtype.itemsize


def plural(count: int, noun: str) -> str:
    """Returns the noun, in the plural unless there is one."""
    return noun if count == 1 else f"{noun}s"


def counted(count: int, noun: str) -> str:
    """Returns how many there are of what the noun names: "1 head", "1,024 heads"."""
    return f"{count:,} {plural(count, noun)}"


def megabytes(count: int) -> str:
    """Returns a number of bytes in units of a million, as text."""
    if 0 < count < 1000:
        return "< 0.001"
    return f"{count / 1e6:,.1f}" if count >= 1e6 else f"{count / 1e6:.3f}"


def ranges(numbers: Iterable[int]) -> str:
    """Returns ascending numbers as text, runs of them by their ends: 0–5, 8, 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = (f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return ", ".join(words)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns lines with aligned columns, the last one to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append("  " + "  ".join([*cells, row[-1].rjust(widths[-1])]))
    return lines


def table(title: str, heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns an HTML table with its own styles; `heading` may be empty."""

    def line(cells: Sequence[str], tag: str) -> str:
        inside = (f'<{tag} style="{_CELL}">{html.escape(cell)}</{tag}>' for cell in cells)
        return f"<tr>{''.join(inside)}</tr>"

    lines = [line(heading, "th")] if heading else []
    lines += [line(row, "td") for row in rows]
    caption = f'<caption style="text-align: left; font-weight: bold">{html.escape(title)}</caption>'
    return f'<table style="border-collapse: collapse">{caption}\n' + "\n".join(lines) + "\n</table>"


def facts_table(title: str, values: Mapping[str, str]) -> str:
    """Returns an HTML table of names and values."""
    return table(title, (), [(name.replace("  ", "\N{NO-BREAK SPACE}" * 4), value) for name, value in values.items()])
