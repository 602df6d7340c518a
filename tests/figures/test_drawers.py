"""Pictures that processes draw are those that this process draws, in order, and none is lost."""

import contextlib
import io
import os
import signal
import subprocess
import sys

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
    values = np.arange(6.0).reshape(2, 3) - number
    lines = Lines(lines=[Line(x=values[0], y=values[1], label="a")], xlabel=r"$\frac{x}{2}$", integer_x=True)
    panels = [[Image(values=values, colorbar="unit", xlabel="x"), lines, Table(heading=("a",), rows=[("b",)])]]
    return Display(arrays={"x": values}, panels=panels, caption="", size=(7, 3), title=f"T{number}", **more)


def test_a_png_is_the_one_that_matplotlib_saves():
    """Which draws twice, and lays the figure out only the first time."""
    from matplotlib.image import imread

    for number in range(2):
        ours = imread(io.BytesIO(rendered(drawn(a_display(number), "light", 50), "png", "light")))
        figure = drawn(a_display(number), "light", 50)
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


def test_the_canvas_and_the_collection_of_garbage_stay_as_they_were():
    import gc

    figure = drawn(a_display(1), "light", 50)
    canvas = figure.canvas
    rendered(figure, "png", "light")
    assert figure.canvas is canvas
    assert gc.isenabled()


def three(fails=None):
    for number in range(3):
        if number == fails:
            raise JaxqkvError("cannot be made")
        yield number, None if number == 1 else a_display(number)


def test_few_figures_are_drawn_here():
    with drawers.Drawers(2) as processes:
        processes.begin()
        found = list(processes.drawn(three(), **LOOK))
        assert not processes._processes
    assert [(item, display is None) for item, display, _ in found] == [(0, False), (1, True), (2, False)]
    expected = [pictures(a_display(number), *LOOK.values()) if number != 1 else [] for number in range(3)]
    assert [made for *_, made in found] == expected


def all_until_it_fails(processes):
    """Items that come before the failure of the third."""
    found = []
    with contextlib.suppress(JaxqkvError):
        for item, _, made in processes.drawn(three(fails=2), **LOOK):
            found.append((item, len(made)))
        pytest.fail("no error")
    return found


def test_what_comes_before_a_failure_is_drawn():
    with drawers.Drawers(2) as processes:
        assert all_until_it_fails(processes) == [(0, 2), (1, 0)]


@pytest.mark.slow
class TestProcesses:
    """Two processes, whatever the machine."""

    @pytest.fixture(autouse=True)
    def two(self, monkeypatch):
        monkeypatch.setattr(drawers, "FIGURES_EACH", 1)
        monkeypatch.setattr(drawers.os, "sched_getaffinity", lambda process: {0, 1}, raising=False)

    def test_the_same_bytes_in_the_same_order(self):
        numbers = range(7)
        with drawers.Drawers(7) as processes:
            processes.begin()
            assert len(processes._processes) == 2
            found = list(processes.drawn(((number, a_display(number)) for number in numbers), **LOOK))
            again = list(processes.drawn([(8, None), (9, a_display(9))], **LOOK))
        assert [item for item, *_ in found + again] == [*numbers, 8, 9]
        for number, display, made in found:
            assert display.arrays["x"][0, 0] == -number
            assert made == pictures(a_display(number), *LOOK.values())
        assert again[0][1:] == (None, [])
        assert all(process.poll() is not None for process in processes._processes)

    def test_warnings_and_errors_come_back(self):
        unknown = Display(
            arrays={}, panels=[[Table(heading=("\U000e0100",), rows=[("b",)])]], caption="", size=(2, 1)
        )  # a character of no font
        with pytest.warns(JaxqkvWarning) as here:
            pictures(unknown, *LOOK.values())
        with drawers.Drawers(2) as processes:
            processes.begin()
            with pytest.warns(JaxqkvWarning) as there:
                list(processes.drawn([(0, unknown)], **LOOK))
            assert [str(each.message) for each in there] == [str(each.message) for each in here]
            with pytest.raises(ValueError, match="height"):
                list(processes.drawn([(0, a_display(0, heights=[1, 2, 3]))], **LOOK))

    def test_what_comes_before_a_failure_is_drawn(self):
        with drawers.Drawers(3) as processes:
            processes.begin()
            assert all_until_it_fails(processes) == [(0, 2), (1, 0)]

    def test_a_process_that_is_killed_is_an_error(self):
        with drawers.Drawers(2) as processes:
            processes.begin()
            for process in processes._processes:
                os.kill(process.pid, signal.SIGKILL)
                process.wait()
            with pytest.raises(JaxqkvError, match="a drawing process was ended from outside, perhaps for lack of"):
                list(processes.drawn([(0, a_display(0))], **LOOK))

    def test_no_process_imports_jax(self):
        """So that none takes a GPU's memory."""
        code = "import sys, jaxqkv.figures.drawers; print('jax' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"False\n"


def test_where_no_process_can_be_started(monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError

    monkeypatch.setattr(drawers, "FIGURES_EACH", 1)
    monkeypatch.setattr(drawers.subprocess, "Popen", refuse)
    with drawers.Drawers(3) as processes:
        processes.begin()
        assert [made for *_, made in processes.drawn(three(), **LOOK)][1] == []
