"""The `jaxqkv` command. Heavy imports wait until the arguments are known to be good."""

import argparse
import contextlib
import functools
import re
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

import jaxqkv.errors
from jaxqkv import console
from jaxqkv.figures.drawing import FORMATS
from jaxqkv.figures.style import THEMES

if TYPE_CHECKING:
    from jaxqkv.figures.manifest import Record
    from jaxqkv.figures.registry import FigureSpec, Study

# Of a clone: the benchmark and its baselines in PyTorch are not part of the installed package.
SCRIPTS = Path(__file__).parents[1] / "scripts"

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
        self.exit(2, f"jaxqkv: error: {message}; see {self.prog} --help\n")


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

    def command(name: str, action: Callable[[argparse.Namespace], int | None], help: str, examples: str) -> Parser:
        added = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", epilog=examples)
        added.set_defaults(action=action)
        added.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return added

    figures = command("figures", _figures, "draw the figures of a study", FIGURES_EXAMPLE)
    figures.add_argument("study", metavar="STUDY", help="one of those that `jaxqkv list` names")
    figures.add_argument("ids", metavar="ID", nargs="*", help="figures to draw; all of the study unless given")
    figures.add_argument(
        "--model", nargs="+", metavar="SPEC", help="hub id, folder, demo-gpt2, demo-bert or random:SPEC"
    )
    for name, extra in COMMON_OPTIONS.items():
        figures.add_argument(f"--{name}", **extra)
    stimuli = figures.add_argument_group("stimuli of some studies")
    for name, extra in STUDY_OPTIONS.items():
        stimuli.add_argument(f"--{name.replace('_', '-')}", **extra)
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

    _add_output(command("list", _list, "list every figure", "example:\n  jaxqkv list"))

    info = command("info", _info, "describe a checkpoint", "example:\n  jaxqkv info demo-gpt2")
    info.add_argument("spec", metavar="SPEC", help="hub id, folder, demo-gpt2, demo-bert or random:SPEC")
    info.add_argument("--revision", help="branch, tag or commit on the hub")
    _add_output(info)

    view = command("view", _view, "make one interactive page of a text's attention in every head", VIEW_EXAMPLE)
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

    verify = command("verify", _verify, "compare every intermediate with PyTorch's", VERIFY_EXAMPLE)
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
    options, rest = top.parse_known_args(arguments)
    if rest and (options.command != "figures" or any(word.startswith("-") for word in rest)):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.ids += rest
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 for an error, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if [word for word in arguments[:2] if word != "--debug"][:1] == ["bench"]:
        return _bench(arguments[arguments.index("bench") + 1 :])
    options = parse(arguments)
    if options.version:
        print("\n".join(f"{name} {version}" for name, version in _versions().items()))
        return 0
    if options.command is None:
        parser().print_help()
        return 2
    options.arguments = arguments
    options.command_line = shlex.join(["jaxqkv", *arguments])
    with warnings.catch_warnings(), np.errstate():
        warnings.simplefilter("always", jaxqkv.errors.JaxqkvWarning)
        warnings.showwarning = functools.partial(_show_warning, warnings.showwarning, set())
        return _run(options)


def _show_warning(
    others: Callable[..., None], shown: set[str], message: Warning | str, category: type, *where: Any
) -> None:
    """A warning of this package as one line, if it was not `shown` before; `others` shows those of other packages."""
    if not issubclass(category, jaxqkv.errors.JaxqkvWarning):
        others(message, category, *where)
    elif str(message) not in shown:
        shown.add(str(message))
        print(f"jaxqkv: warning: {message}", file=sys.stderr)
        np.seterr(all="ignore")  # NumPy would go on about what comes of these weights, and name none


def _run(options: argparse.Namespace) -> int:
    try:
        if getattr(options, "precision", None):
            jaxqkv.devices.set_precision(options.precision)
        with console.quiet(options.quiet or options.json):
            return options.action(options) or 0
    except KeyboardInterrupt as stop:
        print("; ".join(["jaxqkv: interrupted", *map(str, stop.args)]), file=sys.stderr)
        _leave_job(options, 130)
        return 130
    except Exception as error:
        if options.debug:
            _leave_job(options, 1, error)
            raise
        if isinstance(error, BrokenPipeError) and options.command != "figures":  # `jaxqkv list | head`
            sys.stderr.close()
            return 0
        message = str(error)
        if not isinstance(error, jaxqkv.errors.JaxqkvError):
            what = jaxqkv.errors.printable(jaxqkv.errors.first_line(error))
            message = f"{type(error).__name__}: {what} (--debug shows where)"
        print(f"jaxqkv: error: {message}", file=sys.stderr, flush=True)
        _leave_job(options, 2)
        return 2


def _leave_job(options: argparse.Namespace, status: int, shown: Exception | None = None) -> None:
    """Of several processes, one that failed ends at once, with the traceback of what is to be `shown`."""
    if getattr(options, "distributed", None):
        from jaxqkv import distributed

        if shown is not None:
            traceback.print_exception(shown)
        distributed.leave(status)


def _bench(arguments: Sequence[str]) -> int:
    """`scripts/benchmark.py`, which has a command line of its own."""
    if not (SCRIPTS / "benchmark.py").exists():
        where = "is in the repository, beside the package; run it from a clone installed with pip install -e '.[torch]'"
        print(f"jaxqkv: error: the benchmark {where}", file=sys.stderr)
        return 2
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    import benchmark

    return benchmark.main(arguments)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"jaxqkv": jaxqkv.__version__} | {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")}


def _list(options: argparse.Namespace) -> None:
    from jaxqkv.figures.panels import Table
    from jaxqkv.figures.registry import STUDIES, study

    rows = [(name, spec.id, spec.title) for name in STUDIES for spec in study(name).figures.values()]
    document = [dict(zip(("study", "id", "title"), row, strict=True)) for row in rows]
    _show(options, document, lambda: Table(heading=("study", "id", "figure"), rows=rows, left=3).text())


def _info(options: argparse.Namespace) -> None:
    from jaxqkv.checkpoint import open_checkpoint
    from jaxqkv.weights import Weights

    weights = Weights(open_checkpoint(options.spec, revision=options.revision))
    lines = (f"{name + ':':22}{value}" for name, value in weights.summary().items())
    _show(options, weights.facts(), lambda: "\n".join(lines))


def _view(options: argparse.Namespace) -> None:
    from jaxqkv import devices
    from jaxqkv.figures.view import write_view
    from jaxqkv.files import prepare_file
    from jaxqkv.studies.options import read_text

    text = options.text if options.text_file is None else read_text(options.text_file)
    prepare_file(options.out)
    devices.enable_compilation_cache()
    model = jaxqkv.load(
        options.spec, revision=options.revision, seed=options.seed, stream=True, tokenizer=options.tokenizer
    )
    drawn = write_view(options.out, model, text, options.layers, options.command_line)
    size = options.out.stat().st_size
    document = {"drawn": drawn, "checkpoint": model.checkpoint.identity(), "page": str(options.out), "bytes": size}
    _show(options, document, lambda: f"{drawn}; {size / 1e6:.1f} MB, see {options.out}")


def _verify(options: argparse.Namespace) -> int:
    from jaxqkv import verify
    from jaxqkv.checkpoint import open_checkpoint
    from jaxqkv.files import prepare_file

    checkpoint = open_checkpoint(options.spec, revision=options.revision)
    prepare_file(options.out)
    report = verify.report(checkpoint, options.text, options.dtype)
    report |= {name: value for name, value in _about_run(options).items() if name not in report}
    verify.write(report, options.out)
    verdict = "passed" if report["passed"] else "FAILED"
    last = f"{verdict}: {report['checkpoint']['checkpoint']}, {report['batch']}; see {options.out}"
    _show(options, report | {"report": str(options.out)}, lambda: f"{verify.table(report).text()}\n{last}")
    return 0 if report["passed"] else 1


def _figures(options: argparse.Namespace) -> None:
    from jaxqkv import devices, distributed
    from jaxqkv.figures import gallery, manifest
    from jaxqkv.figures.registry import study

    chosen = study(options.study)
    specs = chosen.select(options.ids)
    for name in ("model", "compare"):  # they take several values, and figure ids after them too
        taken = [spec for spec in getattr(options, name) or () if spec in chosen.figures and not Path(spec).exists()]
        if taken:
            raise jaxqkv.errors.JaxqkvError(f"{taken[0]} is a figure of {chosen.name}; ids stand before --{name}")
    for name in (*STUDY_OPTIONS, "distributed"):
        if getattr(options, name) is not None and name not in chosen.options:
            raise jaxqkv.errors.JaxqkvError(f"{chosen.name} takes no --{name.replace('_', '-')}")
    lost = [name for name in ("coordinator", "processes", "process") if getattr(options, name) is not None]
    if lost and not options.distributed:
        raise jaxqkv.errors.JaxqkvError(f"--{lost[0]} is for --distributed, which is not given")
    if options.distributed:
        distributed.start(options.coordinator, options.processes, options.process, options.patience)
    if not options.no_compilation_cache:
        devices.enable_compilation_cache()
    folder = gallery.prepare_folder(options.out, chosen.name)
    record = manifest.Record(folder, chosen.name)
    try:
        _draw(options, chosen, specs, record)
    except KeyboardInterrupt:
        done = f"{len(record.finished)} of {len(specs)} figures finished in {folder}: {', '.join(record.finished)}"
        none = f"no figure was finished, and {folder} is as it was"
        raise KeyboardInterrupt(done if record.finished else none) from None


def _draw(options: argparse.Namespace, chosen: "Study", specs: Sequence["FigureSpec"], record: "Record") -> None:
    from jaxqkv import distributed
    from jaxqkv.figures import gallery, manifest
    from jaxqkv.files import locked

    start = time.monotonic()
    run = chosen.run(options)
    record.about = {"seed": options.seed} | _about_run(options) | run.describe()
    _say(f"{chosen.name}: {', '.join(checkpoint['checkpoint'] for checkpoint in record.about['checkpoint'])}")
    run.prepare(chosen.needs(specs))
    if distributed.index() > 0:  # the first process has everything, and writes it
        return
    record.about |= run.describe()
    for note in record.about.get("notes", ()):
        _say(note)
    formats = [] if options.arrays_only else [FORMATS[0], *(kind for kind in FORMATS[1:] if kind in options.format)]
    record.computing = time.monotonic() - start
    left_out: dict[str, str] = {}
    try:
        for spec in console.bar(specs, desc="figures", unit="figure"):
            begin = time.monotonic()
            try:
                display = spec.make(run)
            except jaxqkv.errors.NotDrawable as error:
                if spec.id in options.ids or len(specs) == 1:
                    raise
                left_out[spec.id] = str(error)
                print(f"jaxqkv: {spec.id} is not drawn: {error}", file=sys.stderr)
                continue
            if display.text:
                _say(display.text)
            record.computing += time.monotonic() - begin
            command = command_for(spec.id, options.arguments)
            gallery.save_figure(display, spec, record, command, formats, options.theme, options.dpi)
    finally:  # an interrupted run leaves a page that shows what it finished
        if record.finished:
            with locked(options.out):  # of several runs at once, the last one's page shows what all have finished
                page = gallery.write_gallery(options.out)
    if not record.finished:
        raise jaxqkv.errors.JaxqkvError(f"no figure of {chosen.name} can be drawn of this")
    chosen.finish(run)
    figures = {
        id: entry | {"files": [str(record.folder / name) for name in entry["files"]]}
        for id, entry in record.finished.items()
    }
    document = {"study": chosen.name, **record.about, "seconds": record.seconds, "figures": figures}
    document |= {"not drawn": left_out, "manifest": str(record.folder / manifest.NAME), "page": str(page)}
    drawn = f"{len(figures)} figure{'s' * (len(figures) != 1)} in {record.folder}"
    times = "computing {computing:.1f} s, drawing {drawing:.1f} s".format(**record.seconds)
    _show(options, document, lambda: f"{drawn}; {times}; see {page}")


def _show(options: argparse.Namespace, document: Any, text: Callable[[], str]) -> None:
    """The result of a command: a text for people, with --json a document for programs, with --quiet nothing."""
    if options.json:
        print(console.as_json(document), flush=True)
    elif not options.quiet:
        _say(text())


def _say(text: str) -> None:
    """Prints, unless told to be quiet; a reader who has gone away (`| head`) does not stop the figures."""
    if console.is_quiet():
        return
    with contextlib.suppress(BrokenPipeError):
        print(text, flush=True)


def _about_run(options: argparse.Namespace) -> dict[str, Any]:
    import jax

    from jaxqkv import devices

    device = jax.devices()[0]
    return {
        "command": options.command_line,
        "dtype": options.dtype or "float32",
        "precision": devices.precision(),
        "device": f"{device.platform}: {device.device_kind}",
        "versions": _versions(),
    }


if __name__ == "__main__":
    sys.exit(main())
