"""Output of the commands: text for people, one JSON document for programs, and the entries of a manifest."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jaxqkv
from jaxqkv import errors
from jaxqkv.cli.parser import Line
from jaxqkv.runtime import console


def show(given: argparse.Namespace, document: Any, text: Callable[[], str]) -> None:
    """Prints the result of a command: `text()`, or with --json the document, or with --quiet nothing."""
    if getattr(given, "json", False):
        _print(console.as_json(document))
    elif words := text():
        say(words)


def say(text: str) -> None:
    """Prints a text, which may come from a checkpoint, unless --quiet is given."""
    if not console.is_quiet():
        _print("\n".join(map(errors.escaped, text.split("\n"))))


def _print(text: str) -> None:
    """Prints a text; a closed pipe (`| head`) does not stop the command."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (to the end of the process)


def note_words(texts: Sequence[str]) -> None:
    """Prints a note if several texts are single words, which may have been meant as one text."""
    if len([text for text in texts if len(text.split()) == 1]) > 1:
        console.note(f"--text: {len(texts)} texts, one of each word; quote a text of several words")


def versions() -> dict[str, str]:
    """Returns the versions of the package and of the libraries that compute."""
    from importlib.metadata import version

    return {"jaxqkv": jaxqkv.__version__} | {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")}


def about_run(options: Any, line: Line) -> dict[str, Any]:
    """Returns a run's entries in the manifest: command, dtype, precision, device and versions."""
    import jax

    from jaxqkv.runtime import devices

    device = jax.devices()[0]
    return {
        "command": str(line),
        "dtype": getattr(options, "dtype", "float32"),
        "precision": devices.precision(),
        "device": f"{device.platform}: {device.device_kind}",
        "versions": versions(),
    }
