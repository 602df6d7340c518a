"""Times jaxqkv against PyTorch, side by side: `python scripts/benchmark.py --help`, or `jaxqkv bench`.

Two baselines (`baselines/`) get the same weights, texts, threads and float32: "notebook", as the
studies were published, and "tuned", as an expert in PyTorch would write it. Each side
runs in a process of its own, the runs of a case are interleaved, and medians are printed.
Results are compared too, so that a fast wrong answer shows.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks import processes, report
from benchmarks.kernels import KERNELS
from benchmarks.measuring import (
    SIDES,
    BenchmarkError,
    Repeated,
    Whole,
    Workers,
    environment,
    measure_repeated,
    measure_whole,
)
from benchmarks.sizes import FIRST_USES, FORWARDS, LARGE_KERNELS, LAST_FORWARDS, SWEEPS
from benchmarks.studies import STUDIES, inputs

import jaxqkv
from jaxqkv.architectures import REGISTRY, open_checkpoint
from jaxqkv.architectures.gpt2 import GPT2Config
from jaxqkv.checkpoints.folder import FolderCheckpoint, save_checkpoint
from jaxqkv.cli.parser import Parser
from jaxqkv.runtime.devices import cache_folder
from jaxqkv.runtime.files import make_writable, replacing, written
from jaxqkv.text.corpora import PYTHON_DOCS

DEVICES = ("cpu", "gpu", "tpu")
Case = Repeated | Whole


def checkpoint_folder(spec: str) -> Path:
    """Returns the folder that all sides read: a checkpoint's own, or random weights of its shapes, made once.

    Random checkpoints get the bundled tokenizer of their architecture.
    """
    found = open_checkpoint(spec)
    if isinstance(found, FolderCheckpoint):
        return found.folder
    folder = cache_folder() / "benchmark" / spec.removeprefix("random:")
    if not folder.exists():
        print(f"writing {found.spec} to {folder}", file=sys.stderr)
        part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        try:
            with ThreadPoolExecutor() as pool:
                tensors = dict(zip(found.shapes, pool.map(found.tensor, found.shapes), strict=True))
            save_checkpoint(part, found.config, tensors)
            del tensors
            demo = open_checkpoint("demo-gpt2" if isinstance(found.config, GPT2Config) else "demo-bert").folder
            for file in demo.glob("tokenizer*.json"):
                shutil.copy(file, part)
            part.rename(folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    return folder


def _short(spec: str) -> str:
    """Returns a checkpoint's name for a case: its own, or a folder's last part."""
    return Path(spec.removeprefix("random:")).name


def forward_name(spec: str, batch: int, pos: int, extra: dict[str, Any]) -> str:
    how = f"{' padded' * ('padded' in extra)}{', lengths only' * ('norms' in extra)}"
    how += f"{', logits and cache' * ('cache' in extra)}{', TF32' * ('tf32' in extra)}"
    return f"forward {_short(spec)}, {batch} × {pos}{how}"


def forward_case(spec: str, batch: int, pos: int, extra: dict[str, Any]) -> Repeated:
    """Returns the case of Q, K and V of every layer, or of logits and all in a cache, with weights in memory."""
    folder = checkpoint_folder(spec)
    config = REGISTRY.read(folder / "config.json")
    width, layers = config.n_embd, config.n_layer
    block = 2 * (4 * width**2 + 2 * width * config.n_inner) + 4 * pos * width
    # The last layer needs only the projections to Q, K and V.
    flops = batch * pos * ((layers - 1) * block + 2 * 3 * width**2)
    weights = (layers - 1) * (4 * width**2 + 2 * width * config.n_inner) + 3 * width**2
    outputs = 3 * layers * batch * pos * (1 if extra.get("norms") else width)
    if extra.get("cache"):
        flops = batch * pos * (layers * block + 2 * width * config.vocab_size)
        weights = layers * (4 * width**2 + 2 * width * config.n_inner) + width * config.vocab_size
        outputs = batch * pos * (layers * (7 * width + config.n_head * pos) + config.vocab_size)
    return Repeated(
        forward_name(spec, batch, pos, extra),
        {"kind": "forward", "folder": str(folder), "batch": batch, "pos": pos} | extra,
        flops=flops,
        moved=4 * (weights + outputs),
    )


def sweep_name(spec: str, pos: int) -> str:
    return f"sweep of heads {_short(spec)}, 1 × {pos}"


def sweep_case(spec: str, pos: int) -> Repeated:
    """Returns the case of a logit difference with each head silenced, with weights in memory."""
    spec_of = {"kind": "sweep", "folder": str(checkpoint_folder(spec)), "pos": pos}
    return Repeated(sweep_name(spec, pos), spec_of)


def kernel_case(name: str, small: bool) -> Repeated:
    return Repeated(f"kernel {name}", {"kind": "kernel", "kernel": name, "small": small})


def cases(options: argparse.Namespace, device: str, scratch: Path) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Returns names and functions that make the cases; checkpoints are written only for chosen ones."""
    size = _size(options)
    forwards: Sequence[Any] = FORWARDS[size]
    last: Sequence[Any] = LAST_FORWARDS.get(size, ())
    sweeps: Sequence[Any] = SWEEPS[size]
    studies: dict[str, Sequence[str]] = {name: case.models(size) for name, case in STUDIES.items()}
    first_uses = FIRST_USES.get(size, ())
    if options.model:
        configs = {spec: open_checkpoint(spec).config for spec in options.model}
        causal = [spec for spec in options.model if isinstance(configs[spec], GPT2Config)]
        others = [spec for spec in options.model if spec not in causal]
        shapes = [(spec, min(512, configs[spec].n_positions)) for spec in options.model]
        forwards = [(spec, batch, min(pos, most), {}) for spec, most in shapes for batch, pos in ((1, 115), (8, most))]
        first_uses = tuple(options.model)
        sweeps = [(spec, min(24, configs[spec].n_positions)) for spec in causal]
        kinds = {name: others if "bert" in case.demo[0] else causal for name, case in STUDIES.items()}
        studies = {name: kinds[name] if name == "qkv-weights" else kinds[name][:1] for name in STUDIES}
    elif size == "full" and device != "cpu":
        forwards, last = [*forwards, *FORWARDS["large"]], LAST_FORWARDS["large"]

    if size != "large":
        yield "import", processes.import_case
    for spec in first_uses:
        pos = 31 if size == "demo" else 115
        name = f"first use, {_short(spec)}, 1 × {pos}"

        def first_use(spec: str = spec, pos: int = pos, name: str = name) -> Case:
            return processes.first_use_case(name, checkpoint_folder(spec), 1, pos, device)

        yield name, first_use
    for one in forwards:
        yield forward_name(*one), lambda one=one: forward_case(*one)
    for spec, pos in sweeps:
        yield sweep_name(spec, pos), lambda spec=spec, pos=pos: sweep_case(spec, pos)
    for kernel in LARGE_KERNELS if size == "large" else KERNELS:
        yield f"kernel {kernel}", lambda kernel=kernel: kernel_case(kernel, small=options.demo)
    for one in last:
        yield forward_name(*one), lambda one=one: forward_case(*one)
    for draw in (False, True) if size == "full" else (False,):
        for study, specs in studies.items():
            if not specs or (draw and not STUDIES[study].drawn):
                continue

            def study_case(study: str = study, specs: Sequence[str] = specs, draw: bool = draw) -> Case:
                words, job = inputs(study, scratch, options.demo, options.corpus)
                job |= {"device": {"gpu": "cuda"}.get(device, "cpu")}
                return processes.study_case(study, [checkpoint_folder(spec) for spec in specs], draw, words, job)

            yield f"{study}, {'with pictures' if draw else 'arrays'}", study_case


def _size(options: argparse.Namespace) -> str:
    return next((size for size in ("demo", "quick", "large") if getattr(options, size)), "full")


def about(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Returns settings, machine and versions for `benchmark.json`."""
    import jax

    first = jax.devices()[0]
    return {
        "size": _size(options),
        "models": options.model,
        "corpus": options.corpus or [PYTHON_DOCS],
        "device": f"{first.platform}: {first.device_kind}" if first.platform == device else device,
    } | about_machine()


def about_machine() -> dict[str, Any]:
    """Returns processor, memory, system and versions."""
    names = [
        name
        for name in ("jax", "jaxlib", "flax", "numpy", "torch", "transformers")
        if importlib.util.find_spec(name) is not None
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9 if hasattr(os, "sysconf") else None
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory GB": memory,
        "system": platform.platform(),
        "versions": {"jaxqkv": jaxqkv.__version__} | {name: importlib.metadata.version(name) for name in names},
    }


def _processor() -> str:
    """Returns the processor's name on Linux, and elsewhere the architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="jaxqkv bench", description=__doc__.splitlines()[0])
    top.add_argument("--cases", nargs="+", metavar="WORD", help="run only cases whose names contain one of these words")
    top.add_argument("--list", action="store_true", help="print the names of the cases")
    sizes = top.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="run the shorter cases once each, in under three minutes")
    sizes.add_argument(
        "--large", action="store_true", help="run batches that fill an accelerator, the largest model last"
    )
    sizes.add_argument("--demo", action="store_true", help="use small arrays and the bundled checkpoints")
    sizes.add_argument("--model", nargs="+", metavar="SPEC", help="checkpoints (hub ids, folders) for all cases")
    top.add_argument("--corpus", nargs="+", metavar="SPEC", help="corpora of token-frequency (default python-docs)")
    top.add_argument("--device", choices=DEVICES, help="compute on this device on both sides (default JAX's own)")
    top.add_argument(
        "--baselines", nargs="+", choices=SIDES[1:], default=SIDES[1:], metavar="SIDE",
        help="compare with these baselines: tuned, notebook or both (default both)",
    )  # fmt: skip
    top.add_argument(
        "--together", type=int, default=1, metavar="N",
        help="load the processes of N cases at the same time, and then time one after another (default 1)",
    )  # fmt: skip
    top.add_argument("--repeat", type=int, metavar="N", help="most runs of each side (default 7; 1 with --quick)")
    top.add_argument(
        "--seconds", type=float, default=180, metavar="S", help="time each case for about S seconds (default 180)"
    )
    top.add_argument(
        "--out", type=Path, default=Path("benchmark"), metavar="FOLDER", help="folder to write to (default benchmark)"
    )
    top.add_argument("--add", action="store_true", help="keep earlier results of other cases from this machine")
    top.add_argument("--publish", action="store_true", help="write the numbers to scripts/README.md too")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    absent = [name for name in ("torch", "transformers", "sklearn") if importlib.util.find_spec(name) is None]
    if absent and not options.list:
        print(f"jaxqkv: error: {', '.join(absent)} missing; pip install -e '.[torch]'", file=sys.stderr)
        return 2
    try:
        return _run(options)
    except (BenchmarkError, jaxqkv.JaxqkvError, OSError, ValueError) as error:
        print(f"jaxqkv: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"jaxqkv: interrupted; what was measured is in {options.out}, --add goes on", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    device = options.device or _default_device()
    wanted = ("full",) if device == "cpu" else ("full", "large")
    if options.publish and (options.model or options.corpus or _size(options) not in wanted):
        raise BenchmarkError(
            "--publish is for the full benchmark, and on an accelerator also for --large, without --model and --corpus"
        )
    if options.together < 1:
        raise BenchmarkError("--together needs a number of cases of at least 1")
    sides = tuple(side for side in SIDES if side == "jaxqkv" or side in options.baselines)
    env = environment(device, cache_folder() / "benchmark")
    repeat = options.repeat or (1 if options.quick else 7)
    product = 256 if options.demo else 3000 if device == "cpu" else 8192
    start = functools.partial(Workers, env=env, device=device, product=product, sides=sides)
    with tempfile.TemporaryDirectory() as scratch:
        everything = dict(cases(options, device, Path(scratch)))
        order = list(everything)
        chosen = [name for name in order if not options.cases or any(word in name for word in options.cases)]
        if not chosen:
            raise BenchmarkError("no case has that in its name; --list names them")
        if options.list:
            print("\n".join(chosen))
            return 0
        with written(options.out, "; choose another folder with --out"):
            make_writable(options.out)
        measured = about(options, device)
        measured["cases"] = _kept(options.out, measured, order) if options.add else []
        failed = []
        for case, workers in _started([everything[name] for name in chosen], options.together, start):
            try:
                if isinstance(case, Whole):
                    result = measure_whole(case, env, repeat, options.seconds, sides)
                else:
                    result = measure_repeated(case, workers, repeat, options.seconds, product)
            except BenchmarkError as error:  # the other cases may well work
                print(f"jaxqkv: error: {case.name}: {error}", file=sys.stderr, flush=True)
                failed.append(case.name)
                continue
            others = [each for each in measured["cases"] if each["case"] != result["case"]]
            measured["cases"] = sorted([*others, result], key=lambda each: order.index(each["case"]))
            print(report.table([result]).splitlines()[-1], flush=True)
            with replacing(options.out / "benchmark.json") as file:  # an interruption keeps the results so far
                file.write(json.dumps(measured, indent=1).encode())
    if not measured["cases"]:
        return 2
    report.chart(measured["cases"], options.out / "benchmark.png")
    print(f"\n{report.table(measured['cases'])}\n\nsee {options.out}")
    if failed:
        raise BenchmarkError(f"not measured: {'; '.join(failed)}")
    if options.publish:
        report.publish(options.out / "benchmark.json")
    return 0


def _started(
    made: Sequence[Callable[[], Case]], together: int, start: Callable[[Repeated], Workers]
) -> Iterator[tuple[Any, Any]]:
    """Yields each case with its processes, which are started for several at a time and end whatever happens."""
    for begin in range(0, len(made), together):
        with contextlib.ExitStack() as stack:
            group: list[tuple[Case, Workers | None]] = []
            for make in made[begin : begin + together]:  # processes load while the next case's checkpoint is written
                case = make()
                group.append((case, None if isinstance(case, Whole) else stack.enter_context(start(case))))
            for _, workers in group:  # all have loaded before the first is timed
                for worker in (workers or {}).values():
                    worker.wait()
            yield from group


def _kept(folder: Path, now: dict[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the cases of an earlier run with the same machine and versions."""
    path = folder / "benchmark.json"
    if not path.exists():
        return []
    before = json.loads(path.read_text())
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise BenchmarkError(f"{path} was measured with another {changed[0]}; leave --add out, or give another --out")
    return [each for each in before["cases"] if each["case"] in names]


def _default_device() -> str:
    import jax

    return jax.default_backend()


if __name__ == "__main__":
    sys.exit(main())
