"""Ctrl-C and SIGTERM: delayed while something has to be done completely, and never lost."""

import _thread
import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

# Seconds until an interruption that was not handled is repeated.
AGAIN = 0.1


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Delays interruptions to the end of the block, so that it is done completely; for short blocks."""
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
    """Turns every interruption in the block into a `KeyboardInterrupt`, repeated until one is handled.

    SIGTERM, which `timeout` and a cluster's scheduler send, counts too. Interruptions are repeated because an exception
    may be lost: Python only prints exceptions in destructors and in callbacks of the garbage collector, of which JAX
    has one, and compiled code that calls Python, as JAX's caches do, may take them for failures of its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    main, over = threading.get_ident(), threading.Event()
    asked: signal.Signals | None = None
    insisting = False

    def interrupt(number: int, frame: Any) -> None:
        nonlocal asked, insisting
        asked = signal.Signals(number)
        again, insisting = insisting, False
        if not (over.is_set() or (again and _is_handled(sys.exc_info()[1]))):
            raise KeyboardInterrupt

    def insist() -> None:
        nonlocal insisting
        while not over.wait(AGAIN):
            if asked:
                insisting = True
                _send(asked, main)

    def unraisable(lost: Any) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            others(lost)

    others, earlier = sys.unraisablehook, {}
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
            earlier[number] = signal.signal(number, interrupt)
    sys.unraisablehook = unraisable
    watcher = threading.Thread(target=insist, name="interruptions", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        for number, handler in earlier.items():
            signal.signal(number, handler)
        sys.unraisablehook = others


def _is_handled(error: BaseException | None) -> bool:
    """Tells whether the exception being handled is an interruption, or was raised while handling one."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _send(number: signal.Signals, thread: int) -> None:
    """Sends the signal to a thread, even while it waits in a system call."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(thread, number)
    else:  # Windows
        _thread.interrupt_main(number)
