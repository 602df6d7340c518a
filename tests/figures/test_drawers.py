"""Pictures that processes draw are those that this process draws, in order, and none is lost."""

import contextlib
import dataclasses
import gc
import io
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from jaxqkv.errors import JaxqkvError, JaxqkvWarning
from jaxqkv.figures import drawers
from jaxqkv.figures.displays import Display
from jaxqkv.figures.drawing import drawn, pictures, rendered
from jaxqkv.figures.panels import Image, Line, Lines
from jaxqkv.figures.tables import Table

LOOK = {"formats": ("png", "svg"), "theme": "dark", "dpi": 40}


def a_display(number, **more):
    """One of a single small panel, or with all kinds of text if the number is 0."""
    values = np.arange(6.0).reshape(2, 3) - number
    table = Table(heading=("a",), rows=[(f"b{number}",)])
    panels, about = [[table]], {"size": (2, 1)}
    if number == 0:
        line = Line(x=values[0], y=values[1], label="a")
        lines = Lines(lines=[line], xlabel=r"$\frac{x}{2}$", integer_x=True)
        panels = [[Image(values=values, colorbar="unit", xlabel="x"), lines, table]]
        about = {"size": (7, 3), "title": "T"}
    return Display(arrays={"x": values}, panels=panels, caption="", **about | more)


def test_a_png_is_the_one_that_matplotlib_saves():
    """Which draws twice, and lays the figure out only the first time; what it draws on stays as it was."""
    from matplotlib.image import imread

    figure = drawn(a_display(0), "light", 50)
    canvas = figure.canvas
    ours = imread(io.BytesIO(rendered(figure, "png", "light")))
    assert figure.canvas is canvas
    assert gc.isenabled()
    figure = drawn(a_display(0), "light", 50)
    figure.savefig(file := io.BytesIO(), format="png", dpi=50, facecolor="white")
    file.seek(0)
    theirs = imread(file)
    assert (theirs[..., 3] == 1).all()
    np.testing.assert_array_equal(ours, theirs[..., :3])


def test_a_transparent_picture_stays_so():
    from matplotlib.image import imread

    figure = drawn(a_display(1), "light", 50)
    figure.patch.set_alpha(0)
    picture = imread(io.BytesIO(rendered(figure, "png", "light")))
    assert picture[0, 0].tolist() == [1, 1, 1, 0]


def three(fails=None):
    for number in range(1, 4):
        if number == fails:
            raise JaxqkvError("cannot be made")
        yield number, None if number == 2 else a_display(number)


def test_few_figures_are_drawn_here():
    with drawers.Drawers(2) as processes:
        processes.begin()
        found = list(processes.drawn(three(), **LOOK))
        assert not processes._processes
    assert [(item, display is None) for item, display, _ in found] == [(1, False), (2, True), (3, False)]
    expected = [pictures(a_display(number), *LOOK.values()) if number != 2 else [] for number in range(1, 4)]
    assert [made for *_, made in found] == expected


def all_until_it_fails(processes):
    """Items that come before the failure of the third."""
    found = []
    with contextlib.suppress(JaxqkvError):
        for item, _, made in processes.drawn(three(fails=3), **LOOK):
            found.append((item, len(made)))
        pytest.fail("no error")
    return found


def test_what_comes_before_a_failure_is_drawn():
    with drawers.Drawers(2) as processes:
        assert all_until_it_fails(processes) == [(1, 2), (2, 0)]


class Evaluated:
    """An expression that is evaluated in the process that gets it."""

    def __init__(self, expression):
        self.expression = expression

    def __reduce__(self):
        return eval, (self.expression,)


def is_running(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"  # ended, and not waited for yet


@pytest.fixture
def as_many_as_figures(monkeypatch):
    """Two processes from two figures on, whatever the machine."""
    monkeypatch.setattr(drawers, "FIGURES_EACH", 1)
    monkeypatch.setattr(drawers.os, "sched_getaffinity", lambda process: {0, 1}, raising=False)


@pytest.mark.slow
@pytest.mark.usefixtures("as_many_as_figures")
class TestProcesses:
    def test_what_they_draw_and_say(self):
        """The same bytes in the same order, warnings and errors; all by the same two processes, which have no JAX."""
        numbers = range(5)
        # No process imports JAX, so that none takes a GPU's memory.
        told = a_display(9, title=Evaluated("str('jax' in __import__('sys').modules)"))
        # A character of no font.
        unknown = Display(arrays={}, panels=[[Table(heading=("\U000e0100",), rows=[("b",)])]], caption="", size=(2, 1))
        with drawers.Drawers(7) as processes:
            processes.begin()
            assert len(processes._channels) == 2
            found = list(processes.drawn(((number, a_display(number)) for number in numbers), **LOOK))
            again = list(processes.drawn([(8, None), (9, told)], **LOOK))
            assert all_until_it_fails(processes) == [(1, 2), (2, 0)]
            with pytest.warns(JaxqkvWarning) as there:
                list(processes.drawn([(0, unknown)], **LOOK))
            with pytest.raises(ValueError, match="height"):
                list(processes.drawn([(1, a_display(1, heights=[1, 2, 3]))], **LOOK))
        assert [item for item, *_ in found + again] == [*numbers, 8, 9]
        for number, display, made in found:
            assert display.arrays["x"][0, 0] == -number
            assert made == pictures(a_display(number), *LOOK.values())
        assert again[0][1:] == (None, [])
        assert again[1][2] == pictures(dataclasses.replace(told, title="False"), *LOOK.values())
        with pytest.warns(JaxqkvWarning) as here:
            pictures(unknown, *LOOK.values())
        assert [str(each.message) for each in there] == [str(each.message) for each in here]
        assert all(process.poll() is not None for process in processes._processes)

    @pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux says which processes run")
    @pytest.mark.parametrize("forks", [True, False])
    def test_each_draws_and_none_outlives_the_block(self, forks, tmp_path, monkeypatch):
        monkeypatch.setattr(drawers, "FORKS", forks)
        note = f"open({str(tmp_path / 'processes')!r}, 'a').write(str(__import__('os').getpid()) + ' ') and 'T'"
        with drawers.Drawers(2) as processes:
            processes.begin()
            list(processes.drawn([(number, a_display(number, title=Evaluated(note))) for number in (1, 2)], **LOOK))
        numbers = set(map(int, (tmp_path / "processes").read_text().split()))
        assert len(numbers) == 2
        assert os.getpid() not in numbers
        for _ in range(100):  # the end of a process that is killed is not waited for
            if not any(map(is_running, numbers)):
                return
            time.sleep(0.1)
        pytest.fail(f"one of {numbers} still runs")

    def test_those_that_are_killed_are_an_error(self):
        with drawers.Drawers(2) as processes:
            processes.begin()
            for process in processes._processes:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            with pytest.raises(JaxqkvError, match="a drawing process was ended from outside, perhaps for lack of"):
                list(processes.drawn([(0, a_display(1))], **LOOK))


def test_where_no_process_can_be_started(monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError

    monkeypatch.setattr(drawers, "FIGURES_EACH", 1)
    monkeypatch.setattr(drawers.subprocess, "Popen", refuse)
    with drawers.Drawers(3) as processes:
        processes.begin()
        assert [made for *_, made in processes.drawn(three(), **LOOK)][1] == []
