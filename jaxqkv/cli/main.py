"""The `jaxqkv` command. Heavy imports wait until the arguments are checked."""

import argparse
import contextlib
import functools
import importlib
import io
import logging
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn

from jaxqkv import errors
from jaxqkv.cli.parser import Line, Output, Parser, made
from jaxqkv.runtime import console, interrupts
from jaxqkv.studies import registry

# Name of a command → its help. Each is a module in this folder with `parse` and `run`.
COMMANDS = {
    "figures": "draw the figures of a study",
    "list": "list all figures",
    "view": "make one interactive page of a text's attention in every head",
    "info": "describe a checkpoint",
    "verify": "compare every intermediate with PyTorch's",
    "bench": "compare its speed with PyTorch's",
    "version": "print the versions of jaxqkv and of its dependencies",
}


def command(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command as a process of its own, and ends it with the status that `main` returns."""
    os.environ["MPLBACKEND"] = "agg"  # pictures are files, and a notebook's backend may not be installed here
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that the terminal lacks are escaped
            stream.reconfigure(errors="backslashreplace")
    status = main(arguments)
    if status:  # XLA may still be compiling or computing, and Python cannot shut down around it
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 for an error, 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    top = _parser()
    first = next((index for index, word in enumerate(words) if not word.startswith("-")), len(words))
    options = top.parse_args(words[:first])
    if options.version:
        words, first = [*words[:first], "version"], first
    if first == len(words):
        top.print_help()
        return 2
    name, before, after = words[first], words[:first], words[first + 1 :]
    if name in registry.names():
        top.exit(2, f"jaxqkv: error: {name} is a study; jaxqkv figures {shlex.join([name, *after])} draws it\n")
    if name not in COMMANDS:
        top.error(f"no command {name}; {errors.nearest(name, COMMANDS)}")
    module = importlib.import_module(f"jaxqkv.cli.{name}")
    given = module.parse(after)
    given.debug = options.debug or getattr(given, "debug", False)
    with warnings.catch_warnings():
        warnings.simplefilter("always", errors.JaxqkvWarning)
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # hides warnings
        warnings.showwarning = functools.partial(_show_warning, warnings.showwarning, set())
        return _run(module, given, Line(tuple(before), name, tuple(after)))


def _parser() -> Parser:
    commands = "\n".join(f"  {name:10}{help}" for name, help in COMMANDS.items())
    top = Parser(
        prog="jaxqkv",
        usage="jaxqkv COMMAND [options]",
        description=f"Look inside the attention of GPT-2 and BERT.\n\ncommands:\n{commands}",
        epilog="`jaxqkv COMMAND --help` shows a command's options.\n\nexample:\n  jaxqkv figures qkv-weights --demo",
    )
    top.add_argument("--version", action="store_true", help=COMMANDS["version"])
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def _show_warning(
    others: Callable[..., None], shown: set[str], message: Warning | str, category: type, *where: Any
) -> None:
    """Prints a warning of this package in one line, once; `others` shows those of other packages."""
    if not issubclass(category, errors.JaxqkvWarning):
        others(message, category, *where)
    elif str(message) not in shown:
        shown.add(str(message))
        print(f"jaxqkv: warning: {message}", file=sys.stderr)
        import numpy as np

        np.seterr(all="ignore")  # NumPy's own warnings would follow from these weights, without naming them


def _run(module: ModuleType, given: argparse.Namespace, line: Line) -> int:
    try:
        output = made(Output, given)
        with interrupts.heard(), console.quiet(output.quiet or output.json):
            return _computed(module, given, line)
    except KeyboardInterrupt as stop:
        print("; ".join(["jaxqkv: interrupted", *map(str, stop.args)]), file=sys.stderr)
        _leave_job(given, 130)
        return 130
    except Exception as error:
        if given.debug:
            _leave_job(given, 1, error)
            raise
        message = str(error)
        if not isinstance(error, errors.JaxqkvError):
            from jaxqkv.runtime.devices import missing_platform

            what = errors.printable(errors.first_line(error))
            message = missing_platform() or f"{type(error).__name__}: {what} (--debug shows where)"
        print(f"jaxqkv: error: {message}", file=sys.stderr, flush=True)
        _leave_job(given, 2)
        return 2


def _computed(module: ModuleType, given: argparse.Namespace, line: Line) -> int:
    import numpy as np

    with np.errstate():
        if getattr(given, "precision", None):
            from jaxqkv.runtime import devices

            devices.set_precision(given.precision)
        return module.run(given, line) or 0


def _leave_job(given: argparse.Namespace, status: int, shown: Exception | None = None) -> None:
    """Ends one of several processes at once when it has failed, printing the traceback of `shown`."""
    if getattr(given, "distributed", False):
        from jaxqkv.runtime import distributed

        if shown is not None:
            traceback.print_exception(shown)
        distributed.leave(status)
