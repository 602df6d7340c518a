"""The user's cache folder."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """The user's cache folder for this package; `JAXQKV_CACHE` or `XDG_CACHE_HOME` move it."""
    if own := os.environ.get("JAXQKV_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxqkv"
