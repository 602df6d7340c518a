"""What the commands print: texts for people, one JSON document for programs; and what a manifest says of a run."""

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
    """Prints the result of a command: `text()`, with --json the document, with --quiet nothing."""
    if getattr(given, "json", False):
        _print(console.as_json(document))
    elif words := text():
        say(words)


def say(text: str) -> None:
    """Prints a text that may come from a checkpoint, unless the command is to be quiet."""
    if not console.is_quiet():
        _print("\n".join(map(errors.escaped, text.split("\n"))))


def _print(text: str) -> None:
    """Prints; a reader who has gone away (`| head`) does not stop the command."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (to the end of the process)


def note_words(texts: Sequence[str]) -> None:
    """Notes that several texts of one word each may have been meant as one."""
    if len([text for text in texts if len(text.split()) == 1]) > 1:
        console.note(f"--text: {len(texts)} texts, one of each word; quote a text of several words")


def versions() -> dict[str, str]:
    """Returns the versions of the package and of what it computes with."""
    from importlib.metadata import version

    return {"jaxqkv": jaxqkv.__version__} | {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")}


def about_run(options: Any, line: Line) -> dict[str, Any]:
    """Returns how a run computes, for its manifest: command, dtype, precision, device and versions."""
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
