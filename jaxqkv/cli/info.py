"""`jaxqkv info`: describes a checkpoint."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jaxqkv.cli.output import show
from jaxqkv.cli.parser import Line, Output, Parser, add_checkpoint, add_options, made
from jaxqkv.errors import escaped
from jaxqkv.studies.options import option, whole_number

EXAMPLES = """examples:
  jaxqkv info demo-gpt2
  jaxqkv info demo-gpt2 --heads"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsOptions:
    """Heads to name."""

    heads: bool = option(False, "name the most typical heads of each kind, from the weights and one pass")
    tokenizer: Path | None = option(
        None, "take the tokenizer from this folder instead of the checkpoint's", parse=Path, metavar="FOLDER"
    )
    seed: int = option(0, "seed of the random tokens, and of the weights of random:SPEC", parse=whole_number(0),
                       metavar="N")  # fmt: skip


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parses the words after `info`."""
    parser = Parser(
        prog="jaxqkv info",
        description="Describe a checkpoint; without --heads its weights are not read.",
        epilog=EXAMPLES,
    )
    add_checkpoint(parser)
    for group in (HeadsOptions, Output):
        add_options(parser, group)
    return parser.parse_all(words)


def run(given: argparse.Namespace, line: Line) -> None:
    """Prints a line for each fact."""
    from jaxqkv.architectures import open_checkpoint
    from jaxqkv.checkpoints.weights import Weights

    options = made(HeadsOptions, given)
    checkpoint = open_checkpoint(given.spec, revision=given.revision, seed=options.seed)
    weights = Weights(checkpoint)
    lines = [f"{name + ':':22}{escaped(value)}" for name, value in weights.summary().items()]
    document = weights.facts()
    if options.heads:
        from jaxqkv.model.loading import load
        from jaxqkv.runtime.devices import enable_compilation_cache
        from jaxqkv.studies.heads import summary

        enable_compilation_cache()
        document["heads"] = summary.typical_heads(load(checkpoint, tokenizer=options.tokenizer), options.seed)
        lines += ["", summary.table(document["heads"]).text()]
    show(given, document, lambda: "\n".join(lines))
