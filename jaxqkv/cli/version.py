"""`jaxqkv version`: prints the versions of the package and of its main dependencies."""

import argparse
from collections.abc import Sequence

from jaxqkv.cli.output import show, versions
from jaxqkv.cli.parser import Line, Output, Parser, add_options


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parses the words after `version`."""
    parser = Parser(prog="jaxqkv version", description="Print the versions of jaxqkv and of its dependencies.")
    add_options(parser, Output)
    return parser.parse_all(words)


def run(given: argparse.Namespace, line: Line) -> None:
    """Prints a line for each package."""
    show(given, versions(), lambda: "\n".join(f"{name} {version}" for name, version in versions().items()))
