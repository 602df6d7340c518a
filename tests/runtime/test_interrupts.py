"""Runs that are interrupted, or killed, or not alone: what is there is whole and listed, and nothing is lost."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import GPT2, arrays_of, random_tensors, write_folder
from helpers.processes import WAIT, fork

from jaxqkv.cli.main import main
from jaxqkv.figures import drawers
from jaxqkv.figures.displays import Display
from jaxqkv.figures.tables import Table
from jaxqkv.pages import gallery
from jaxqkv.pages.manifest import Record, listed_figures
from jaxqkv.runtime.files import locked, replacing_all
from jaxqkv.runtime.interrupts import AGAIN, heard, undisturbed
from jaxqkv.studies.arrays import FigureArrays
from jaxqkv.studies.registry import study
from jaxqkv.studies.study import FigureSpec

# Of a picture: its first bytes, with a width and a height of 1, and its last.
PICTURE = b"\x89PNG" + bytes(12) + 2 * (1).to_bytes(4, "big") + b"IEND\xaeB`\x82"
# Ctrl-C reaches the process whatever this one does with it.
RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from jaxqkv.cli.main import command
command()
"""


@pytest.fixture
def command(tmp_path):
    """Starts `jaxqkv` in a process of its own."""
    write_folder(tmp_path / "model", GPT2)
    write_folder(tmp_path / "other", GPT2, random_tensors(GPT2, seed=1))
    started = []

    def start(*arguments):
        started.append(fork(RUN, *arguments, cwd=tmp_path))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def until(condition, process):
    """Waits for what a process does."""
    end = time.monotonic() + WAIT
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.005)


def check_whole(folder):
    """Every figure in a study's folder is whole, listed with all its files, and on the page; nothing else is there."""
    figures = json.loads((folder / "manifest.json").read_text())["figures"]
    page = (folder.parent / "index.html").read_text()
    files = {name for entry in figures.values() for name in entry["files"]}
    assert {path.name for path in folder.iterdir()} == files | {"manifest.json"}
    for name in files:
        assert f"{folder.name}/{name}" in page
        if name.endswith("npz"):
            with np.load(folder / name, allow_pickle=False) as arrays:
                assert all(arrays[each].size for each in arrays.files)
        else:
            assert (folder / name).read_bytes().endswith(PICTURE[-8:])
    return figures


@pytest.mark.slow
def test_ctrl_c_in_the_middle(command, tmp_path, monkeypatch):
    """What was finished is whole and new, what was not is as the run before left it."""
    ids = list(study("qkv-weights").figures)[:6]
    line = ("figures", "qkv-weights", *ids, "--out", "out", "--model")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(drawers, "pictures", lambda display, formats, *look: [PICTURE] * len(formats))
        assert main([*line, "model", "--seed", "1"]) == 0
    folder = tmp_path / "out" / "qkv-weights"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    process = command(*line, "other", "--dpi", "300", "--seed", "2")
    until(lambda: (folder / f"{ids[1]}.npz").read_bytes() != before[f"{ids[1]}.npz"], process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=WAIT)
    assert process.returncode == 130
    figures = check_whole(folder)
    finished = [id for id in ids if figures[id]["run"]["seed"] == 2]
    assert 2 <= len(finished) < len(ids)
    assert err == f"jaxqkv: interrupted; {len(finished)} of {len(ids)} figures finished in out/qkv-weights: " + (
        ", ".join(finished) + "\n"
    )
    for id in ids:
        for kind in ("npz", "png"):
            same = (folder / f"{id}.{kind}").read_bytes() == before[f"{id}.{kind}"]
            assert same == (id not in finished), (id, kind)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_end_before_the_first_figure(command, tmp_path, number):
    """By Ctrl-C or from outside, as a scheduler does it, while the run waits for a text that never comes."""
    os.mkfifo(tmp_path / "text")
    process = command("figures", "attention-scores", "--out", "out", "--model", "model", "--text-file", "text")
    until(lambda: (tmp_path / "out" / "attention-scores").is_dir(), process)
    process.send_signal(number)
    out, err = process.communicate(timeout=WAIT)
    assert process.returncode == 130
    said = "no figure of attention-scores was finished, and out/attention-scores is unchanged"
    assert err == f"jaxqkv: interrupted; {said}\n"
    assert out == ""
    assert not (tmp_path / "out").exists()  # as before


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0, 0.15])
def test_ctrl_c_while_xla_compiles(command, tmp_path, delay):
    """It waits for no compilation, and does not crash over one."""
    process = command("figures", "qkv-weights", "--out", "out", "--demo", "--no-compilation-cache", "--arrays-only")
    until(lambda: (tmp_path / "out" / "qkv-weights").is_dir(), process)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=WAIT)
    assert process.returncode == 130
    assert err.startswith("jaxqkv: interrupted; ")


@pytest.mark.slow
def test_two_runs_at_once_into_one_folder(command, tmp_path):
    """Of the same study and of another: both end well, and the manifests and the page know all figures."""
    line = ("--out", "out", "--arrays-only", "--no-compilation-cache", "--model")
    runs = [
        command("figures", "qkv-weights", "1", "2b", "2d", *line, "model"),
        command("figures", "qkv-weights", "1", "2a", "2c", *line, "other"),
        command("figures", "weight-tour", "positions", "weights", *line, "other"),
    ]
    for process in runs:
        _, err = process.communicate(timeout=WAIT)
        assert process.returncode == 0, err
        assert err == ""
    assert set(check_whole(tmp_path / "out" / "weight-tour")) == {"positions", "weights"}
    figures = check_whole(tmp_path / "out" / "qkv-weights")
    checkpoints = {id: entry["run"]["checkpoint"][0]["checkpoint"] for id, entry in figures.items()}
    one = checkpoints.pop("1")
    assert checkpoints == dict.fromkeys(("2b", "2d"), "model") | dict.fromkeys(("2a", "2c"), "other")
    assert str(arrays_of(tmp_path / "out/qkv-weights/1.npz")["model"][0]) == one


def save(folder, id, about, size=3, formats=()):
    """Saves a figure of that id with an array of ones."""
    record = Record(folder, "qkv-weights", about)
    display = Display(arrays={"x": np.ones(size)}, panels=[[Table(heading=("a",), rows=[("b",)])]], caption="c",
                      size=(1, 1))  # fmt: skip
    spec = FigureSpec(id, id, FigureArrays("x [sample]"), lambda run: display)
    gallery.save_figure(display, spec, record, "jaxqkv", dict.fromkeys(formats, PICTURE))
    return record


def test_many_runs_lose_no_figure(tmp_path):
    """Each of the figures is listed, although many are saved at once."""

    def run(number):
        for figure in range(10):
            save(tmp_path, f"{number}-{figure}", {"number": number})

    threads = [threading.Thread(target=run, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    listed = listed_figures(tmp_path / "manifest.json")
    assert {id: entry["run"]["number"] for id, entry in listed.items()} == {
        f"{number}-{figure}": number for number in range(5) for figure in range(10)
    }
    assert {path.name for path in tmp_path.iterdir()} == {f"{id}.npz" for id in listed} | {"manifest.json"}


@pytest.mark.slow
def test_a_lock_goes_with_the_process_that_had_it(tmp_path):
    code = "import sys, time, pathlib, jaxqkv.runtime.files as f\nwith f.locked(pathlib.Path(sys.argv[1])):\n"
    code += " print('locked', flush=True)\n time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        taken = threading.Event()

        def take():
            with locked(tmp_path):
                taken.set()

        thread = threading.Thread(target=take)
        thread.start()
        waited = not taken.wait(0.3)
        process.kill()
        assert taken.wait(WAIT)
        assert waited
        thread.join()
    assert list(tmp_path.iterdir()) == []


def test_where_there_are_no_locks_nobody_waits(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxqkv.runtime.files.fcntl", None)
    with locked(tmp_path), locked(tmp_path):
        save(tmp_path, "1", {})
    assert set(listed_figures(tmp_path / "manifest.json")) == {"1"}


@pytest.fixture
def ctrl_c():
    """Presses Ctrl-C, once it is this process's own business."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, earlier)


@pytest.mark.parametrize("moment", range(3))
def test_ctrl_c_between_two_files_of_a_figure(tmp_path, monkeypatch, ctrl_c, moment):
    """The few renames that bring a figure in are not stopped half-way: all of it is there, or nothing."""
    save(tmp_path, "1", {"run": "earlier"}, formats=("png", "svg"))
    replace, calls = os.replace, []

    def pressed(*paths):
        if len(calls) == moment:
            ctrl_c()
        calls.append(paths)
        replace(*paths)

    monkeypatch.setattr(os, "replace", pressed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, "1", {"run": "new"}, size=7, formats=("png",))
    assert len(calls) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"1.npz", "1.png", "manifest.json"}
    assert arrays_of(tmp_path / "1.npz")["x"].size == 7
    assert listed_figures(tmp_path / "manifest.json")["1"]["run"] == {"run": "new"}


def test_ctrl_c_waits_for_the_end_of_the_block(ctrl_c):
    done = []

    def work():
        with undisturbed():
            ctrl_c()
            done.append(1)
            with undisturbed():
                ctrl_c()
                done.append(2)
            done.append(3)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [1, 2, 3]


def test_an_error_is_not_lost_to_ctrl_c(ctrl_c):
    def fail():
        with undisturbed():
            ctrl_c()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


class Deaf:
    """Ctrl-C comes while this is thrown away, where Python can raise nothing."""

    def __init__(self, press):
        self.press = press

    def __del__(self):
        self.press()


def test_ctrl_c_in_a_destructor_is_not_lost(ctrl_c, capfd):
    """It ends what comes next, also where that waits for the system."""

    def work():
        with heard():
            Deaf(ctrl_c)
            select.select([], [], [], WAIT)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert capfd.readouterr().err == ""


def test_ctrl_c_that_somebody_swallows_is_not_lost(ctrl_c):
    """As compiled code may: the exception vanishes, and the work goes on."""
    swallowed = []

    def work():
        with heard():
            for _ in range(2):
                try:
                    ctrl_c()
                except KeyboardInterrupt:
                    swallowed.append(1)
            select.select([], [], [], WAIT)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert len(swallowed) == 2


def test_what_handles_ctrl_c_is_not_interrupted_by_it(ctrl_c):
    """Neither while it tidies up, nor by what comes up then, nor after the block; a second Ctrl-C does."""
    done = []
    with heard():
        try:
            ctrl_c()
        except KeyboardInterrupt:
            time.sleep(3 * AGAIN)
            try:
                raise OSError
            except OSError:
                time.sleep(3 * AGAIN)
            done.append(1)
            with pytest.raises(KeyboardInterrupt):
                ctrl_c()
    time.sleep(3 * AGAIN)
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_destructors_own_errors_are_shown_as_ever(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: shown.append(lost.exc_type))
    with heard():
        Deaf(lambda: 1 // 0)
    assert shown == [ZeroDivisionError]
    assert sys.unraisablehook.__name__ == "<lambda>"


def test_files_that_belong_together_appear_together(tmp_path):
    """The second cannot be written: the first stays what it was."""
    (tmp_path / "a").write_bytes(b"earlier")

    def write():
        with replacing_all([tmp_path / "a", tmp_path / "b"]) as (one, two):
            one.write(b"new")
            two.write(b"new")
            raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        write()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"earlier"}


@pytest.mark.parametrize("command", ["list", "info", "view", "verify"])
def test_other_commands_say_it_too(command, monkeypatch, capsys):
    def press(given, line):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"jaxqkv.cli.{command}.run", press)
    more = {"list": [], "view": ["demo-gpt2", "--text", "a"]}.get(command, ["demo-gpt2"])
    assert main([command, *more]) == 130
    assert capsys.readouterr().err == "jaxqkv: interrupted\n"
