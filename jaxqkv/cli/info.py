"""`jaxqkv info`: sizes, tokenizer and files of a checkpoint."""

import argparse
from collections.abc import Sequence

from jaxqkv.cli.output import show
from jaxqkv.cli.parser import Line, Output, Parser, add_checkpoint, add_options

EXAMPLES = """example:
  jaxqkv info demo-gpt2"""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parses the words after `info`."""
    parser = Parser(prog="jaxqkv info", description="Describe a checkpoint; its weights are not read.", epilog=EXAMPLES)
    add_checkpoint(parser)
    add_options(parser, Output)
    return parser.parse_all(words)


def run(given: argparse.Namespace, line: Line) -> None:
    """Prints a line for each fact."""
    from jaxqkv.architectures import open_checkpoint
    from jaxqkv.checkpoints.weights import Weights

    weights = Weights(open_checkpoint(given.spec, revision=given.revision))
    lines = (f"{name + ':':22}{value}" for name, value in weights.summary().items())
    show(given, weights.facts(), lambda: "\n".join(lines))
