"""Processes that draw pictures on all cores while the next figure is computed."""

import contextlib
import dataclasses
import gc
import os
import pickle
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, TypeVar

from jaxqkv.errors import JaxqkvError
from jaxqkv.figures.displays import Display
from jaxqkv.figures.drawing import load_matplotlib, pictures

Item = TypeVar("Item")

# Least number of figures for each process; starting one takes as long as drawing one or two figures.
FIGURES_EACH = 3
# Most displays that wait for each process, so that few are in memory.
WAITING = 2
# Program of a process, with this one's module paths and without JAX.
PROGRAM = """
import pickle, sys
sys.path = pickle.load(sys.stdin.buffer)
from jaxqkv.figures.drawers import serve
serve()
"""


class Job(NamedTuple):
    """Arguments of `drawing.pictures`."""

    display: Display
    formats: Sequence[str]
    theme: str
    dpi: int


class Answer(NamedTuple):
    """The result of a job: pictures or an error, and the warnings."""

    pictures: list[bytes]
    warned: list[tuple[str, type[Warning]]]
    error: Exception | None


class Drawers:
    """Draws in as many processes as there are cores, or in this one if that is quicker.

    A context manager: the processes end with the block, or by themselves if this process is killed.

    Args:
      figures: number of figures to draw.
    """

    def __init__(self, figures: int) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._count = min(cores, figures // FIGURES_EACH)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: deque[subprocess.Popen[bytes]] = deque()
        self._threads = ThreadPoolExecutor(max(1, self._count), thread_name_prefix="drawers")

    def begin(self) -> None:
        """Starts the processes, which load matplotlib meanwhile; once, and not for a command that is refused."""
        if self._count > 1 and not self._processes:
            self._processes = _start(self._count)
            self._idle.extend(self._processes)

    def drawn(
        self, items: Iterable[tuple[Item, Display | None]], formats: Sequence[str], theme: str, dpi: int
    ) -> Iterator[tuple[Item, Display | None, list[bytes]]]:
        """Yields items and displays with their pictures, in order, while the next displays are made and drawn.

        If making a display fails, those before it are yielded first.

        Args:
          items: pairs of any object and the display to draw, or None.
          formats: formats of the pictures.
          theme: theme of the pictures.
          dpi: resolution of the pictures.
        """
        waiting: deque[tuple[Item, Display | None, Future[Answer] | None]] = deque()
        coming, failure = iter(items), None

        def finished() -> tuple[Item, Display | None, list[bytes]]:
            item, display, started = waiting.popleft()
            if display is None or not formats:
                return item, display, []
            made = pictures(display, formats, theme, dpi) if started is None else _pictures_of(started.result())
            return item, display, made

        while failure is None:
            try:
                item, display = next(coming)
            except StopIteration:
                break
            except Exception as error:
                failure = error
                break
            started = None
            if display is not None and formats and self._processes:
                started = self._threads.submit(self._ask, Job(display, formats, theme, dpi))
            waiting.append((item, display, started))
            while waiting and (len(waiting) > WAITING * len(self._processes) or _is_ready(waiting[0][2])):
                yield finished()
        while waiting:
            yield finished()
        if failure is not None:
            raise failure

    def _ask(self, job: Job) -> Answer:
        """Sends a job to an idle process; runs in as many threads as there are processes."""
        process = self._idle.popleft()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            # Not the arrays: the panels have what they draw.
            pickle.dump(job._replace(display=dataclasses.replace(job.display, arrays={})), process.stdin)
            process.stdin.flush()
            answer: Answer = pickle.load(process.stdout)
        except (OSError, EOFError) as error:
            raise JaxqkvError(
                "a drawing process was ended from outside, perhaps for lack of memory; try a lower --dpi"
            ) from error
        self._idle.append(process)
        return answer

    def __enter__(self) -> "Drawers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.communicate()


def _start(count: int) -> list["subprocess.Popen[bytes]"]:
    """Starts processes, which load matplotlib at once; returns none if no process can be started."""
    # Ctrl-C is sent to the command only, which then ends the processes.
    apart: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.suppress(OSError):
        for _ in range(count):
            command = [sys.executable, "-c", PROGRAM]
            processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **apart))
    for process in processes:
        assert process.stdin is not None
        pickle.dump(sys.path, process.stdin)
        process.stdin.flush()
    return processes


def _is_ready(started: "Future[Answer] | None") -> bool:
    return started is None or started.done()


def _pictures_of(answer: Answer) -> list[bytes]:
    """Returns the pictures; warns and raises as drawing them here would."""
    for text, category in answer.warned:
        warnings.warn(text, category, stacklevel=2)
    if answer.error is not None:
        raise answer.error
    return answer.pictures


# --- in the processes ---


def serve() -> None:
    """Draws jobs from standard input until it ends."""
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keeps a library's prints out of the answers
    load_matplotlib()
    gc.freeze()
    while (job := _received(sys.stdin.buffer)) is not None:
        pickle.dump(_answer(job), results)
        results.flush()


def _received(jobs: BinaryIO) -> Job | None:
    try:
        job: Job = pickle.load(jobs)
    except EOFError:
        return None
    return job


def _answer(job: Job) -> Answer:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            made, error = pictures(*job), None
        except Exception as raised:
            made, error = [], raised
    return Answer(made, [(str(each.message), each.category) for each in caught], error)
