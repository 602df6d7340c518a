"""The benchmark compares like with like: all three sides give the same numbers. Its timings are not tested."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import baselines
import benchmark
import jax
import numpy as np
import pytest
from benchmarks import cases, kernels, measuring, passes, processes, report, sides, worker
from benchmarks.studies import STUDIES, inputs
from conftest import (
    GPT2,
    MODEL_LIMIT,
    arrays_of,
    changed,
    figures_of,
    write_folder,
    write_word_tokenizer,
)
from helpers.checkpoints import WORDS

from jaxqkv.architectures import open_checkpoint
from jaxqkv.cli import bench
from jaxqkv.cli.main import main
from jaxqkv.runtime import devices
from jaxqkv.studies.stimuli import stimuli

ROOT = Path(__file__).parents[2]
PEERS = ("tuned", "notebook")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(measuring, "CLAIM", 1 << 20)
    monkeypatch.setattr(measuring, "PAUSE", 0)


def all_sides(spec):
    """What each side computes of a case, in this process."""
    results = {}
    for side in measuring.SIDES:
        work = cases.work(side, spec | {"device": "cpu"})
        results[side] = work.result(work.run())
    return results


# Rounding, relative to the largest value. The scores turn with their components: by the Gram matrix's rounding, at
# most 24 rows · 2⁻²⁴, over the gap λ₂ − λ₃, which is λ₁ / 29 here: 4e-5. The distance is counted in cells of 2e-6, and
# is a hundredth. The others: torch.histogram rounds edges to 2⁻²⁴ of 100 bins, on both sides of a bin, so up to 1.2e-5.
KERNEL_LIMITS = {"principal components": 1e-4, "distance from normal": 1e-4}


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_kernels_agree(kernel):
    """Each side with the notebooks' function in float64."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    from baselines import notebook

    arguments = [
        torch.as_tensor(x, dtype=torch.float64) if np.ndim(x) > 1 else x for x in kernels.kernel_arguments(kernel, True)
    ]
    exact = np.asarray(getattr(notebook, kernels.KERNELS[kernel])(*arguments))
    for side, result in all_sides({"kind": "kernel", "kernel": kernel, "small": True}).items():
        assert measuring.array_difference(exact, result, side) < KERNEL_LIMITS.get(kernel, 2e-5)


@pytest.mark.parametrize(("spec", "batch", "pos", "extra"), benchmark.FORWARDS["demo"])
def test_forward_passes_agree(spec, batch, pos, extra):
    case = benchmark.forward_case(spec, batch, pos, extra)
    ours, *peers = all_sides(case.spec).values()
    lengths_only = extra.get("norms", False)
    if extra.get("cache"):
        assert ours.shape == (3 * batch * pos * (7 * 128 + 8 * pos) + batch * pos * 4096,)
    else:
        assert ours.shape == (3, 3, batch, pos) + (() if lengths_only else (128,))
    for peer in peers:
        assert measuring.array_difference(ours, peer) < MODEL_LIMIT


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint with few heads, whose tokens are words, for what makes a pass for each head."""
    folder = write_folder(tmp_path_factory.mktemp("tiny") / "tiny", changed(GPT2, initializer_range=0.2))
    return write_word_tokenizer(folder, WORDS)


def test_sweeps_agree(tiny):
    """About their mean, as the benchmark compares them, scores differ by half of the largest; so the limit is twice."""
    spec = benchmark.sweep_case(str(tiny), 7).spec
    ours, *peers = all_sides(spec).values()
    assert ours.shape == (3, 5)
    assert ours.std() > 0
    for peer in peers:
        assert measuring.array_difference(ours, peer) < 2 * MODEL_LIMIT


# Where a value lies on the edge of a bin within rounding, a count moves to the bin beside it: by 0.005 of the largest
# density there. Elsewhere torch.histogram rounds its edges, by up to 202 · 2⁻²³ of a bin, and components turn: 5e-5.
LIMITS = {"token-similarity": 0.02}


# What is not compared: what captions quote, words, and sums of what is.
ONLY_OURS = {
    *("left_out", "left_out_pairs", "layer", "layers", "model", "documents", "dimension"),
    *("rows_1", "columns_1", "rows_2", "columns_2"),
    *("name", "category", "parameters", "total", "megabytes", "megabytes_with_tied"),
}
# Histograms of differences that are nearly roundings, which fall in other bins.
ROUNDED = re.compile(r"(counts|edges)_\d+")


# Studies of the tiny checkpoint, with the options of those that make a pass for each head.
OF_WORDS = {
    "qkv-weights": {},
    "head-silencing": {"text": "a cat saw her run home her"},
    "head-patching": {
        "clean": "a cat saw her run her home",
        "donor": "a her cat her run her home",
        "answers": [" her", " cat"],
    },
}


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.slow
def test_studies_agree(study, tmp_path, tiny, monkeypatch):
    """Every figure that the baselines have of every study, computed three times over."""
    case = STUDIES[study]
    spec = str(tiny) if study in OF_WORDS else case.demo[0]
    if study == "weight-tour":  # whose first and last three layers are six
        spec = str(write_folder(tmp_path / "deep", changed(GPT2, n_layer=7, initializer_range=0.2)))
    folder = open_checkpoint(spec).folder
    if study in OF_WORDS:
        monkeypatch.setitem(STUDIES, study, dataclasses.replace(case, options=OF_WORDS[study]))
    corpus = tmp_path / "documents.jsonl"
    if case.counted:
        words = [re.findall(r"\w+", line) for line in stimuli("token_similarity/her.txt")]
        generator = np.random.default_rng(0)
        documents = [
            " ".join(words[i][j % len(words[i])] for i, j in generator.integers(0, 54, (300, 2))) for _ in "abc"
        ]
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    words, job = inputs(study, tmp_path, small=True, corpus=[str(corpus)])
    figures_of(study, tmp_path, spec, *case.figures, *words)
    ours = tmp_path / "out" / study
    job |= {"models": [str(folder)], "device": "cpu"}
    for side in PEERS:
        theirs = tmp_path / side / study
        theirs.mkdir(parents=True)
        computed = baselines.study(side, study)(job)
        assert {path.stem for path in ours.glob("*.npz")} == set(computed)
        for figure, arrays in computed.items():
            expected = arrays_of(ours / f"{figure}.npz")
            absent = set(expected) - ONLY_OURS - set(arrays)
            assert all(study == "head-silencing" and ROUNDED.fullmatch(name) for name in absent), (figure, absent)
            assert_alike({name: (expected[name], arrays[name]) for id, name in case.random if id == figure}, job)
            if study == "qkv-activations" and "density" in arrays:
                arrays = arrays | {"density": moved_back(expected["density"], arrays["density"])}
            np.savez(theirs / f"{figure}.npz", **arrays)
        difference = processes.study_difference(ours, theirs)
        assert 0 < difference < LIMITS.get(study, 3e-4)


def moved_back(ours, theirs):
    """Their densities, where one value at most, on an edge within rounding, lies in the bin beside ours: put back."""
    moved = np.abs(ours - theirs) > 3e-4 * np.nanmax(ours)
    if not moved.any():
        return theirs
    (*one, here), (*other, there) = np.argwhere(moved).tolist()
    assert (one, here + 1) == (other, there)
    gone, come = (ours - theirs)[moved]
    assert gone == pytest.approx(-come, rel=1e-3)
    return np.where(moved, ours, theirs)


def assert_alike(pairs, job):
    """Arrays that each side draws by itself: of one shape, and p-values as near as so few permutations allow."""
    for name, (ours, theirs) in pairs.items():
        if name not in ("null", "counts", "edges"):  # of histograms of what is drawn
            assert np.shape(ours) == np.shape(theirs)
        if name in ("p", "difference_p", "p_shift") and "permutations" in job:
            both = (ours + theirs) / 2
            # Five standard errors of the difference of two shares, each of so many permutations.
            limit = 5 * np.sqrt(2 * both * (1 - both) / job["permutations"]) + 1 / job["permutations"]
            assert (np.abs(ours - theirs) <= limit).all(), name
    if "low" in pairs:
        (ours, theirs) = (pairs["high"][side] - pairs["low"][side] for side in range(2))
        assert min(ours.min(), theirs.min()) > 0
        assert 0.5 < ours.mean() / theirs.mean() < 2  # of dozens of intervals, of which one varies by a quarter
        middles = [(pairs["high"][side] + pairs["low"][side]) / 2 for side in range(2)]
        assert (np.abs(middles[0] - middles[1]) < (ours + theirs) / 2).all()  # they overlap


def in_this_process(command, env, log):
    """A worker's seconds and bytes, without the seconds in which a process of its own loads PyTorch and JAX."""
    assert command[:3] == [sys.executable, "-m", "benchmarks.worker"]
    with log.open("w") as output, contextlib.redirect_stdout(output):
        worker.main(*command[3:])
    return 1.0, 10**8


@pytest.mark.slow
def test_processes_are_timed_and_compared_and_the_files_say_so(tmp_path, capsys, monkeypatch):
    """A kernel's processes, and the first use of a checkpoint in this one: whole processes are in the next test.

    With one baseline: both are compared in this process above, and the second would load PyTorch in one more.
    """
    monkeypatch.setattr(measuring, "run_process", in_this_process)
    monkeypatch.setattr(devices, "enable_compilation_cache", lambda: None)
    arguments = ["--demo", "--cases", "first use", "head pairs", "--repeat", "1", "--out", str(tmp_path)]
    assert benchmark.main([*arguments, "--baselines", "tuned"]) == 0
    measured = json.loads((tmp_path / "benchmark.json").read_text())
    assert [each["case"] for each in measured["cases"]] == ["first use, demo-gpt2, 1 × 31", "kernel head pairs"]
    for each in measured["cases"]:
        assert each["difference"].keys() == {"tuned"}
        assert each["difference"]["tuned"] < MODEL_LIMIT
        median = each["median seconds"]
        assert each["faster"] == {"tuned": pytest.approx(median["tuned"] / median["jaxqkv"])}
        if sys.platform == "linux":
            # No process of JAX or PyTorch is smaller than 10 MB, and none of these needs 2 GB.
            assert all(1e7 < each["memory"][side] < 2e9 for side in ("jaxqkv", "tuned"))
    assert measured["versions"].keys() >= {"jaxqkv", "jax", "torch", "transformers"}
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(each["case"] in printed for each in measured["cases"])


def test_the_first_run_is_one_and_later_short_ones_are_repeated(monkeypatch, capsys):
    lengths, now = iter([9.0, 0.1, 0.3, 0.5, 0.02, 0.2, 0.1]), [0.0]

    def run():
        now[0] += next(lengths)

    monkeypatch.setattr(worker, "work", lambda side, settings: sides.Work(run))
    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n\n\n"))
    worker.main("jaxqkv", "{}")
    ready, *answers = map(json.loads, capsys.readouterr().out.splitlines())
    assert ready == "ready"
    assert [answer["seconds"] for answer in answers] == pytest.approx([9.0, 0.2, 0.5, 0.1])


def test_memory_is_claimed_but_no_more_than_half_of_what_is_free(monkeypatch):
    commands = []
    monkeypatch.setattr(measuring.subprocess, "run", lambda command, **_: commands.append(command[-1]))
    monkeypatch.setattr(measuring, "CLAIM", 3 << 20)
    monkeypatch.setattr(measuring.os, "sysconf_names", {"SC_AVPHYS_PAGES": 0}, raising=False)
    free = {"SC_AVPHYS_PAGES": 1 << 20, "SC_PAGE_SIZE": 4096}  # 4 GiB
    monkeypatch.setattr(measuring.os, "sysconf", free.__getitem__, raising=False)
    for moved in (None, 5 << 20, 1 << 60):
        measuring.claim_memory(moved)
    written = [int(re.fullmatch(r"b'1' \* (\d+)", command)[1]) for command in commands]
    assert written == [3 << 20, 10 << 20, 2 << 30]


@pytest.mark.slow
def test_whole_processes_are_timed(tmp_path):
    """On processes that load NumPy alone: each sleeps, and jaxqkv without earlier programs sleeps longest."""
    seconds = {"jaxqkv cold": 0.6, "jaxqkv": 0, "tuned": 0.2, "notebook": 0.4}
    numbers = {"jaxqkv cold": [8, 4], "jaxqkv": [9, 9], "tuned": [8, 5], "notebook": [8, 2]}

    def command(side, out):
        code = "import benchmarks.sides, sys, time, numpy\ntime.sleep(float(sys.argv[1]))\n"
        code += "numpy.save(sys.argv[2], numpy.full(3_000_000, eval(sys.argv[3])[1]) / eval(sys.argv[3])[0])"
        return [sys.executable, "-c", code, str(seconds[side]), str(out / "result.npy"), str(numbers[side])]

    def difference(ours, theirs):
        return measuring.array_difference(*(np.load(side / "result.npy") for side in (ours, theirs)))

    case = measuring.Whole("sleeps", command, difference)
    result = measuring.measure_whole(case, measuring.environment("cpu", tmp_path), 1, 60.0)
    assert result["difference"] == {"tuned": 0.25, "notebook": 0.5}
    assert result["runs"] == 1
    median, cold = result["median seconds"], result["cold seconds"]
    assert median["tuned"] > 0.2
    assert median["notebook"] > 0.4
    assert cold["jaxqkv"] > 0.6
    assert {side: cold[side] for side in PEERS} == {side: median[side] for side in PEERS}
    assert result["faster"] == {side: median[side] / median["jaxqkv"] for side in PEERS}
    if sys.platform == "linux":
        assert all(1e6 < each < 5e8 for each in result["memory"].values())


def test_a_wrong_answer_shows(tmp_path):
    right = np.arange(6.0).reshape(2, 3)
    assert measuring.array_difference(right, right * 1.01) == pytest.approx(0.01)
    assert measuring.array_difference(right, np.where(right == 3, np.nan, right)) == np.inf
    with pytest.raises(measuring.BenchmarkError, match=r"jaxqkv gives \[2, 3\], the other side \[3, 2\]"):
        measuring.array_difference(right, right.T)
    for side, factor in (("ours", 1), ("theirs", 1.5)):
        (tmp_path / side).mkdir()
        np.savez(tmp_path / side / "4.npz", within=right * factor, across=right)
    assert processes.study_difference(tmp_path / "ours", tmp_path / "theirs") == pytest.approx(0.5)


@pytest.mark.slow
def test_a_side_that_fails_is_named(tmp_path):
    case = measuring.Whole("breaks", lambda side, out: [sys.executable, "-c", "raise SystemExit('no such thing')"])
    with pytest.raises(measuring.BenchmarkError, match="no such thing"):
        measuring.measure_whole(case, {}, 1, 1.0)


@pytest.mark.slow
def test_a_side_that_cannot_begin_is_named(tmp_path):
    """A process of PyTorch's, where something else has its name."""
    (tmp_path / "torch.py").write_text("raise ImportError('missing, or broken')")
    env = measuring.environment("cpu", tmp_path)
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), env["PYTHONPATH"]])
    case = measuring.Repeated("breaks", {"kind": "kernel", "kernel": "head pairs", "small": True})
    workers = measuring.Workers(case, env, "cpu", 8, sides=("tuned",))
    with pytest.raises(measuring.BenchmarkError, match=r"tuned: ImportError: missing, or broken"):
        measuring.measure_repeated(case, workers, 1, 1.0, 8)


def test_the_work_of_a_forward_pass_is_counted():
    """As a loop over its products, for the shape of demo-gpt2."""
    case = benchmark.forward_case("demo-gpt2", 3, 7, {})
    width, inner, layers = 128, 512, 8
    total, weights = 0, 0
    for layer in range(layers):
        total += 3 * 2 * 7 * width * width
        weights += 3 * width * width
        if layer < layers - 1:
            total += 2 * 2 * 7 * 7 * width + 2 * 7 * width * width + 2 * 2 * 7 * width * inner
            weights += width * width + 2 * width * inner
    assert case.flops == 3 * total
    assert case.moved == 4 * (weights + 3 * layers * 3 * 7 * width)


def test_the_work_of_a_pass_with_a_cache_is_counted():
    case = benchmark.forward_case("demo-gpt2", 3, 7, {"cache": True})
    width, inner, layers, vocab, heads = 128, 512, 8, 4096, 8
    products = 4 * width * width + 2 * width * inner  # of Q, K, V and the output; of the MLP
    total = layers * (2 * 7 * products + 2 * 2 * 7 * 7 * width) + 2 * 7 * width * vocab
    assert case.flops == 3 * total
    numbers = layers * (7 * 3 * 7 * width + 3 * heads * 7 * 7) + 3 * 7 * vocab
    assert case.moved == 4 * (layers * products + width * vocab + numbers)
    assert case.name == "forward demo-gpt2, 3 × 7, logits and cache"


def test_long_cases_are_run_less_often():
    assert measuring.times(7, 180, [1, 2, 3]) == 7
    assert measuring.times(7, 180, [10, 20, 30]) == 2
    assert measuring.times(7, 180, [20, 30, 41]) == 0


def test_the_readme_has_the_published_numbers():
    text = report.README.read_text()
    for mark, content in report.tables().items():
        assert f"<!-- {mark} -->\n{content}\n<!-- end of {mark} -->" in text
    measured = json.loads(report.PUBLISHED["cpu"].read_text())
    assert report.markdown(measured) == report.tables()["benchmark"]
    assert len(measured["cases"]) >= 25


def on_an_accelerator():
    """Numbers of a large forward pass in both precisions and of a kernel, without the notebook's side."""
    forward = {
        "case": "forward m, 64 × 512",
        "median seconds": {"jaxqkv": 0.25, "tuned": 0.5},
        "faster": {"tuned": 2.0},
        "cold seconds": {"jaxqkv": 10.0, "tuned": 1.0},
        "difference": {"tuned": 2e-6},
        "memory": {"jaxqkv": 10**9, "tuned": 2 * 10**9},
        "device memory": {"jaxqkv": 3 * 10**9, "tuned": 12 * 10**9},
        "GFLOP/s": 41_000.0,
        "of peak": 0.82,
        "peak GFLOP/s": 50_000.0,
    }
    short = forward | {"case": "forward m, 64 × 512, TF32", "precision": "TF32", "peak GFLOP/s": 400_000.0}
    kernel = {name: forward[name] for name in list(forward)[:7]} | {"case": "kernel k"}
    return {
        "device": "gpu: NVIDIA H100 80GB HBM3",
        "processor": "abacus",
        "cores": 16,
        "memory GB": 7.0,
        "versions": {"jaxqkv": "0.1.0", "jax": "0.11.2"},
        "cases": [forward, kernel, short],
    }


def test_the_table_of_an_accelerator():
    """Shows the sides that were run, with the device's memory, and the rate of products in each precision."""
    heading, _, head, line, *rows = report.markdown(on_an_accelerator()).splitlines()
    assert heading == (
        "On NVIDIA H100 80GB HBM3, with 50.0 TFLOP/s of float32 products and 400 of TF32; abacus, 16 cores "
        "(jaxqkv 0.1.0, jax 0.11.2):"
    )
    assert head == "| case | jaxqkv | tuned | × tuned | cold × tuned | memory | of tuned | difference | of peak |"
    assert line == "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    assert rows == [
        "| forward m, 64 × 512 | 250.0 ms | 500.0 ms | 2.00 | 0.10 | 3,000 MB | 0.25 | 2e-06 | 82% |",
        "| kernel k | 250.0 ms | 500.0 ms | 2.00 | 0.10 | 3,000 MB | 0.25 | 2e-06 |  |",
        "| forward m, 64 × 512, TF32 | 250.0 ms | 500.0 ms | 2.00 | 0.10 | 3,000 MB | 0.25 | 2e-06 | 82% |",
    ]


def test_numbers_are_published_by_their_kind_of_device(tmp_path, monkeypatch):
    """Keeps those of an accelerator beside the processor's, which stay as they are."""
    kept = {kind: tmp_path / f"published-{kind}.json" for kind in ("cpu", "gpu")}
    kept["cpu"].write_bytes(report.PUBLISHED["cpu"].read_bytes())
    readme = tmp_path / "README.md"
    readme.write_bytes(report.README.read_bytes())
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "PUBLISHED", kept)
    before = report.tables()
    assert before["benchmark on an accelerator"] == "No accelerator has been measured yet."
    measured = tmp_path / "benchmark.json"
    measured.write_text(json.dumps(on_an_accelerator()))
    report.publish(measured)
    assert json.loads(kept["gpu"].read_text()) == on_an_accelerator()
    assert report.tables()["benchmark"] == before["benchmark"]
    assert all(content in readme.read_text() for content in report.tables().values())
    assert "| forward m, 64 × 512, TF32 | 250.0 ms |" in readme.read_text()
    report.chart(on_an_accelerator()["cases"], tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_is_rewritten_between_its_marks(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- a -->\nold\n<!-- end of a -->\nafter <!-- b -->\nold\n<!-- end of b -->\n")
    report.write_readme(path, "a", "new \\1")
    assert path.read_text() == (
        "before\n<!-- a -->\nnew \\1\n<!-- end of a -->\nafter <!-- b -->\nold\n<!-- end of b -->\n"
    )
    with pytest.raises(ValueError, match=r"no place for what is generated: <!-- c -->"):
        report.write_readme(path, "c", "new")


@pytest.fixture
def _measured_by_no_process(monkeypatch):
    """Every case gets a result that no other has; no chart is drawn of them."""
    clock = itertools.count(1)

    def measure(case, *arguments):
        seconds = {side: [float(next(clock))] for side in measuring.SIDES}
        result = measuring._summary(case.name, seconds, dict.fromkeys(PEERS, 0.0))
        return result | {"cold seconds": result["median seconds"], "memory": dict.fromkeys(measuring.SIDES, 10**8)}

    monkeypatch.setattr(benchmark, "measure_repeated", measure)
    monkeypatch.setattr(report, "chart", lambda cases, path: None)
    monkeypatch.setattr(benchmark, "Workers", lambda case, **settings: contextlib.nullcontext({}))


@pytest.mark.usefixtures("_measured_by_no_process")
def test_measured_in_parts(tmp_path, capsys):
    """`--add` keeps other cases in their order, replaces one that is measured again, and refuses another machine's."""
    arguments = ["--demo", "--repeat", "1", "--out", str(tmp_path), "--cases"]
    path = tmp_path / "benchmark.json"
    assert benchmark.main([*arguments, "neighbouring positions"]) == 0
    first = json.loads(path.read_text())
    assert benchmark.main([*arguments, "causal samples", "--add"]) == 0
    both = json.loads(path.read_text())
    assert [each["case"] for each in both["cases"]] == ["kernel causal samples", "kernel neighbouring positions"]
    assert both["cases"][1] == first["cases"][0]
    assert benchmark.main([*arguments, "causal samples"]) == 0
    (again,) = json.loads(path.read_text())["cases"]
    assert again["median seconds"] != both["cases"][0]["median seconds"]
    path.write_text(json.dumps(both | {"processor": "abacus"}))
    capsys.readouterr()
    assert benchmark.main([*arguments, "causal samples", "--add"]) == 2
    assert "measured with another processor" in capsys.readouterr().err
    assert json.loads(path.read_text())["processor"] == "abacus"


def test_processes_of_a_group_have_loaded_before_one_is_timed():
    events = []

    class Loading(contextlib.nullcontext):
        def __init__(self, case):
            super().__init__({case.name: SimpleNamespace(wait=lambda: events.append(f"{case.name} loaded"))})
            events.append(f"{case.name} started")

    whole = measuring.Whole("whole", lambda side, out: [])
    made = [
        lambda case=case: case
        for case in (measuring.Repeated("a", {}), whole, *map(measuring.Repeated, "bc", ({}, {})))
    ]
    for case, workers in benchmark._started(made, 3, Loading):
        events.append(f"{case.name} timed")
        assert (workers is None) == (case is whole)
    assert events == [
        *("a started", "b started", "a loaded", "b loaded", "a timed", "whole timed", "b timed"),
        *("c started", "c loaded", "c timed"),
    ]


@pytest.mark.usefixtures("_measured_by_no_process")
def test_a_case_that_fails_leaves_the_others(tmp_path, capsys, monkeypatch):
    measure = benchmark.measure_repeated

    def without_composition(case, *arguments):
        if case.name == "kernel composition":
            raise measuring.BenchmarkError("tuned: out of memory")
        return measure(case, *arguments)

    monkeypatch.setattr(benchmark, "measure_repeated", without_composition)
    arguments = ["--demo", "--out", str(tmp_path), "--together", "3", "--cases", "composition", "head pairs", "sweep"]
    assert benchmark.main(arguments) == 2
    measured = json.loads((tmp_path / "benchmark.json").read_text())["cases"]
    assert [each["case"] for each in measured] == ["sweep of heads demo-gpt2, 1 × 7", "kernel head pairs"]
    error = capsys.readouterr().err
    assert "error: kernel composition: tuned: out of memory\n" in error
    assert error.endswith("error: not measured: kernel composition\n")


def test_cases_that_fill_an_accelerator(capsys):
    """None is a process of its own; what takes longest to make comes last, after what must not be lost."""
    assert benchmark.main(["--large", "--device", "gpu", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[0] == "forward gpt2-medium, 64 × 512"
    assert listed[-3:] == [
        "forward gpt2-xl, 8 × 512",
        "forward gpt2-medium, 64 × 512, TF32",
        "forward bert-large-uncased, 64 × 512, TF32",
    ]
    assert {"sweep of heads gpt2-medium, 1 × 24", "kernel composition", "forward gpt2, 540 × 24 padded"} < {*listed}
    assert all(name.split()[0] in ("forward", "sweep", "kernel") for name in listed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--publish", "--large", "--device", "cpu"], "--publish is for the full benchmark"),
        (["--together", "0"], "--together needs a number of cases of at least 1"),
    ],
)
def test_settings_that_do_not_go_together(arguments, message, capsys):
    assert benchmark.main([*arguments, "--list"]) == 2
    assert message in capsys.readouterr().err


def test_sixteen_sentences_of_a_large_batch_are_compared(monkeypatch):
    """Spread over the batch, and the same on both sides; here three of five."""
    assert passes._some(37)[[0, 1, -1]].tolist() == [0, 2, 36]
    assert len(passes._some(37)) == 16
    assert passes._some(3).tolist() == [0, 1, 2]
    case = benchmark.forward_case("demo-gpt2", 5, 31, {})
    whole = all_sides(case.spec)
    monkeypatch.setattr(passes, "COMPARED", 3)
    for side, some in all_sides(case.spec).items():
        np.testing.assert_array_equal(some, whole[side][:, :, [0, 2, 4]])
    assert measuring.array_difference(whole["jaxqkv"], whole["tuned"]) < MODEL_LIMIT


def test_precision_of_each_side():
    """TensorFloat-32 only where a case asks for it, on both sides."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    case = benchmark.forward_case("demo-gpt2", 3, 5, {"tf32": True})
    assert case.spec["tf32"] is True
    assert case.name == "forward demo-gpt2, 3 × 5, TF32"
    before = torch.get_float32_matmul_precision(), devices.setting("jax_default_matmul_precision")
    try:
        for tf32, precision in ((True, "high"), (False, "highest")):
            sides.choose_precision("tuned", tf32)
            assert torch.get_float32_matmul_precision() == precision
        sides.choose_precision("jaxqkv", False)
        assert devices.precision() == "highest"
        sides.choose_precision("jaxqkv", True)
        assert devices.precision() == "default"
        assert devices.execution(None) == (False, False)  # nothing is rounded to bfloat16 beforehand
    finally:
        torch.set_float32_matmul_precision(before[0])
        jax.config.update("jax_default_matmul_precision", before[1])


def test_the_fastest_variant_is_found_once_its_kernels_are_loaded(monkeypatch):
    """On a clock that runs only in the variants: the first run of each on an accelerator takes 10 more."""
    monkeypatch.setattr(sides, "on_torch", lambda device: (None, lambda: None, None))
    now, seen = [0.0], []
    monkeypatch.setattr(sides.time, "perf_counter", lambda: now[0])

    def run(seconds):
        now[0] += seconds + 10 * (seconds not in seen and len(seen) == 2)
        seen.append(seconds)

    assert sides.fastest((3.0, 2.0, 7.0), run, "cuda") == 2.0
    assert seen == [3.0, 3.0, 2.0, 2.0, 7.0, 7.0]
    seen.clear()
    assert sides.fastest((3.0, 7.0, 2.0), run, "cpu") == 3.0  # once each, the last with the 10
    assert seen == [3.0, 7.0, 2.0]


def test_a_run_on_an_accelerator_ends_when_the_device_has_finished(monkeypatch):
    torch = pytest.importorskip("torch", exc_type=ImportError)
    calls = []
    for name, value in (("synchronize", None), ("max_memory_allocated", 123), ("reset_peak_memory_stats", None)):
        monkeypatch.setattr(torch.cuda, name, lambda name=name, value=value: calls.append(name) or value)
    work = sides.torch_work(lambda: calls.append("run"), {"device": "cuda"})
    work.run()
    assert work.device_peak() == 123
    work.forget_peak()
    assert calls == ["run", "synchronize", "max_memory_allocated", "reset_peak_memory_stats"]


def test_memory_of_the_comparison_is_not_the_sides(monkeypatch):
    """The least peak of any run: JAX cannot forget one, and a first run's comparison copies arrays."""
    worker = measuring.Worker.__new__(measuring.Worker)
    worker.process, worker.device_bytes = SimpleNamespace(stdin=io.StringIO()), None
    answers = iter([700, 900, 650])
    monkeypatch.setattr(worker, "_answer", lambda: {"seconds": 1.0, "device bytes": next(answers)})
    assert [(worker.run(), worker.device_bytes)[1] for _ in range(3)] == [700, 700, 650]


def test_no_such_case(capsys):
    assert benchmark.main(["--cases", "nothing like it"]) == 2
    assert "no case has that in its name" in capsys.readouterr().err


def test_cases_of_given_checkpoints(capsys):
    folder = str(open_checkpoint("demo-gpt2").folder)
    assert main(["bench", "--model", folder, "demo-bert", "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "forward demo-gpt2, 8 × 256" in listed
    assert "forward demo-bert, 1 × 115" in listed
    assert "token-frequency, with pictures" in listed
    assert "qkv-weights, arrays" in listed


def test_bench_without_its_scripts(monkeypatch, capsys):
    monkeypatch.setattr(bench, "SCRIPTS", ROOT / "not there")
    assert main(["bench", "--list"]) == 2
    assert "clone" in capsys.readouterr().err
