"""The arguments of the `jaxqkv` command, which are the options of a call from Python too."""

import argparse
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxqkv.errors import printable
from jaxqkv.figures.drawing import FORMATS
from jaxqkv.figures.style import THEMES
from jaxqkv.studies.registry import STUDIES

FIGURES_EXAMPLE = """examples:
  jaxqkv figures qkv-weights --demo
  jaxqkv figures qkv-weights 2c 5b --model gpt2 random:gpt2 --theme dark --format svg"""


VIEW_EXAMPLE = """examples:
  jaxqkv view demo-gpt2 --text "I saw her at the market."
  jaxqkv view gpt2-xl --text-file story.txt --layers 0 24 47 --out story.html"""

VERIFY_EXAMPLE = """example:
  jaxqkv verify demo-gpt2

exit status 0 when every tensor of every layer is within the tolerance, 1 when one is not"""


class Parser(argparse.ArgumentParser):
    """Errors in one line, and help as it is written."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """One line and status 2."""
        self.exit(2, f"jaxqkv: error: {printable(message)}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    top = Parser(
        prog="jaxqkv",
        description="Look inside the attention of GPT-2 and BERT.",
        epilog="example:\n  jaxqkv figures qkv-weights --demo",
    )
    top.add_argument("--version", action="store_true", help="print the version and those of its dependencies")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    top.set_defaults(quiet=False, json=False)
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, help: str, examples: str) -> Parser:
        added = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", epilog=examples)
        added.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return added

    figures = command("figures", "draw the figures of a study", FIGURES_EXAMPLE)
    figures.add_argument("study", metavar="STUDY", help="one of those that `jaxqkv list` names")
    figures.add_argument("ids", metavar="ID", nargs="*", default=[], help="figures to draw (default all of the study)")
    figures.add_argument(
        "--model", nargs="+", metavar="SPEC", help="hub id, folder, demo-gpt2, demo-bert or random:SPEC"
    )
    for name, extra in COMMON_OPTIONS.items():
        figures.add_argument(f"--{name}", **extra)
    own = figures.add_argument_group("options of some studies")
    for name, extra in STUDY_OPTIONS.items():
        own.add_argument(f"--{name.replace('_', '-')}", **extra)
    job = figures.add_argument_group("several processes of one job (token-frequency)")
    job.add_argument("--distributed", action="store_true", default=None, help="join the job; the first draws")
    job.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process, where SLURM and such do not say")
    job.add_argument("--processes", type=_from(1), metavar="N", help="how many there are")
    job.add_argument("--process", type=_from(0), metavar="I", help="which one this is, from 0")
    job.add_argument("--patience", type=_from(1), default=60, help="seconds to wait for the others (default 60)")
    figures.add_argument("--out", type=Path, default=Path("figures"), help="folder (default %(default)s)")
    figures.add_argument("--format", nargs="+", choices=FORMATS, default=[], help="besides png")
    figures.add_argument("--arrays-only", action="store_true", help="write the .npz files and draw nothing")
    _add_precision(figures)
    _add_output(figures)
    figures.add_argument("--no-compilation-cache", action="store_true", help="do not keep XLA's compiled programs")

    _add_output(command("list", "list every figure", "example:\n  jaxqkv list"))

    info = command("info", "describe a checkpoint", "example:\n  jaxqkv info demo-gpt2")
    info.add_argument("spec", metavar="SPEC", help="hub id, folder, demo-gpt2, demo-bert or random:SPEC")
    info.add_argument("--revision", help="branch, tag or commit on the hub")
    _add_output(info)

    view = command("view", "make one interactive page of a text's attention in every head", VIEW_EXAMPLE)
    view.add_argument("spec", metavar="SPEC", help="hub id, folder, demo-gpt2, demo-bert or random:SPEC")
    view.add_argument("--revision", help="branch, tag or commit on the hub")
    text = view.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", help="the text to look at")
    text.add_argument("--text-file", type=Path, metavar="FILE", help="the same, from a file")
    view.add_argument("--layers", nargs="+", type=_from(0), metavar="LAYER", help="layers to show (default all)")
    view.add_argument("--seed", type=_from(0), default=0, help="of the weights of random:SPEC (default %(default)s)")
    view.add_argument("--tokenizer", **STUDY_OPTIONS["tokenizer"])
    _add_precision(view)
    _add_output(view)
    view.add_argument("--out", type=Path, default=Path("attention.html"), help="the page (default %(default)s)")

    verify = command("verify", "compare every intermediate with PyTorch's", VERIFY_EXAMPLE)
    verify.add_argument("spec", metavar="SPEC", help="hub id, folder, demo-gpt2, demo-bert or random:SPEC")
    verify.add_argument("--revision", help="branch, tag or commit on the hub")
    verify.add_argument("--text", nargs="+", help="texts to run (default two of the studies')")
    verify.add_argument("--dtype", choices=DTYPES, default="float32", help="of the arithmetic (default %(default)s)")
    _add_precision(verify)
    _add_output(verify)
    verify.add_argument("--out", type=Path, default=Path("verify.json"), help="the report (default %(default)s)")

    commands.add_parser("bench", help="time it against PyTorch; `jaxqkv bench --help` says more", add_help=False)
    return top


def _add_precision(command: Parser) -> None:
    """JAX's own names; `devices.PRECISIONS`, which this module does not import before it has to."""
    help = "of float32 matrix products; high and default on accelerators, bfloat16 everywhere (default highest)"
    command.add_argument("--precision", choices=("highest", "high", "default", "bfloat16"), help=help)


def _add_output(command: Parser) -> None:
    """What the command says: for people unless one of these is given."""
    how = command.add_mutually_exclusive_group()
    how.add_argument("--quiet", action="store_true", help="say nothing but errors and warnings, draw no bars")
    how.add_argument("--json", action="store_true", help="the same, and the result as one JSON document on stdout")


def _from(smallest: int, largest: int | None = None) -> Callable[[str], int]:
    """An argument type: a whole number in a range."""

    def number(text: str) -> int:
        value = int(text)
        if value < smallest or (largest is not None and value > largest):
            limits = f"from {smallest} " + ("up" if largest is None else f"to {largest}")
            raise argparse.ArgumentTypeError(f"{value} is not a whole number {limits}")
        return value

    number.__name__ = "whole number"
    return number


def _bytes(text: str) -> int:
    """An argument type: a size with a unit, or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 2GB or 500MB")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


def _devices(text: str) -> int | str:
    """An argument type: how many devices."""
    return text if text == "all" else _from(1)(text)


def _mesh(text: str) -> dict[str, int]:
    """An argument type: the parts of each axis, as data=4,head=2."""
    parts = re.fullmatch(r"(?:(data|head)=([1-9]\d*))(?:,(data|head)=([1-9]\d*))?", text)
    if not parts or parts[1] == parts[3]:
        raise argparse.ArgumentTypeError(f"{text} is not like data=4,head=2")
    return {"data": 1} | {name: int(size) for name, size in (parts.group(1, 2), parts.group(3, 4)) if name}


DTYPES = ("float32", "bfloat16")

# Arguments that every study takes, on the command line and from Python.
COMMON_OPTIONS: dict[str, dict[str, Any]] = {
    "demo": {"action": "store_true", "help": "use the bundled checkpoint that fits the study"},
    "revision": {"help": "branch, tag or commit on the hub"},
    "layer": {"type": int, "help": "instead of the study's own layer"},
    "seed": {"type": _from(0), "default": 0, "help": "of everything random (default %(default)s)"},
    "theme": {"choices": THEMES, "default": "light"},
    "dpi": {"type": _from(10, 2400), "default": 200, "help": "of the pictures (default %(default)s)"},
}

# Arguments that only some studies take; each study names its own.
STUDY_OPTIONS: dict[str, dict[str, Any]] = {
    "text": {"nargs": "+", "help": "text instead of the study's own; several make a batch"},
    "text_file": {"nargs": "+", "type": Path, "metavar": "FILE", "help": "the same, each from a file"},
    "sentences": {"type": Path, "metavar": "FILE", "help": "sentences instead of the study's own, one a line"},
    "target": {"metavar": "WORD", "help": 'target token, with its leading space (default " her")'},
    "measure": {"choices": ("correlation", "cosine"), "help": "similarity to go on with (default correlation)"},
    "skip_missing": {"action": "store_true", "default": None, "help": "leave out sentences without the target"},
    "corpus": {
        "action": "append",
        "metavar": "SPEC",
        "help": "hub data set NAME[:CONFIG[:SPLIT]], file or folder of .txt, .jsonl, .parquet (of these, several: "
        "--corpus A --corpus B), or python-docs",
    },
    "documents": {"choices": ("files", "paragraphs"), "help": "what a document of a .txt file is (default files)"},
    "text_column": {"metavar": "NAME", "help": "field or column with the text (default text)"},
    "tokens": {"type": _from(1), "help": "tokens to count at least (default 1,000,000)"},
    "batch": {"type": _from(1), "help": "documents to run (default 64)"},
    "length": {"type": _from(2), "help": "tokens of each (default the model's positions)"},
    "memory": {"type": _bytes, "help": "for temporaries of a block, as 2GB or 500MB (default 2GB)"},
    "no_cache": {"action": "store_true", "default": None, "help": "count anew, and do not keep the counts"},
    "resume": {
        "action": "store_true",
        "default": None,
        "help": "go on from the state that an interrupted run left in the folder",
    },
    "compare": {
        "nargs": "+",
        "metavar": "SPEC",
        "help": "further checkpoints, overlaid or beside; NAME@REVISION on the hub",
    },
    "as_published": {"action": "store_true", "default": None, "help": "as the original, also where it slips"},
    "devices": {"type": _devices, "metavar": "N|all", "help": "devices that share the batch (default one)"},
    "mesh": {
        "type": _mesh,
        "metavar": "AXES",
        "help": "data=N,head=M: N parts of the batch, each on M devices that share the heads",
    },
    "dtype": {"choices": DTYPES, "help": "of the model's arithmetic (default float32); statistics are float32"},
    "tokenizer": {"type": Path, "metavar": "FOLDER", "help": "tokenizer files, instead of the checkpoint's own"},
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments; figure ids may stand before and after the options."""
    top = parser()
    if arguments and arguments[0] in STUDIES:
        top.exit(2, f"jaxqkv: error: {arguments[0]} is a study; jaxqkv figures {shlex.join(arguments)} draws it\n")
    options, rest = top.parse_known_args(arguments)
    if rest and (options.command != "figures" or any(word.startswith("-") for word in rest)):
        said = f"unrecognized arguments: {' '.join(rest)}"
        if getattr(options, "text", None) and not rest[0].startswith("-"):
            said += "; quote a text of several words"
        top.exit(2, f"jaxqkv: error: {printable(said)}; see jaxqkv {options.command} --help\n")
    if rest:
        options.ids = [*options.ids, *rest]
    return options


class _Argument(str):
    """An argument that is told from its equals: the 6 of `--layer 6` from figure 6."""


def command_for(id: str, arguments: Sequence[str]) -> str:
    """The command that draws one figure as these arguments do: the same line with that id alone."""
    words = [_Argument(word) for word in arguments]
    options = parse(words)
    kept = [word for word in words if not any(word is each for each in options.ids)]
    place = 1 + next(index for index, word in enumerate(kept) if word is options.study)
    return shlex.join(["jaxqkv", *kept[:place], id, *kept[place:]])
