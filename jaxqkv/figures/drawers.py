"""Processes that draw pictures on all cores while the next figure is computed."""

import contextlib
import dataclasses
import gc
import os
import pickle
import platform
import signal
import socket
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np

from jaxqkv.errors import JaxqkvError
from jaxqkv.figures.displays import Display
from jaxqkv.figures.drawing import pictures
from jaxqkv.figures.panels import Image, Line, Lines

Item = TypeVar("Item")

# Least number of figures for each process; starting one takes as long as drawing one or two figures.
FIGURES_EACH = 3
# Most displays that wait for each process, so that few are in memory.
WAITING = 2
# Program of a process, with this one's module paths and without JAX.
PROGRAM = """
import pickle, sys
sys.path, ends = pickle.load(sys.stdin.buffer)
from jaxqkv.figures.drawers import serve
serve(ends)
"""
# Whether one process forks the others; elsewhere libraries may not survive it, or there is no `fork`.
FORKS = platform.system() == "Linux"
# Without threads of NumPy's own, which a fork would lack.
NO_THREADS = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Job(NamedTuple):
    """Arguments of `drawing.pictures`."""

    display: Display
    formats: Sequence[str]
    theme: str
    dpi: int


class Channel(NamedTuple):
    """A stream of jobs to a process, and one of its answers."""

    jobs: IO[bytes]
    answers: IO[bytes]


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
        self._channels: list[Channel] = []
        self._idle: deque[Channel] = deque()
        self._threads = ThreadPoolExecutor(max(1, self._count), thread_name_prefix="drawers")

    def begin(self) -> None:
        """Starts the processes once; they load matplotlib while the command goes on."""
        if self._count > 1 and not self._processes:
            self._processes, self._channels = _start(self._count)
            self._idle.extend(self._channels)

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
            if display is not None and formats and self._channels:
                started = self._threads.submit(self._ask, Job(display, formats, theme, dpi))
            waiting.append((item, display, started))
            while waiting and (len(waiting) > WAITING * len(self._channels) or _is_ready(waiting[0][2])):
                yield finished()
        while waiting:
            yield finished()
        if failure is not None:
            raise failure

    def _ask(self, job: Job) -> Answer:
        """Sends a job to an idle process; runs in as many threads as there are processes."""
        channel = self._idle.popleft()
        try:
            # Not the arrays: the panels have what they draw.
            pickle.dump(job._replace(display=dataclasses.replace(job.display, arrays={})), channel.jobs)
            channel.jobs.flush()
            answer: Answer = pickle.load(channel.answers)
        except (OSError, EOFError) as error:
            raise JaxqkvError(
                "a drawing process was ended from outside, perhaps for lack of memory; try a lower --dpi"
            ) from error
        self._idle.append(channel)
        return answer

    def __enter__(self) -> "Drawers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            _kill(process)
        self._threads.shutdown(cancel_futures=True)
        for channel in self._channels:
            for end in channel:
                with contextlib.suppress(OSError):  # a job that was never read is in its buffer
                    end.close()


def _start(count: int) -> tuple[list["subprocess.Popen[bytes]"], list[Channel]]:
    """Starts processes, which load matplotlib at once; returns none if no process can be started."""
    if FORKS:
        return _start_forking(count)
    # Ctrl-C is sent to the command only, which then ends the processes.
    apart: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    processes: list[subprocess.Popen[bytes]] = []
    channels: list[Channel] = []
    with contextlib.suppress(OSError):
        for _ in range(count):
            processes.append(process := _python([], stdout=subprocess.PIPE, **apart))
            assert process.stdin is not None
            assert process.stdout is not None
            channels.append(Channel(process.stdin, process.stdout))
    return processes, channels


def _start_forking(count: int) -> tuple[list["subprocess.Popen[bytes]"], list[Channel]]:
    """Starts one process, which forks the others when it has loaded matplotlib: once, not once each."""
    ours, theirs = zip(*(socket.socketpair() for _ in range(count)), strict=True)
    try:
        ends = [each.fileno() for each in theirs]
        process = _python(ends, stdout=subprocess.DEVNULL, pass_fds=ends, start_new_session=True)
        assert process.stdin is not None
        process.stdin.close()
        channels = [Channel(each.makefile("wb"), each.makefile("rb")) for each in ours]
    except OSError:
        return [], []
    finally:
        for each in (*ours, *theirs):
            each.close()  # ours stays open as long as its channel
    return [process], channels


def _python(ends: list[int], **options: Any) -> "subprocess.Popen[bytes]":
    """Starts a process that serves these sockets, or its standard input if there are none."""
    command, environment = [sys.executable, "-c", PROGRAM], os.environ | NO_THREADS
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, **options)
    assert process.stdin is not None
    pickle.dump((sys.path, ends), process.stdin)
    process.stdin.flush()
    return process


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """Ends a process and those that it has forked."""
    if FORKS:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


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


def serve(ends: list[int]) -> None:
    """Draws jobs until there are no more.

    Args:
      ends: file descriptors of sockets to read from, each in a process of its own; standard input if there are none.
    """
    channel = Channel(sys.stdin.buffer, os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # keeps a library's prints out of the answers
    _draw_once()
    gc.freeze()
    if ends:
        end = socket.socket(fileno=_end_of_this_process(ends))
        channel = Channel(end.makefile("rb"), end.makefile("wb"))
    while (job := _received(channel.jobs)) is not None:
        answer = _answer(job)
        try:
            pickle.dump(answer, channel.answers)
            channel.answers.flush()
        except BrokenPipeError:  # the command was killed, and no one is told
            os._exit(1)


def _draw_once() -> None:
    """Draws a figure of what most figures have, so that matplotlib is loaded and its caches are filled."""
    line = Line(x=np.arange(2.0), y=np.arange(2.0), label="$x$")
    panels = [[Lines(lines=[line], title="a"), Image(values=np.eye(2), colorbar="a", tag="a")]]
    pictures(Display(arrays={}, panels=panels, caption="", size=(4, 2)), ("png",), "light", 50)


def _end_of_this_process(ends: list[int]) -> int:
    """Forks a process for each of the ends but one; returns in each the one that it serves."""
    while len(ends) > 1:
        own = ends.pop()
        if os.fork() == 0:
            for other in ends:
                os.close(other)
            return own
        os.close(own)
    return ends[0]


def _received(jobs: IO[bytes]) -> Job | None:
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
