"""Times jaxqkv against the PyTorch path, side by side in one process: `python scripts/benchmark.py --help`.

Two baselines, `torch_notebook.py` and `torch_tuned.py`, get the same weights, the same arrays, the
same threads and float32. The runs of a case are interleaved; what is printed are medians. Results
are compared too, so that a fast wrong answer shows.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxqkv
from jaxqkv import kernels
from jaxqkv.checkpoint import open_checkpoint, save_checkpoint
from jaxqkv.devices import cache_folder, jit
from jaxqkv.figures.panels import Table
from jaxqkv.files import replacing

try:
    import torch
    import torch_notebook
    import torch_tuned
except ImportError as error:
    sys.exit(f"benchmark: needs {error.name}; pip install -e '.[torch]' brings what it compares with")

SIDES = ("jaxqkv", "tuned", "notebook")


@dataclasses.dataclass
class Case:
    """One comparison.

    Attributes:
      name: on the command line and in the table.
      sides: a function for each side.
      compared: makes what a side returns an array to compare; all of one shape.
      flops: of the products that the result needs, if they are counted.
    """

    name: str
    sides: dict[str, Callable[[], Any]]
    compared: Callable[[Any], np.ndarray] = np.asarray
    flops: float | None = None


def forward_case(name: str, spec: str, batch: int, pos: int, padded: bool = False) -> Case:
    """Q, K and V of every layer, of weights that are in memory."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = _written(spec)
    model = jaxqkv.load(folder, stream=False)
    config = model.config
    kind = transformers.GPT2LMHeadModel if config.causal else transformers.BertForMaskedLM
    peer = kind.from_pretrained(folder).eval()
    generator = np.random.default_rng(0)
    ids = generator.integers(0, config.vocab_size, (batch, pos)).astype(np.int32)
    lengths = generator.integers(pos // 2, pos + 1, batch) if padded else np.full(batch, pos)
    mask = np.arange(pos)[None] < lengths[:, None]
    tokens = jaxqkv.tokens.Batch(ids=ids, mask=mask, token_types=np.zeros_like(ids))
    params = model.params()
    torch_arguments = (peer, torch.tensor(ids, dtype=torch.long), torch.tensor(mask).long())
    real = mask[None, None, :, :, None]

    def ours() -> Any:
        acts = jaxqkv.forward(params, tokens, config, capture={"q", "k", "v"})
        return jax.block_until_ready((acts.q, acts.k, acts.v))

    def compared(qkv: Any) -> np.ndarray:
        """As `[layer, 3, batch, pos, embed]`, with nothing at pads."""
        if isinstance(qkv, tuple):
            merged = [np.asarray(x).swapaxes(2, 3).reshape(*x.shape[:2], pos, -1) for x in qkv]
            qkv = np.stack(merged, axis=1)
        return np.where(real, np.asarray(qkv), 0)

    sides = {
        "jaxqkv": ours,
        "tuned": lambda: torch_tuned.qkv(*torch_arguments),
        "notebook": lambda: torch_notebook.qkv(*torch_arguments),
    }
    width, layers = config.n_embd, config.n_layer
    block = 2 * (4 * width**2 + 2 * width * config.n_inner) + 4 * pos * width
    # Of the last layer only the projections to Q, K and V are needed.
    flops = batch * pos * ((layers - 1) * block + 2 * 3 * width**2)
    return Case(name, sides, compared, flops)


def _written(spec: str) -> Path:
    """Random weights at the real shape as a folder that both sides read, made once and whole."""
    folder = cache_folder() / "benchmark" / spec
    if not folder.exists():
        print(f"writing random:{spec} to {folder}", file=sys.stderr)
        checkpoint = open_checkpoint(f"random:{spec}")
        part = folder.with_name(f".{spec}.{os.getpid()}.part")
        save_checkpoint(part, checkpoint.config, {key: checkpoint.tensor(key) for key in checkpoint.shapes})
        part.rename(folder)
    return folder


def kernel_cases(small: bool) -> list[Case]:
    """The kernels of the studies on random arrays of GPT-2's shapes, or on small ones."""
    generator = np.random.default_rng(0)
    n_head, pos, head_dim, width = (3, 29, 8, 24) if small else (16, 115, 64, 768)
    heads_of_width = 3 if small else 12

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * generator.normal(size=shape)).astype(np.float32)

    q, k, w = normal(n_head, pos, head_dim), normal(n_head, pos, head_dim), normal(width, width, scale=0.1)
    wide, samples = normal(width, 3 * width, scale=0.1), normal(54, 3 * width)
    layers, length, bins = (2, 31, 8) if small else (24, 512, 40)
    frequency = generator.normal(-8, 2, length)
    sums, scores = frequency[:, None] + frequency[None, :], normal(layers, length, length)
    bin_edges = kernels.percentile_edges(sums, bins)
    score_edges, unit_edges, cosine_edges = (
        np.linspace(-20, 20, 101),
        np.linspace(0, 1, 91),
        np.linspace(-0.4, 0.4, 101),
    )
    correlation_edges = np.linspace(-1, 1, 101)
    mask = np.ones((1, pos), bool)

    @jit
    def last_token(q: Any, k: Any) -> Any:
        samples = kernels.last_token_scores(q[None], k[None], mask)
        return jnp.stack([kernels.density(each.values, score_edges, each.where) for each in samples])

    @jit
    def causal(q: Any, k: Any) -> Any:
        visible = jaxqkv.attention.visible_keys(mask, causal=True)[:, None]
        pattern = jaxqkv.attention.attention_pattern(jaxqkv.attention.scaled_scores(q[None], k[None]), visible)
        samples = kernels.causal_samples(pattern, mask)
        return jnp.stack([kernels.density(each.values, unit_edges, each.where) for each in samples])

    @jit
    def binned(scores: Any, index: Any) -> Any:
        def one(layer: Any) -> Any:
            return jnp.stack(kernels.binned_moments(layer.ravel(), index, n_bin=bins)[1:])

        return jax.lax.map(one, scores)

    @jit
    def distance(w: Any) -> Any:
        shape = kernels.distribution_shape(w)
        return kernels.ks_normal(w, shape.mean, shape.std)[None]

    pairs = jit(lambda w: kernels.head_pair_densities(w, heads_of_width, cosine_edges)[0])
    groups = jit(lambda x: kernels.group_densities(x, correlation_edges, centred=True))
    moments = jit(lambda w: jnp.stack(kernels.column_cosine_moments(w)))
    shares = jit(lambda w: kernels.principal_components(w)[0])

    def index() -> np.ndarray:
        return kernels.bin_index(sums, bin_edges).ravel()

    def case(name: str, peer: str, ours: Callable[..., Any], ours_on: Sequence[Any], peer_on: Sequence[Any]) -> Case:
        on_device = [jnp.asarray(x) if isinstance(x, np.ndarray) else x for x in ours_on]
        tensors = [torch.tensor(x) if isinstance(x, np.ndarray) and x.ndim > 1 else x for x in peer_on]
        sides = {
            "jaxqkv": lambda: jax.block_until_ready(ours(*(x() if callable(x) else x for x in on_device))),
            "tuned": lambda: getattr(torch_tuned, peer)(*tensors),
            "notebook": lambda: getattr(torch_notebook, peer)(*tensors),
        }
        return Case(name, sides)

    return [
        case("last-token scores", "last_token_densities", last_token, (q, k), (q, k, score_edges)),
        case("causal samples", "causal_densities", causal, (q, k), (q, k, unit_edges)),
        case("head pairs", "head_pair_densities", pairs, (w,), (w, heads_of_width, cosine_edges)),
        case("column cosines", "column_cosine_moments", moments, (w,), (w,)),
        case("groups of dimensions", "group_densities", groups, (samples,), (samples, correlation_edges)),
        case("binned scores", "binned_moments", binned, (scores, index), (sums, scores, bin_edges)),
        case("principal components", "principal_components", shares, (wide,), (wide,)),
        case("distance from normal", "ks_normal", distance, (wide,), (wide,)),
    ]


def peak(repeat: int, size: int) -> float:
    """What the machine's float32 matrix products reach through XLA, in FLOP/s."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(size, size)).astype(np.float32))
    product = jit(jnp.dot)
    return 2 * size**3 / min(_times({"product": lambda: jax.block_until_ready(product(x, x))}, repeat)["product"])


def _times(sides: dict[str, Callable[[], Any]], repeat: int) -> dict[str, list[float]]:
    """Seconds of each side's runs, interleaved; the first, which compiles and warms up, is not among them."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeat):
        for side, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[side].append(time.perf_counter() - start)
    return seconds


def measure(case: Case, repeat: int, top: float) -> dict[str, Any]:
    """Medians, quartiles, ratios and differences of one case."""
    ours = case.compared(case.sides["jaxqkv"]())
    scale = float(np.abs(ours).max()) or 1.0
    difference = {}
    for side in SIDES[1:]:
        peer = case.compared(case.sides[side]())
        if peer.shape != ours.shape:
            sys.exit(f"benchmark: {case.name}: jaxqkv gives {ours.shape}, {side} {peer.shape}")
        difference[side] = float(np.abs(ours - peer).max()) / scale
    seconds = _times(case.sides, repeat)
    median = {side: statistics.median(each) for side, each in seconds.items()}
    result = {
        "case": case.name,
        "median seconds": median,
        "quartiles": {side: np.percentile(each, [25, 75]).tolist() for side, each in seconds.items()},
        "faster": {side: median[side] / median["jaxqkv"] for side in SIDES[1:]},
        "difference": difference,
    }
    if case.flops:
        result |= {"GFLOP/s": case.flops / median["jaxqkv"] / 1e9, "of peak": case.flops / median["jaxqkv"] / top}
    return result


def table(results: Sequence[dict[str, Any]]) -> Table:
    """The results for a terminal."""
    rows = []
    for each in results:
        median, faster, difference = each["median seconds"], each["faster"], each["difference"]
        rows.append(
            (
                each["case"],
                *(f"{1e3 * median[side]:,.1f}" for side in SIDES),
                *(f"{faster[side]:.2f}" for side in SIDES[1:]),
                f"{max(difference.values()):.0e}",
                f"{each['of peak']:.0%}" if "of peak" in each else "",
            )
        )
    heading = ("case", "jaxqkv ms", "tuned ms", "notebook ms", "× tuned", "× notebook", "difference", "of peak")
    return Table(heading=heading, rows=rows)


def chart(results: Sequence[dict[str, Any]], path: Path) -> None:
    """How many times faster jaxqkv is than each baseline, on a logarithmic scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.45 * len(results)), layout="constrained")
    ax = figure.add_subplot()
    places = np.arange(len(results))
    for shift, side, color in ((-0.2, "notebook", "#4a78c9"), (0.2, "tuned", "#e08a1e")):
        ax.barh(places + shift, [each["faster"][side] for each in results], 0.38, label=f"than {side}", color=color)
    ax.axvline(1, color="0.3", linewidth=0.8)
    ax.set(yticks=places, yticklabels=[each["case"] for each in results], xscale="log", xlabel="times faster")
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="best")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=150)


def environment() -> dict[str, Any]:
    """The machine and the versions, for `benchmark.json`."""
    names = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers")
    device = jax.devices()[0]
    return {
        "device": f"{device.platform}: {device.device_kind}",
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "versions": {"jaxqkv": jaxqkv.__version__} | {name: version(name) for name in names},
    }


# Checkpoint's shape, sentences, tokens of each, and whether they are padded.
FORWARDS = {
    "forward gpt2, 54 sentences": ("gpt2", 54, 24, True),
    "forward gpt2-medium, 115 tokens": ("gpt2-medium", 1, 115),
    "forward gpt2-medium, 8 × 512": ("gpt2-medium", 8, 512),
    "forward bert-large, 8 × 512": ("bert-large-uncased", 8, 512),
}
QUICK_FORWARDS = {
    "forward demo-gpt2, 5 sentences": ("demo-gpt2", 5, 31, True),
    "forward demo-bert, 5 sentences": ("demo-bert", 5, 31, True),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", metavar="WORD", help="only cases whose names contain one of these")
    parser.add_argument("--quick", action="store_true", help="small arrays and small models: seconds")
    parser.add_argument("--repeat", type=int, default=7, help="runs of each side (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmark"), help="folder (default %(default)s)")
    options = parser.parse_args(arguments)

    def chosen(name: str) -> bool:
        return not options.cases or any(word in name for word in options.cases)

    makers = [lambda case=case: case for case in kernel_cases(options.quick) if chosen(case.name)]
    forwards = QUICK_FORWARDS if options.quick else FORWARDS
    makers += [lambda n=n, a=a: forward_case(n, *a) for n, a in forwards.items() if chosen(n)]
    if not makers:
        parser.error("no case has that in its name")
    options.out.mkdir(parents=True, exist_ok=True)
    top = peak(options.repeat, 256 if options.quick else 3000)
    results = []
    for make in makers:
        results.append(measure(make(), options.repeat, top))
        print(table(results[-1:]).text().splitlines()[-1], flush=True)
    about = environment() | {"peak GFLOP/s": top / 1e9, "repeat": options.repeat, "quick": options.quick}
    with replacing(options.out / "benchmark.json") as file:
        file.write(json.dumps(about | {"cases": results}, indent=2).encode())
    chart(results, options.out / "benchmark.png")
    print(f"\n{table(results).text()}\n\npeak of products: {top / 1e9:.0f} GFLOP/s; see {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
