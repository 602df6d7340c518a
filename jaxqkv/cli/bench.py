"""`jaxqkv bench`: runs `scripts/benchmark.py`, which has a command line of its own."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxqkv.cli.parser import Line
from jaxqkv.errors import JaxqkvError

# Folder of the benchmark in a clone; it is not part of the installed package.
SCRIPTS = Path(__file__).parents[2] / "scripts"


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Returns the words after `bench` unparsed, for the benchmark."""
    return argparse.Namespace(words=list(words))


def run(given: argparse.Namespace, line: Line) -> int:
    """Runs the benchmark of this clone and returns its status."""
    if not (SCRIPTS / "benchmark.py").exists():
        where = "is in the repository, beside the package; run it from a clone installed with pip install -e '.[torch]'"
        raise JaxqkvError(f"the benchmark {where}")
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    import benchmark

    status: int = benchmark.main(given.words)
    return status
