"""The `jaxqkv` command. Heavy imports wait until the arguments are known to be good."""

import argparse
import contextlib
import functools
import io
import logging
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

import jaxqkv.errors
from jaxqkv import console, interrupts, showing
from jaxqkv.arguments import STUDY_OPTIONS, command_for, parse, parser
from jaxqkv.figures import manifest
from jaxqkv.figures.drawing import FORMATS
from jaxqkv.figures.registry import STUDIES, FigureSpec, Run, Study, study

# Of a clone: the benchmark and its baselines in PyTorch are not part of the installed package.
SCRIPTS = Path(__file__).parents[1] / "scripts"


def command(arguments: Sequence[str] | None = None) -> NoReturn:
    """The command as a process of its own: ends it, with the status that `main` returns."""
    os.environ["MPLBACKEND"] = "agg"  # pictures are files, and a notebook's backend may not be installed here
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal has no character for stops no figure
            stream.reconfigure(errors="backslashreplace")
    status = main(arguments)
    if status:  # XLA may still be compiling or computing, and Python cannot be taken down around it
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 for an error, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if [word for word in arguments[:2] if word != "--debug"][:1] == ["bench"]:
        return _bench(arguments[arguments.index("bench") + 1 :])
    options = parse(arguments)
    if options.version:
        options.command = "version"
    if options.command is None:
        parser().print_help()
        return 2
    options.arguments = arguments
    options.command_line = shlex.join(["jaxqkv", *arguments])
    with warnings.catch_warnings(), np.errstate():
        warnings.simplefilter("always", jaxqkv.errors.JaxqkvWarning)
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a folder of its own that it cannot write, say
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
        with interrupts.heard(), console.quiet(options.quiet or options.json):
            if getattr(options, "precision", None):
                jaxqkv.devices.set_precision(options.precision)
            return _action(options.command)(options) or 0
    except KeyboardInterrupt as stop:
        print("; ".join(["jaxqkv: interrupted", *map(str, stop.args)]), file=sys.stderr)
        _leave_job(options, 130)
        return 130
    except Exception as error:
        if options.debug:
            _leave_job(options, 1, error)
            raise
        message = str(error)
        if not isinstance(error, jaxqkv.errors.JaxqkvError):
            what = jaxqkv.errors.printable(jaxqkv.errors.first_line(error))
            message = jaxqkv.devices.missing_platform() or f"{type(error).__name__}: {what} (--debug shows where)"
        print(f"jaxqkv: error: {message}", file=sys.stderr, flush=True)
        _leave_job(options, 2)
        return 2


def _action(command: str) -> Callable[[argparse.Namespace], int | None]:
    """What does a command's work and gives its exit status; None for 0."""
    return {
        "figures": _figures,
        "list": _list,
        "info": _info,
        "view": _view,
        "verify": _verify,
        "version": _version,
    }[command]


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


def _version(options: argparse.Namespace) -> None:
    _show(options, _versions(), lambda: "\n".join(f"{name} {version}" for name, version in _versions().items()))


def _list(options: argparse.Namespace) -> None:
    from jaxqkv.figures.panels import Table

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
    from jaxqkv.text.reading import read_text

    text = options.text if options.text_file is None else read_text(options.text_file)
    prepare_file(options.out)
    devices.enable_compilation_cache()
    model = jaxqkv.load(
        options.spec, revision=options.revision, seed=options.seed, stream=True, tokenizer=options.tokenizer
    )
    drawn = write_view(options.out, model, text, options.layers, options.command_line)
    size = options.out.stat().st_size
    document = {"drawn": drawn, "checkpoint": model.checkpoint.identity(), "page": str(options.out), "bytes": size}
    _show(options, document, lambda: f"{drawn}; {showing.megabytes(size)} MB, see {options.out}")


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
    from jaxqkv.figures import gallery

    chosen = study(options.study)
    specs = chosen.select(options.ids)
    single = [text for text in options.text or () if len(text.split()) == 1]
    if len(single) > 1:
        console.note(f"--text: {len(options.text)} texts, one of each word; quote a text of several words")
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
    folder = options.out / chosen.name
    record = manifest.Record(folder, chosen.name)
    try:
        gallery.prepare_folder(options.out, chosen.name)
        _draw(options, chosen, specs, record)
    except KeyboardInterrupt as stop:
        done = "no figure was finished" + (f", and {folder} is as it was" if not stop.args else "")
        if record.finished:
            done = f"{len(record.finished)} of {len(specs)} figures finished in {folder}: {', '.join(record.finished)}"
        raise KeyboardInterrupt(done, *stop.args) from None


def _draw(options: argparse.Namespace, chosen: Study, specs: Sequence[FigureSpec], record: manifest.Record) -> None:
    from jaxqkv import distributed
    from jaxqkv.figures import gallery

    start = time.monotonic()
    run = chosen.run(options)
    record.about = {"seed": options.seed} | _about_run(options) | run.describe()
    names = [jaxqkv.errors.escaped(checkpoint["checkpoint"]) for checkpoint in record.about["checkpoint"]]
    _say(f"{chosen.name}: {', '.join(names)}")
    try:
        run.prepare(chosen.needs(specs))
        if distributed.index() > 0:  # the first process has everything, and writes it
            return
        record.about |= run.describe()
        for note in record.about.get("notes", ()):
            _say(note)
        record.computing = time.monotonic() - start
        left_out = _draw_each(options, specs, record, run)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*chosen.goes_on(run)) from None
    if len(specs) == 1 and left_out:
        raise jaxqkv.errors.JaxqkvError(f"{specs[0].id} is not drawn: {left_out[specs[0].id]}")
    if not record.finished:
        raise jaxqkv.errors.JaxqkvError(f"no figure of {chosen.name} can be drawn of this")
    chosen.finish(run)
    figures = {
        id: entry | {"files": [str(record.folder / name) for name in entry["files"]]}
        for id, entry in record.finished.items()
    }
    page = options.out / gallery.PAGE
    document = {"study": chosen.name, **record.about, "seconds": record.seconds, "figures": figures}
    document |= {"not drawn": left_out, "manifest": str(record.folder / manifest.NAME), "page": str(page)}
    drawn = f"{len(figures)} figure{'s' * (len(figures) != 1)} in {record.folder}"
    times = "computing {computing:.1f} s, drawing {drawing:.1f} s".format(**record.seconds)
    _show(options, document, lambda: f"{drawn}; {times}; see {page}")
    if missed := [id for id in left_out if id in options.ids]:
        raise jaxqkv.errors.JaxqkvError(f"of the figures asked for, {', '.join(missed)} cannot be drawn of this")


def _draw_each(
    options: argparse.Namespace, specs: Sequence[FigureSpec], record: manifest.Record, run: Run
) -> dict[str, str]:
    """Draws and writes figure after figure; those that cannot be drawn, with the reasons."""
    from jaxqkv.figures import gallery
    from jaxqkv.files import locked

    formats = [] if options.arrays_only else [FORMATS[0], *(kind for kind in FORMATS[1:] if kind in options.format)]
    left_out: dict[str, str] = {}
    try:
        for spec in console.bar(specs, desc="figures", unit="figure"):
            begin = time.monotonic()
            try:
                display = spec.make(run)
            except jaxqkv.errors.NotDrawable as error:
                left_out[spec.id] = str(error)
                if len(specs) > 1:
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
                gallery.write_gallery(options.out)
    return left_out


def _show(options: argparse.Namespace, document: Any, text: Callable[[], str]) -> None:
    """The result of a command: a text for people, with --json a document for programs, with --quiet nothing."""
    if options.json:
        _print(console.as_json(document))
    elif not options.quiet:
        _say(text())


def _say(text: str) -> None:
    """Prints what may come from a checkpoint, unless told to be quiet."""
    if not console.is_quiet():
        _print("\n".join(map(jaxqkv.errors.escaped, text.split("\n"))))


def _print(text: str) -> None:
    """A reader who has gone away (`| head`) does not stop the figures."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (to the end of the process)


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
    command()
