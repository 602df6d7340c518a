"""The user's cache folder, and arrays that are kept in it."""

import os
import sys
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxqkv.runtime.files import replacing


def cache_folder() -> Path:
    """The user's cache folder for this package; `JAXQKV_CACHE` or `XDG_CACHE_HOME` move it."""
    if own := os.environ.get("JAXQKV_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxqkv"


def recall(path: Path) -> dict[str, Shaped[np.ndarray, "..."]] | None:
    """Returns the arrays that `keep` has written there; None if there are none, or not whole ones."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return None


def keep(path: Path, what: str, arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> None:
    """Writes arrays, whole or not at all; a cache that cannot be written is said, and left alone.

    Args:
      path: of the file.
      what: what the arrays are, in the plural, for that message.
      arrays: by name.
    """
    by_name: dict[str, Any] = dict(arrays)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez_compressed(file, **by_name)
    except OSError as error:
        print(f"jaxqkv: the {what} are not kept: {path.parent}: {error.strerror}", file=sys.stderr)
