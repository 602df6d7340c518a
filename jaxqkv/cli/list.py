"""`jaxqkv list`: lists the figures."""

import argparse
from collections.abc import Sequence
from typing import Any

from jaxqkv.cli.output import show
from jaxqkv.cli.parser import Line, Output, Parser, add_options
from jaxqkv.studies import registry
from jaxqkv.studies.options import flag, options_of
from jaxqkv.studies.study import Study

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
    document = [everything(study) for study in studies]
    show(given, document, lambda: Table(heading=("study", "id", "figure"), rows=rows, left=3).text())


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
        "figures": [{"id": spec.id, "title": spec.title} for spec in study.figures.values()],
    }
