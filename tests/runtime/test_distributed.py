"""Two processes over loopback give the numbers of one; one that dies stops the other."""

import inspect
import json
import signal
import socket
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest
from conftest import GPT2, assert_same_figures, changed
from helpers.checkpoints import MANY_WORDS, write_checkpoint_of_words
from helpers.processes import COMMAND, fork

from jaxqkv.cli.main import main
from jaxqkv.runtime import distributed
from jaxqkv.text.corpora import Corpus

PATIENCE = 20
# Older versions of JAX notice a dead process in their own time.
NOTICED = PATIENCE if "heartbeat_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters else 100
STUDY = ["figures", "token-frequency", "--arrays-only", "--no-cache", "--length", "61"]
STUDY += ["--significance", "--permutations", "29"]
# The count of tokens ends in the first meeting, in a later one, and where one process has no document left.
TOKENS = (1, 350, 1_000_000)
# Of the runs that stop and go on.
STOPPED = 350
# How the first process of one job dies, and the second of another: by force, and of an error of its own.
DEATHS = ("kill", "fail")
# Two documents at a meeting and one sequence at a time, so that there are many of them; the environment may name
# how often the model is run before the process dies, how, and a file of the other's that has to be there first.
# Several lines of arguments are several runs of one job, which joins once.
RUN = """
import json, os, signal, sys, time
from jaxqkv.cli.main import main
from jaxqkv.model import model
from jaxqkv.runtime import distributed
from jaxqkv.studies.token_frequency import run as study
from jaxqkv.text import counting

counting.DOCUMENTS, study.TOGETHER, study.SAVE_EVERY = 2, 1, -1
run, runs, start = model.Model.run, [], distributed.start

def counted(*arguments, **options):
    runs.append(1)
    if len(runs) > int(os.environ["MOST_RUNS"]):
        while not os.path.exists(os.environ["OTHER"]):
            time.sleep(0.05)
        if os.environ["DEATH"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("the one that fails")
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

    def start(self, out, *lines, most_runs=1000, death=""):
        """Starts the next process, which runs the study once for each line of further arguments."""
        number = len(self.processes)
        place = ["--distributed", "--coordinator", f"127.0.0.1:{self.port}", "--processes", "2"]
        place += ["--process", str(number), "--patience", str(PATIENCE)]
        whole = json.dumps([[*STUDY, *line, *place] for line in lines])
        other = out / "token-frequency" / f".state-{1 - number}-of-2.npz"
        env = {"MOST_RUNS": str(most_runs), "OTHER": str(other), "DEATH": death}
        self.processes.append(fork(RUN, whole, env=env))

    def end(self):
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Eleven documents, two of them without a token and two too short for the batch."""
    generator = np.random.default_rng(0)
    sizes = [70, 0, 90, 66, 65, 80, 0, 120, 30, 10, 75]
    lines = ["".join(MANY_WORDS[int(43 * u**2)] for u in generator.random(size)) for size in sizes]
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def line_of(corpus, tmp_path_factory):
    """Arguments of the study: seven sequences, which two processes do not share evenly."""
    model = write_checkpoint_of_words(tmp_path_factory.mktemp("tiny") / "tiny", changed(GPT2, n_positions=61))
    line = ["--model", str(model), "--corpus", str(corpus), "--batch", "7"]
    return lambda tokens, out, *more: [*line, "--tokens", str(tokens), "--out", str(out), *more]


class Stopped(NamedTuple):
    """How a job ended of which one process died."""

    status: int
    errors: str
    other_status: int
    other_errors: str
    seconds: float  # that the other one went on
    files: set  # that both left


@pytest.fixture(scope="module")
def stopped(line_of, tmp_path_factory):
    """Two jobs of which one process died, the first or the second, and where they would have drawn."""
    outs = [tmp_path_factory.mktemp("victim") for _ in DEATHS]
    jobs = [Job() for _ in DEATHS]
    ends = []
    try:
        for victim, (job, death) in enumerate(zip(jobs, DEATHS, strict=True)):
            for process in (0, 1):
                line = line_of(STOPPED, outs[victim])
                job.start(outs[victim], line, most_runs=1 if process == victim else 1000, death=death)
        for victim, job in enumerate(jobs):
            died, other = job.processes[victim], job.processes[1 - victim]
            _, errors = died.communicate(timeout=180)
            begin = time.monotonic()
            _, other_errors = other.communicate(timeout=180)
            seconds, files = time.monotonic() - begin, {path.name for path in (outs[victim] / STUDY[1]).iterdir()}
            ends.append(Stopped(died.returncode, errors, other.returncode, other_errors, seconds, files))
    finally:
        for job in jobs:
            job.end()
    return outs, ends


@pytest.fixture(scope="module")
def finished(stopped, line_of, tmp_path_factory):
    """Where two processes drew: for each of `TOKENS`, and going on with each job of which one died."""
    base = tmp_path_factory.mktemp("jobs")
    outs = {tokens: base / f"tokens-{tokens}" for tokens in TOKENS}
    victims, _ = stopped
    lines = [line_of(tokens, out) for tokens, out in outs.items()]
    lines += [line_of(STOPPED, out, "--resume") for out in victims]
    job = Job()
    try:
        for _ in (0, 1):
            job.start(base, *lines)
        for process in job.processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        job.end()
    return outs, victims


@pytest.fixture(scope="module")
def of_one(line_of, tmp_path_factory):
    """Where one process drew, for each of `TOKENS`."""
    outs = {tokens: tmp_path_factory.mktemp("one") for tokens in TOKENS}
    for tokens, out in outs.items():
        assert main([*STUDY, *line_of(tokens, out)]) == 0
    return outs


@pytest.mark.slow
@pytest.mark.parametrize("tokens", TOKENS)
def test_two_processes_give_the_numbers_of_one(tokens, finished, of_one):
    """Every array of every figure, counts exactly."""
    out = finished[0][tokens] / "token-frequency"
    assert assert_same_figures(of_one[tokens] / "token-frequency", out) >= 9
    assert json.loads((out / "manifest.json").read_text())["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1], ids=DEATHS)
def test_a_process_that_dies_stops_the_other(victim, stopped):
    """In the time that it was given, with an error, without figures, and with what both had done so far.

    The first is killed, at which all others meet; the second fails and says why.
    """
    end = stopped[1][victim]
    assert end.status == (-signal.SIGKILL, 2)[victim]
    if end.status == 2:
        assert "jaxqkv: error: RuntimeError: the one that fails (--debug shows where)" in end.errors.splitlines()
    assert end.other_status not in (0, -signal.SIGKILL)
    assert end.other_errors.strip()
    # On a machine that is busy with other tests.
    assert end.seconds < NOTICED + 60
    assert {name for name in end.files if name.startswith(".state")} == {".state-0-of-2.npz", ".state-1-of-2.npz"}
    assert "manifest.json" not in end.files


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1], ids=DEATHS)
def test_a_job_goes_on_after_one_of_them_died(victim, finished, of_one):
    """Each has a state of its own, and one of them may have come further."""
    out = finished[1][victim] / "token-frequency"
    assert assert_same_figures(of_one[STOPPED] / "token-frequency", out) >= 9
    manifest = json.loads((out / "manifest.json").read_text())
    assert any("sequences were run before" in note for note in manifest["notes"])
    assert not list(out.glob(".state*"))


@pytest.mark.slow
def test_a_job_that_nothing_describes(tmp_path):
    """No flags, and no SLURM, Open MPI or Cloud TPU around."""
    done = fork(COMMAND, *STUDY, "--demo", "--out", str(tmp_path / "out"), "--distributed").completed()
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
