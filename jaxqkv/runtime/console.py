"""Notes and progress bars of the command, which `--quiet` switches off."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

# Variables that switch off other libraries' progress bars, read when they are imported.
_BARS_OF_OTHERS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")

_quiet = False


@contextlib.contextmanager
def quiet(wanted: bool = True) -> Iterator[None]:
    """Silences everything but errors and warnings in the block, progress bars too, if `wanted`."""
    global _quiet
    if not wanted:
        yield
        return
    before = _quiet, {name: os.environ.get(name) for name in _BARS_OF_OTHERS}
    _quiet = True
    os.environ.update(dict.fromkeys(_BARS_OF_OTHERS, "1"))
    try:
        yield
    finally:
        _quiet, values = before
        for name, value in values.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def is_quiet() -> bool:
    """Tells whether only errors and warnings are printed."""
    return _quiet


def note(text: str) -> None:
    """Prints a note on stderr that is less than a warning."""
    if not _quiet:
        print(f"jaxqkv: {text}", file=sys.stderr)


def bar(items: Iterable[Any] | None = None, **options: Any) -> "tqdm":
    """Returns a progress bar; it is drawn on terminals only, when the work takes longer than a second."""
    from tqdm import tqdm

    return tqdm(items, delay=1, disable=True if _quiet else None, **options)


@contextlib.contextmanager
def counting_bar(**options: Any) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar for a `with` block, and gives a function `show(done, total)` that updates it."""
    with bar(**options) as drawn:

        def show(done: int, total: int) -> None:
            drawn.total = total
            drawn.update(done - drawn.n)

        yield show


def as_json(document: Any) -> str:
    """Returns strict JSON: null where a number is not finite."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(document), indent=2)
