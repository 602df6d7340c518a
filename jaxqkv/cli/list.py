"""`jaxqkv list`: lists the figures."""

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from jaxqkv.cli.output import show
from jaxqkv.cli.parser import Line, Output, Parser, add_options
from jaxqkv.studies import registry
from jaxqkv.studies.options import flag, options_of
from jaxqkv.studies.study import FigureSpec, Study

# Width of the output where it is no terminal, and least width of the last column, in characters.
WIDTH, NARROW = 100, 24
HEADING = ("study", "id")
EXAMPLES = """examples:
  jaxqkv list
  jaxqkv list weight-tour"""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parses the words after `list`."""
    about = "List the figures of all studies, or those of some with their arrays and axes."
    parser = Parser(prog="jaxqkv list", description=about, epilog=EXAMPLES)
    parser.add_argument("studies", metavar="STUDY", nargs="*", help="studies to list (default all)")
    add_options(parser, Output)
    return parser.parse_all(words)


def run(given: argparse.Namespace, line: Line) -> None:
    """Prints a row for each figure; below it the arrays, if studies are named."""
    from jaxqkv.figures.tables import Table

    studies = [registry.study(name) for name in given.studies or registry.names()]
    figures = [(study.name, spec) for study in studies for spec in study.figures.values()]
    rows = [(name, spec.id, spec.title) for name, spec in figures]
    on_terminal = sys.stdout.isatty()
    if given.studies or on_terminal:  # otherwise one line per figure, for programs
        room = shutil.get_terminal_size().columns if on_terminal else WIDTH
        columns = zip(HEADING, *(row[:2] for row in rows), strict=True)
        width = room - sum(2 + max(map(len, column)) for column in columns)
        arrays = bool(given.studies)
        rows = [row for name, spec in figures for row in rows_of(name, spec, max(width, NARROW), arrays)]
    last = "figure and arrays" if given.studies else "figure"
    document = [everything(study) for study in studies]
    show(given, document, lambda: Table(heading=(*HEADING, last), rows=rows, left=3).text())


def rows_of(study: str, spec: FigureSpec, width: int, arrays: bool) -> list[tuple[str, str, str]]:
    """Returns the rows of a figure, in lines of this width: its title, and if asked for its arrays, indented below."""
    first, *more = wrapped(spec.title, width)
    if arrays:
        more += [f"  {line}" for line in wrapped(str(spec.arrays), width - 2)]
    return [(study, spec.id, first), *(("", "", line) for line in more)]


def wrapped(text: str, width: int) -> list[str]:
    """Returns a text as lines; the axes of an array stay on one line where they fit."""
    how: dict[str, Any] = {"width": width, "break_long_words": False, "break_on_hyphens": False}
    whole = re.sub(r" \[[^]]*", lambda axes: axes[0].replace(" ", "\N{NO-BREAK SPACE}"), text)
    lines = (line.replace("\N{NO-BREAK SPACE}", " ") for line in textwrap.wrap(whole, **how))
    return [part for line in lines for part in textwrap.wrap(line, **how)]


def everything(study: Study) -> dict[str, Any]:
    """Returns what `--json` tells of a study: default checkpoints, options and figures."""
    return {
        "study": study.name,
        "title": study.title,
        "models": study.models,
        "demo": study.demo,
        "options": [
            {"option": flag(name), "default": default, "help": about.help}
            for name, (about, default) in options_of(study.options).items()
        ],
        "figures": [figure(spec) for spec in study.figures.values()],
    }


def figure(spec: FigureSpec) -> dict[str, Any]:
    """Returns a figure as `--json` prints it; an array that is always saved has an empty condition."""
    arrays = [{"name": each.name, "axes": each.axes, "condition": each.condition} for each in spec.arrays.declared]
    return {"id": spec.id, "title": spec.title, "arrays": arrays}
