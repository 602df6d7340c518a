"""What the command says besides its results, and the bars over long work; `--quiet` stills both."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

# Libraries that draw bars of their own read these when they are imported.
_BARS_OF_OTHERS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")

_quiet = False


@contextlib.contextmanager
def quiet(wanted: bool = True) -> Iterator[None]:
    """Inside the block nothing is said but errors and warnings, and no bar is drawn, if that is `wanted`."""
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
    """Whether all but errors and warnings is to be left unsaid."""
    return _quiet


def note(text: str) -> None:
    """Says on stderr what is good to know, and is no warning."""
    if not _quiet:
        print(f"jaxqkv: {text}", file=sys.stderr)


def bar(items: Iterable[Any] | None = None, **options: Any) -> "tqdm":
    """A bar with an estimate of the time left: on terminals alone, and when the work takes longer than a second."""
    from tqdm import tqdm

    return tqdm(items, delay=1, disable=True if _quiet else None, **options)


@contextlib.contextmanager
def counting_bar(**options: Any) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar for a `with` block, and gives a function of how much is done and of how much there is in all."""
    with bar(**options) as drawn:

        def show(done: int, total: int) -> None:
            drawn.total = total
            drawn.update(done - drawn.n)

        yield show


def as_json(document: Any) -> str:
    """JSON as every reader takes it: null where a number is not finite."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(document), indent=2)
