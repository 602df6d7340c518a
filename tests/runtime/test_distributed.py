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

from jaxqkv.cli.main import main
from jaxqkv.runtime import distributed
from jaxqkv.text.corpora import Corpus

PATIENCE = 20
# Older versions of JAX notice a dead process in their own time.
NOTICED = PATIENCE if "heartbeat_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters else 100
STUDY = ["figures", "token-frequency", "--demo", "--arrays-only", "--no-cache", "--length", "61"]
STUDY += ["--significance", "--permutations", "29"]
# The count of tokens ends in the first meeting, in a later one, and where one process has no document left.
TOKENS = (1, 700, 1_000_000)
# Of the runs that stop and go on.
STOPPED = 300
# Two documents at a meeting and two sequences together, so that there are many of them; the environment may name
# how often the model is run before the process dies, and a file of the other's that has to be there first. Several
# lines of arguments are several runs of one job, which joins once.
RUN = """
import json, os, sys, time
from jaxqkv.cli.main import main
from jaxqkv.model import model
from jaxqkv.runtime import distributed
from jaxqkv.studies.token_frequency import run as study
from jaxqkv.text import counting

counting.DOCUMENTS, study.TOGETHER, study.SAVE_EVERY = 2, 2, -1
run, runs, start = model.Model.run, [], distributed.start

def counted(*arguments, **options):
    runs.append(1)
    if len(runs) > int(os.environ["MOST_RUNS"]):
        while not os.path.exists(os.environ["OTHER"]):
            time.sleep(0.05)
        os._exit(9)
    return run(*arguments, **options)

def join(*arguments):
    distributed.start = lambda *arguments: None
    start(*arguments)

model.Model.run, distributed.start = counted, join
for line in json.loads(sys.argv[1]):
    status = main(line)
    if status:
        sys.exit(status)
"""


class Job:
    """Two processes of one job over loopback."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.processes = []

    def start(self, out, *lines, most_runs=1000):
        """Starts the next process, which runs the study once for each line of further arguments."""
        number = len(self.processes)
        place = ["--distributed", "--coordinator", f"127.0.0.1:{self.port}", "--processes", "2"]
        place += ["--process", str(number), "--patience", str(PATIENCE)]
        whole = json.dumps([[*STUDY, *line, *place] for line in lines])
        other = out / "token-frequency" / f".state-{1 - number}-of-2.npz"
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "MOST_RUNS": str(most_runs), "OTHER": str(other)}
        process = subprocess.Popen(
            [sys.executable, "-c", RUN, whole], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.processes.append(process)
        return process

    def end(self):
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def job():
    job = Job()
    yield job
    job.end()


def stops(process, out):
    """In the time that it was given, with an error, and without figures."""
    begin = time.monotonic()
    _, errors = process.communicate(timeout=180)
    # JAX and the model have to start too, on a machine that is busy with other tests.
    assert time.monotonic() - begin < NOTICED + 60
    assert process.returncode != 0
    assert errors.strip()
    assert not (out / "token-frequency" / "manifest.json").exists()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Eleven documents, two of them without a token and two too short for the batch."""
    generator = np.random.default_rng(0)
    words = [f"word{n} " for n in range(40)]
    sizes = [70, 0, 90, 30, 65, 80, 0, 120, 61, 10, 75]
    lines = ["".join(words[int(40 * u**2)] for u in generator.random(size)) for size in sizes]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def line_of(corpus, tokens, out, *more):
    """Seven sequences, which two processes do not share evenly."""
    return ["--corpus", str(corpus), "--tokens", str(tokens), "--batch", "7", "--out", str(out), *more]


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """Where two processes drew; on the way, of two further jobs one process died in each, and both jobs went on.

    Returns:
      the folder: `tokens-N` for each of `TOKENS`, `victim-N` for each process that died.
    """
    base = tmp_path_factory.mktemp("jobs")
    outs = [base / f"victim-{victim}" for victim in (0, 1)]
    dying = [Job(), Job()]
    whole = Job()
    try:
        for victim, job in enumerate(dying):
            for process in (0, 1):
                line = line_of(corpus, STOPPED, outs[victim])
                job.start(outs[victim], line, most_runs=1 if process == victim else 1000)
        for victim, job in enumerate(dying):
            job.processes[victim].communicate(timeout=180)
            assert job.processes[victim].returncode == 9
            stops(job.processes[1 - victim], outs[victim])
            states = {path.name for path in (outs[victim] / "token-frequency").glob(".state*")}
            assert states == {".state-0-of-2.npz", ".state-1-of-2.npz"}
        lines = [line_of(corpus, tokens, base / f"tokens-{tokens}") for tokens in TOKENS]
        lines += [line_of(corpus, STOPPED, out, "--resume") for out in outs]
        for _ in (0, 1):
            whole.start(base, *lines)
        for process in whole.processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for job in (*dying, whole):
            job.end()
    return base


@pytest.mark.slow
@pytest.mark.parametrize("tokens", TOKENS)
def test_two_processes_give_the_numbers_of_one(tokens, finished, corpus, tmp_path):
    """Every array of every figure, counts exactly."""
    assert main([*STUDY, *line_of(corpus, tokens, tmp_path)]) == 0
    out = finished / f"tokens-{tokens}" / "token-frequency"
    assert assert_same_figures(tmp_path / "token-frequency", out) >= 9
    assert json.loads((out / "manifest.json").read_text())["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_job_goes_on_after_one_of_them_died(victim, finished, corpus, tmp_path):
    """Each has a state of its own, and one of them may have come further."""
    assert main([*STUDY, *line_of(corpus, STOPPED, tmp_path)]) == 0
    out = finished / f"victim-{victim}" / "token-frequency"
    assert assert_same_figures(tmp_path / "token-frequency", out) >= 9
    manifest = json.loads((out / "manifest.json").read_text())
    assert any("sequences were run before" in note for note in manifest["notes"])
    assert not list(out.glob(".state*"))


@pytest.mark.slow
def test_a_process_that_fails_stops_the_other(job, tmp_path):
    """One finds no corpus and ends."""
    out = tmp_path / "out"
    line = ["--batch", "9", "--tokens", "3000", "--out", str(out)]
    first = job.start(out, line)
    second = job.start(out, [*line, "--corpus", str(tmp_path / "missing")])
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 2
    assert "no such file or folder" in errors
    stops(first, out)


@pytest.mark.slow
def test_a_process_that_is_killed_stops_the_other(job, tmp_path):
    """The first, at which all others meet."""
    out = tmp_path / "out"
    first, second = (job.start(out, ["--batch", "64", "--tokens", "1000000", "--out", str(out)]) for _ in (0, 1))
    assert "demo-bert" in first.stdout.readline()  # it has joined, and begins to read
    first.kill()
    stops(second, out)


@pytest.mark.slow
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
        main(["figures", study, "--demo", "--distributed", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "unrecognized arguments: --distributed" in capsys.readouterr().err


def test_flags_of_a_job_that_is_not_asked_for(tmp_path, capsys):
    line = ["figures", "token-frequency", "--demo", "--process", "1", "--out", str(tmp_path / "out")]
    assert main(line) == 2
    assert "--process needs --distributed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
