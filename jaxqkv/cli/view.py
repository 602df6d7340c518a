"""`jaxqkv view`: writes one interactive page of a text's attention in every head."""

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from jaxqkv.cli.output import show
from jaxqkv.cli.parser import Line, Output, Parser, Precision, add_checkpoint, add_options, made
from jaxqkv.errors import JaxqkvError
from jaxqkv.studies.options import option, whole_number

EXAMPLES = """examples:
  jaxqkv view demo-gpt2 --text "I saw her at the market."
  jaxqkv view demo-gpt2 --text "I saw her at the market." --types
  jaxqkv view demo-gpt2 --text-file story.txt --layers 0 4 7 --out story.html"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """Contents of the page."""

    text: str | None = option(None, "text to show", metavar="TEXT")
    text_file: Path | None = option(None, "file with the text to show", parse=Path, metavar="FILE")
    layers: tuple[int, ...] = option(
        (), "layers to show (default all)", parse=whole_number(0), metavar="LAYER", several=True
    )
    types: bool = option(
        False,
        "name heads by type and order by it: previous token, duplicate, induction, first, …; one pass over 64 texts",
    )
    seed: int = option(
        0, "seed of the random tokens of --types, and of the weights of random:SPEC", parse=whole_number(0), metavar="N"
    )
    tokenizer: Path | None = option(
        None, "take the tokenizer from this folder instead of the checkpoint's", parse=Path, metavar="FOLDER"
    )
    out: Path = option(Path("attention.html"), "file to write the page to", parse=Path, metavar="FILE")

    def __post_init__(self) -> None:
        if (self.text is None) == (self.text_file is None):
            raise JaxqkvError("give exactly one of --text and --text-file")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parses the words after `view`."""
    parser = Parser(
        prog="jaxqkv view",
        description="Make one page that shows the attention of every head on a text: patterns, scores, norms of what\n"
        "queries take (‖α v W_O‖), and products q_i·k_i by dimension. It needs no network.",
        epilog=EXAMPLES,
    )
    add_checkpoint(parser)
    for group in (ViewOptions, Precision, Output):
        add_options(parser, group)
    return parser.parse_all(words, "; quote a text of several words")


def run(given: argparse.Namespace, line: Line) -> None:
    """Writes the page and prints what is on it."""
    from jaxqkv.model.loading import load
    from jaxqkv.pages.view import write_view
    from jaxqkv.runtime import devices, showing
    from jaxqkv.runtime.files import prepare_file
    from jaxqkv.text.reading import read_text

    options = made(ViewOptions, given)
    text = options.text if options.text_file is None else read_text(options.text_file)
    assert text is not None  # the options are checked
    prepare_file(options.out)
    devices.enable_compilation_cache()
    model = load(given.spec, revision=given.revision, seed=options.seed, stream=True, tokenizer=options.tokenizer)
    types = None
    if options.types:
        from jaxqkv.studies.heads import summary

        types = functools.partial(summary.typed_heads, seed=options.seed)
    drawn = write_view(options.out, model, text, list(options.layers) or None, str(line), types)
    size = options.out.stat().st_size
    document = {"drawn": drawn, "checkpoint": model.checkpoint.identity(), "page": str(options.out), "bytes": size}
    show(given, document, lambda: f"{drawn}; {showing.megabytes(size)} MB, see {options.out}")
