"""Two processes over loopback give the numbers of one; one that dies stops the other."""

import inspect
import json
import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import assert_same_figures

import jaxqkv.cli.main
from jaxqkv.runtime import distributed
from jaxqkv.text.corpora import Corpus

PATIENCE = 20
# Older versions of JAX notice a dead process in their own time.
NOTICED = PATIENCE if "heartbeat_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters else 100
STUDY = ["figures", "token-frequency", "--demo", "--arrays-only", "--no-cache", "--length", "61"]
# Two documents at a meeting and two sequences together, so that there are many of them; the environment may name
# how often the model is run before the process dies, and a file of the other's that has to be there first.
RUN = """
import os, sys, time
from jaxqkv.cli import main as cli
from jaxqkv.text import counting
from jaxqkv.model import model
from jaxqkv.studies.token_frequency import run as study

counting.DOCUMENTS, study.TOGETHER, study.SAVE_EVERY = 2, 2, -1
run, runs = model.Model.run, []

def counted(*arguments, **options):
    runs.append(1)
    if len(runs) > int(os.environ["MOST_RUNS"]):
        while not os.path.exists(os.environ["OTHER"]):
            time.sleep(0.05)
        os._exit(9)
    return run(*arguments, **options)

model.Model.run = counted
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def start():
    """Starts one process of a job of two; what is left of them at the end is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = []

    def run(process, out, *extra, most_runs=1000):
        line = [sys.executable, "-c", RUN, *STUDY, *extra, "--out", str(out), "--distributed"]
        line += ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", str(process)]
        line += ["--patience", str(PATIENCE)]
        other = out / "token-frequency" / f".state-{1 - process}-of-2.npz"
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "MOST_RUNS": str(most_runs), "OTHER": str(other)}
        running.append(subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return running[-1]

    yield run
    for process in running:
        process.kill()
        process.communicate()


def stops(process, out):
    """In the time that it was given, with an error, and without figures."""
    begin = time.monotonic()
    _, errors = process.communicate(timeout=180)
    # JAX and the model have to start too, on a machine that is busy with other tests.
    assert time.monotonic() - begin < NOTICED + 60
    assert process.returncode != 0
    assert errors.strip()
    assert not (out / "token-frequency" / "manifest.json").exists()


@pytest.fixture
def corpus(tmp_path):
    """Eleven documents, two of them without a token and two too short for the batch."""
    generator = np.random.default_rng(0)
    words = [f"word{n} " for n in range(40)]
    sizes = [70, 0, 90, 30, 65, 80, 0, 120, 61, 10, 75]
    lines = ["".join(words[int(40 * u**2)] for u in generator.random(size)) for size in sizes]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("tokens", [1, 700, 1_000_000])
def test_two_processes_give_the_numbers_of_one(tokens, start, corpus, tmp_path):
    """Seven sequences, which two do not share evenly: every array of every figure, counts exactly.

    The count ends in the first meeting, in a later one, and where one process has no document left.
    """
    extra = ["--corpus", str(corpus), "--tokens", str(tokens), "--batch", "7"]
    assert jaxqkv.cli.main([*STUDY, *extra, "--out", str(tmp_path / "one")]) == 0
    running = [start(process, tmp_path / "two", *extra) for process in (0, 1)]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert assert_same_figures(*(tmp_path / name / "token-frequency" for name in ("one", "two"))) >= 9
    manifest = json.loads((tmp_path / "two" / "token-frequency" / "manifest.json").read_text())
    assert manifest["processes"] == 2


@pytest.mark.parametrize("victim", [0, 1])
def test_a_job_goes_on_after_one_of_them_died(victim, start, corpus, tmp_path):
    """Each has a state of its own, and one of them may have come further."""
    extra = ["--corpus", str(corpus), "--tokens", "300", "--batch", "7"]
    assert jaxqkv.cli.main([*STUDY, *extra, "--out", str(tmp_path / "one")]) == 0
    out = tmp_path / "two"
    running = [start(process, out, *extra, most_runs=1 if process == victim else 1000) for process in (0, 1)]
    running[victim].communicate(timeout=180)
    assert running[victim].returncode == 9
    stops(running[1 - victim], out)
    states = {path.name for path in (out / "token-frequency").glob(".state*")}
    assert states == {".state-0-of-2.npz", ".state-1-of-2.npz"}
    running = [start(process, out, *extra, "--resume") for process in (0, 1)]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert assert_same_figures(*(path / "token-frequency" for path in (tmp_path / "one", out))) >= 9
    manifest = json.loads((out / "token-frequency" / "manifest.json").read_text())
    assert any("sequences were run before" in note for note in manifest["notes"])
    assert not list((out / "token-frequency").glob(".state*"))


def test_a_process_that_fails_stops_the_other(start, tmp_path):
    """One finds no corpus and ends."""
    out = tmp_path / "out"
    first = start(0, out, "--batch", "9", "--tokens", "3000")
    second = start(1, out, "--batch", "9", "--tokens", "3000", "--corpus", str(tmp_path / "missing"))
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 2
    assert "no such file or folder" in errors
    stops(first, out)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_stops_the_other(victim, start, tmp_path):
    out = tmp_path / "out"
    running = [start(process, out, "--batch", "64", "--tokens", "1000000") for process in (0, 1)]
    assert "demo-bert" in running[victim].stdout.readline()  # it has joined, and begins to read
    running[victim].kill()
    stops(running[1 - victim], out)


def test_a_job_that_nothing_describes(tmp_path):
    """No flags, and no SLURM, Open MPI or Cloud TPU around."""
    line = [sys.executable, "-m", "jaxqkv.cli", *STUDY, "--out", str(tmp_path / "out"), "--distributed"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 2
    assert "give --coordinator HOST:PORT" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_one_process_alone():
    values = np.arange(7, dtype=np.int64) << 40
    np.testing.assert_array_equal(distributed.total(values), values)
    np.testing.assert_array_equal(distributed.in_order(values[:3], np.array([7, 2, 5])), values[[1, 2, 0]])


def test_each_process_has_its_documents():
    corpus = Corpus("letters", {}, "x", lambda: iter("abcdefg"))
    assert ["".join(corpus.share(index, 3)) for index in range(3)] == ["adg", "be", "cf"]
    split = Corpus("letters", {}, "x", lambda: iter("abcdefg"), lambda index, count: iter(f"{index} of {count}"))
    assert "".join(split.share(1, 2)) == "1 of 2"
    assert "".join(split.share(0, 1)) == "abcdefg"


@pytest.mark.parametrize("study", ["qkv-weights", "attention-scores"])
def test_studies_of_one_process(study, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        jaxqkv.cli.main(["figures", study, "--demo", "--distributed", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "unrecognized arguments: --distributed" in capsys.readouterr().err


def test_flags_of_a_job_that_is_not_asked_for(tmp_path, capsys):
    line = ["figures", "token-frequency", "--demo", "--process", "1", "--out", str(tmp_path / "out")]
    assert jaxqkv.cli.main(line) == 2
    assert "--process is for --distributed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
