"""Ctrl-C, and being told to end: held back where something has to be done altogether, and never lost."""

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

# Seconds until a lost Ctrl-C is tried again.
AGAIN = 0.05


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """An interruption waits for the end of the block: what is done there in a moment is done altogether."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier: dict[int, Callable[..., Any]] = {}
    for each in (signal.SIGINT, signal.SIGTERM):
        if callable(handler := signal.getsignal(each)):
            earlier[each] = handler
    caught: list[tuple[Any, ...]] = []
    for number in earlier:
        signal.signal(number, lambda *arguments: caught.append(arguments))
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
    if caught:
        earlier[caught[0][0]](*caught[0])


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """In the block every interruption is a `KeyboardInterrupt`.

    So is SIGTERM, by which `timeout` and a cluster's scheduler end what takes too long. And Ctrl-C in a destructor
    or in a callback of the garbage collector, of which JAX has one: Python can only print what is raised there, and
    goes on; here Ctrl-C comes again a moment later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    others = sys.unraisablehook
    pending: list[threading.Timer] = []

    def unraisable(lost: Any) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            others(lost)
            return
        pending.append(threading.Timer(AGAIN, _press, [threading.main_thread().ident]))
        pending[-1].daemon = True
        pending[-1].start()

    sys.unraisablehook = unraisable
    ends = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ends:
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        if ends:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.unraisablehook = others
        for timer in pending:
            timer.cancel()


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


def _press(thread: int) -> None:
    """Ctrl-C for the main `thread`, also where it waits for the system."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(thread, signal.SIGINT)
    else:  # Windows
        _thread.interrupt_main()
