"""Runs the sides of a case in turn, each in processes of its own, and measures time and memory.

Two kinds: a case whose sides compute again and again in a living process (`Repeated`), and one whose
sides are whole processes, started anew for every run (`Whole`).
"""

import contextlib
import dataclasses
import functools
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SIDES = ("jaxqkv", "tuned", "notebook")
SCRIPTS = Path(__file__).parents[1]
# Seconds between two readings of a process's memory.
INTERVAL = 0.02
# Least bytes of memory claimed before a first run; later runs of at least so many seconds get a claim too.
CLAIM, WORTH_A_CLAIM = 1 << 30, 5.0
# Seconds before each run of a living process on a CPU: threads of the last one may still be spinning for more work.
PAUSE = 0.4
# Variables that the sides do not get: a cold run must find no compiled programs, and all products have the precision
# that the case names.
LEFT_OUT = ("JAX_COMPILATION_CACHE_DIR", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")


class BenchmarkError(Exception):
    """A side failed, or the sides computed different results."""


@dataclasses.dataclass
class Repeated:
    """A case of `cases.py`, run again and again in a living process.

    Attributes:
      name: on the command line and in the table.
      spec: for `benchmarks.worker`.
      flops: floating-point operations of the products that the result needs, if counted.
      moved: least bytes that have to be read and written, if counted.
    """

    name: str
    spec: dict[str, Any]
    flops: float | None = None
    moved: float | None = None


@dataclasses.dataclass
class Whole:
    """A case of whole processes.

    Attributes:
      name: on the command line and in the table.
      command: returns a side's command; `jaxqkv cold` is jaxqkv without earlier compiled programs.
      difference: largest difference between what two sides left in their folders, or None.
    """

    name: str
    command: Callable[[str, Path], Sequence[str]]
    difference: Callable[[Path, Path], float | None] = lambda ours, theirs: None


def environment(device: str, cache: Path) -> dict[str, str]:
    """Returns the environment of a side's process: the benchmark's modules, one device, no display."""
    extra = {
        "PYTHONPATH": os.pathsep.join([str(SCRIPTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "JAX_PLATFORMS": {"gpu": "cuda"}.get(device, device),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAXQKV_CACHE": str(cache),
        "MPLBACKEND": "Agg",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "true",
    }
    return {name: value for name, value in os.environ.items() if name not in LEFT_OUT} | extra


def anonymous_bytes(process: int) -> int | None:
    """Returns a process's anonymous memory: allocations without mapped files, known only on Linux."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return 1024 * int(line.split()[1])
    return None


def claim_memory(moved: float | None = None) -> None:
    """Writes to memory and frees it: `CLAIM` bytes, or twice what a case moves if that is more.

    The host of a virtual machine takes free memory back, and supplies it again at seconds a gigabyte. Without a claim
    the side that runs first would wait for memory that the next one finds ready. Half of what is free is the most.
    """
    if "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", {}):  # not Linux
        return
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = min(max(CLAIM, round(2 * (moved or 0))), free // 2)
    subprocess.run([sys.executable, "-S", "-c", f"b'1' * {size}"], check=False)


class Worker:
    """One side of a `Repeated` case in its process."""

    def __init__(self, side: str, spec: dict[str, Any], env: Mapping[str, str], log: Path):
        self.side, self.log = side, log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", side, json.dumps(spec)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=env,
            )  # fmt: skip
        self.bytes: list[int] = []
        self.device_bytes: int | None = None

    def ready(self) -> None:
        """Waits until everything is loaded."""
        self._answer()

    def run(self, result: Path | None = None) -> float:
        """Returns the seconds of a run: the first one, or later the median of as many as fill `worker.WINDOW`."""
        with contextlib.suppress(OSError):  # a process that has ended has printed why
            self.process.stdin.write(f"{result or ''}\n")
            self.process.stdin.flush()
        answer = self._answer()
        if (now := answer["device bytes"]) is not None:  # a later peak can include copies made for the comparison
            self.device_bytes = min(now, self.device_bytes or now)
        return answer["seconds"]

    def wait(self) -> None:
        """Waits until there is an answer, or the process has ended."""
        while not select.select([self.process.stdout], [], [], INTERVAL)[0]:
            self.look()
        self.look()

    def _answer(self) -> Any:
        self.wait()
        try:
            return json.loads(self.process.stdout.readline())
        except ValueError:
            raise BenchmarkError(f"{self.side}: {last_line(self.log)}") from None

    def look(self) -> None:
        if (now := anonymous_bytes(self.process.pid)) is not None:
            self.bytes.append(now)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def run_process(command: Sequence[str], env: Mapping[str, str], log: Path) -> tuple[float, int | None]:
    """Returns seconds from start to end of a process, and its peak of anonymous memory."""
    most = None
    with log.open("w") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output, env=env)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(INTERVAL)
                break
            if (now := anonymous_bytes(process.pid)) is not None:
                most = max(most or 0, now)
        seconds = time.perf_counter() - start
    if process.returncode:
        raise BenchmarkError(f"{' '.join(command[:5])} …: {last_line(log)}")
    return seconds, most


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "ended without a word"


class Workers(dict[str, Worker]):
    """The processes of a case's sides, and of the machine's products, from when it is made to the end of a `with`."""

    def __init__(self, case: Repeated, env: Mapping[str, str], device: str, product: int, sides: Sequence[str] = SIDES):
        """Starts the processes.

        Args:
          case: what they compute.
          env: their environment.
          device: platform that they compute on.
          product: size of the machine's products.
          sides: the sides of the case.
        """
        super().__init__()
        self.device = device
        spec = {**case.spec, "device": {"gpu": "cuda"}.get(device, "cpu")}
        started = {side: (side, spec) for side in sides}
        if case.flops:
            peaks = {"kind": "product", "size": product} | {
                name: spec[name] for name in ("device", "tf32") if name in spec
            }
            started |= {"peak": ("jaxqkv", peaks), "torch's peak": ("tuned", peaks)}
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            for name, (side, of_side) in started.items():
                self[name] = Worker(side, of_side, env, Path(folder) / f"{name}.log")
                stack.callback(self[name].close)
            self._stack = stack.pop_all()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:  # nobody waits for what they are computing
            for worker in self.values():
                worker.process.kill()
        self._stack.close()


def times(count: int, budget: float, first: Sequence[float]) -> int:
    """Returns how many more rounds fit the budget when the first took so long; 0 if none does."""
    spent = sum(first)
    return 0 if spent > budget / 2 or not count else int(np.clip((budget - spent) / spent, 1, count))


def measure_repeated(case: Repeated, workers: Workers, count: int, budget: float, product: int) -> dict[str, Any]:
    """Returns cold and warm times of every side, and of the machine's products of size `product` squared."""
    sides = [side for side in SIDES if side in workers]
    cold: dict[str, float] = {}

    def run(name: str, file: Path | None = None) -> float:
        if workers.device == "cpu":
            if name in sides and cold.get(name, WORTH_A_CLAIM) >= WORTH_A_CLAIM:
                claim_memory(case.moved)
            time.sleep(PAUSE)
        return workers[name].run(file)

    with tempfile.TemporaryDirectory() as folder, workers:
        files = {side: Path(folder) / f"{side}.npy" for side in sides}
        for worker in workers.values():
            worker.ready()
        for side in sides:
            cold[side] = run(side, files[side])
        load = functools.partial(np.load, allow_pickle=False)
        difference = {side: array_difference(load(files["jaxqkv"]), load(files[side])) for side in sides[1:]}
        for name in workers.keys() - set(sides):
            run(name)
        rounds = times(count, budget, list(cold.values()))
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(max(rounds, 1)):
            for name in workers:
                if rounds or name not in sides:
                    seconds[name].append(run(name))
        if not rounds:
            seconds |= {side: [cold[side]] for side in sides}
        result = _summary(case.name, {side: seconds[side] for side in sides}, difference)
        result["cold seconds"] = cold
        result["memory"] = {side: max(workers[side].bytes, default=None) for side in sides}
        if any(workers[side].device_bytes for side in sides):
            result["device memory"] = {side: workers[side].device_bytes for side in sides}
        if case.spec.get("tf32"):
            result["precision"] = "TF32"
    fastest = result["median seconds"]["jaxqkv"]
    if case.flops:
        top = 2 * product**3 / min(statistics.median(seconds["peak"]), statistics.median(seconds["torch's peak"]))
        result |= {"GFLOP/s": case.flops / fastest / 1e9, "of peak": case.flops / fastest / top}
        result["peak GFLOP/s"] = top / 1e9
    if case.moved:
        result["GB/s"] = case.moved / fastest / 1e9
    return result


def measure_whole(
    case: Whole, env: Mapping[str, str], count: int, budget: float, sides: Sequence[str] = SIDES
) -> dict[str, Any]:
    """Returns times and memory of whole processes, for jaxqkv also with earlier compiled programs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def run(side: str) -> tuple[float, int | None]:
            out = folder / side
            out.mkdir(exist_ok=True)
            claim_memory()
            return run_process(case.command(side, out), env, folder / "log")

        order = ("jaxqkv cold", *sides[1:])
        runs: dict[str, list[tuple[float, int | None]]] = {side: [run(side)] for side in order}
        spent = [run[0] for each in runs.values() for run in each]
        rounds = times(count - 1, budget, spent)
        if rounds or sum(spent) <= budget:  # otherwise compiling is a small part of it
            run("jaxqkv")  # compiles, and keeps the programs
            runs["jaxqkv"] = [run("jaxqkv")]
        for _ in range(rounds):
            for side in (*order, "jaxqkv"):
                runs[side].append(run(side))
        ours = folder / "jaxqkv cold"
        difference = {side: case.difference(ours, folder / side) for side in sides[1:]}
    cold = runs.pop("jaxqkv cold")
    runs.setdefault("jaxqkv", cold)
    seconds = {side: [each[0] for each in runs[side]] for side in sides}
    result = _summary(case.name, seconds, difference)
    result["cold seconds"] = {"jaxqkv": statistics.median(each[0] for each in cold)} | {
        side: result["median seconds"][side] for side in sides[1:]
    }
    memory = {side: max((each[1] for each in runs[side] if each[1]), default=None) for side in sides}
    return result | {"memory": memory}


def _summary(name: str, seconds: dict[str, list[float]], difference: dict[str, float | None]) -> dict[str, Any]:
    median = {side: statistics.median(each) for side, each in seconds.items()}
    return {
        "case": name,
        "runs": len(seconds["jaxqkv"]),
        "median seconds": median,
        "quartiles": {side: np.percentile(each, [25, 75]).tolist() for side, each in seconds.items()},
        "faster": {side: median[side] / median["jaxqkv"] for side in seconds if side != "jaxqkv"},
        "difference": difference,
    }


def array_difference(ours: np.ndarray, theirs: np.ndarray, name: str = "the result") -> float:
    """Returns the largest difference relative to our largest magnitude; infinite if only one side is NaN."""
    if ours.shape != theirs.shape:
        raise BenchmarkError(f"{name}: jaxqkv gives {list(ours.shape)}, the other side {list(theirs.shape)}")
    if not np.array_equal(np.isfinite(ours), np.isfinite(theirs)):
        return float("inf")
    there = np.isfinite(ours)
    scale = float(np.abs(ours[there]).max(initial=0)) or 1.0
    return float(np.abs(ours[there].astype(np.float64) - theirs[there]).max(initial=0)) / scale
