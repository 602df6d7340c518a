"""Files that appear whole or not at all, and folders that can be written."""

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxqkv.errors import JaxqkvError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A binary file that takes `path`'s place when the block ends well, and vanishes when it does not."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with part.open("xb") as file:
            yield file
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def make_writable(folder: Path) -> None:
    """Makes a folder and proves that files can be made in it.

    Raises:
      OSError: when either fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def prepare_file(path: Path) -> None:
    """Refuses a place for a file that cannot be written, before anything is computed."""
    try:
        make_writable(path.parent)
    except OSError as error:
        raise JaxqkvError(f"{path}: cannot be written ({error.strerror}); choose another place with --out") from None
    if path.is_dir():
        raise JaxqkvError(f"{path}: is a folder; --out names a file")
