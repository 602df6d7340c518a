"""Ctrl-C: held back where something has to be done altogether, and not lost where Python cannot raise it."""

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

# Seconds until a lost Ctrl-C is tried again.
AGAIN = 0.05


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: what is done there in a moment is done altogether."""
    earlier = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(earlier):
        yield
        return
    caught: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *arguments: caught.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)
    if caught:
        earlier(*caught[0])


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Ctrl-C in a destructor or in a callback of the garbage collector, of which JAX has one, counts as well.

    Python can only print what is raised there, and goes on. In the block, Ctrl-C comes again a moment later.
    """
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
    try:
        yield
    finally:
        sys.unraisablehook = others
        for timer in pending:
            timer.cancel()


def _press(thread: int) -> None:
    """Ctrl-C for the main `thread`, also where it waits for the system."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(thread, signal.SIGINT)
    else:  # Windows
        _thread.interrupt_main()
