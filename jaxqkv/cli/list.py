"""`jaxqkv list`: lists the figures."""

import argparse
from collections.abc import Sequence

from jaxqkv.cli.output import show
from jaxqkv.cli.parser import Line, Output, Parser, add_options
from jaxqkv.studies import registry

EXAMPLES = """examples:
  jaxqkv list
  jaxqkv list weight-tour"""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parses the words after `list`."""
    parser = Parser(prog="jaxqkv list", description="List the figures of all studies, or of some.", epilog=EXAMPLES)
    parser.add_argument("studies", metavar="STUDY", nargs="*", help="studies to list (default all)")
    add_options(parser, Output)
    return parser.parse_all(words)


def run(given: argparse.Namespace, line: Line) -> None:
    """Prints a row for each figure."""
    from jaxqkv.figures.tables import Table

    studies = [registry.study(name) for name in given.studies or registry.names()]
    rows = [(study.name, spec.id, spec.title) for study in studies for spec in study.figures.values()]
    document = [dict(zip(("study", "id", "title"), row, strict=True)) for row in rows]
    show(given, document, lambda: Table(heading=("study", "id", "figure"), rows=rows, left=3).text())
