"""`jaxqkv bench`: `scripts/benchmark.py`, which has a command line of its own."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxqkv.cli.parser import Line
from jaxqkv.errors import JaxqkvError

# Of a clone: the benchmark and its baselines in PyTorch are not part of the installed package.
SCRIPTS = Path(__file__).parents[2] / "scripts"


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Leaves the words after `bench` to the benchmark."""
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
