"""What is timed inside a process: forward passes, kernels, and the matrix product that says what the machine can do.

A case is described by a dict that goes to each side's process; there `work` makes it runnable. The
sides import what they need and nothing of each other's: jaxqkv's process has no PyTorch in memory.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Spec = dict[str, Any]
# What a pass with a cache keeps of each layer, besides the logits.
CACHED = ("q", "k", "v", "pattern", "z", "attn_out", "mlp_out", "resid_post")


@dataclasses.dataclass
class Work:
    """One side of a case.

    Attributes:
      run: computes the result, and returns when it is there.
      result: makes it an array to compare with the other sides'.
      device_peak: bytes of the accelerator's memory that were taken at most, if it has its own.
      settle: called once after the first run, to choose what is faster.
    """

    run: Callable[[], Any]
    result: Callable[[Any], np.ndarray] = np.asarray
    device_peak: Callable[[], int | None] = lambda: None
    settle: Callable[[], None] = lambda: None


def work(side: str, spec: Spec) -> Work:
    """A case as `side` runs it: `jaxqkv`, `tuned` or `notebook`."""
    make = {"forward": _forward, "kernel": _kernel, "product": _product}[spec["kind"]]
    return make(side, spec)


# --- devices ---


def _on_torch(device: str) -> tuple[Callable[[Any], Any], Callable[[], None], Callable[[], int | None]]:
    """Arrays to the device; waiting for it; its memory's peak."""
    import torch

    def put(values: Any) -> Any:
        return torch.as_tensor(values).to(device)

    if device == "cpu":
        return put, lambda: None, lambda: None
    return put, torch.cuda.synchronize, torch.cuda.max_memory_allocated


def _jax_peak() -> int | None:
    import jax

    statistics = jax.devices()[0].memory_stats()
    return statistics and statistics.get("peak_bytes_in_use")


def _jax_work(run: Callable[[], Any], result: Callable[[Any], np.ndarray] = np.asarray) -> Work:
    import jax

    return Work(lambda: jax.block_until_ready(run()), result, _jax_peak)


def _torch_work(run: Callable[[], Any], spec: Spec, result: Callable[[Any], np.ndarray] = lambda x: _host(x)) -> Work:
    _, synchronise, device_peak = _on_torch(spec["device"])

    def synchronised() -> Any:
        value = run()
        synchronise()
        return value

    return Work(synchronised, result, device_peak)


def _host(x: Any) -> np.ndarray:
    return np.asarray(x if isinstance(x, np.ndarray) else x.cpu())


# --- the machine's peak ---


def _product(side: str, spec: Spec) -> Work:
    x = np.random.default_rng(0).normal(size=(spec["size"], spec["size"])).astype(np.float32)
    if side == "jaxqkv":
        import jax.numpy as jnp

        from jaxqkv.runtime.devices import jit

        product, on_device = jit(jnp.dot), jnp.asarray(x)
        return _jax_work(lambda: product(on_device, on_device))
    put, *_ = _on_torch(spec["device"])
    tensor = put(x)
    return _torch_work(lambda: tensor @ tensor, spec)


# --- forward passes ---


def _forward(side: str, spec: Spec) -> Work:
    """Q, K and V of every layer; or, with `norms`, their lengths by token, where all of them would not fit.

    With `cache`, logits and everything of every layer, from one pass.
    """
    import json

    config = json.loads((Path(spec["folder"]) / "config.json").read_text())
    generator = np.random.default_rng(0)
    batch, pos = spec["batch"], spec["pos"]
    ids = generator.integers(0, config["vocab_size"], (batch, pos)).astype(np.int32)
    lengths = generator.integers(pos // 2, pos + 1, batch) if spec.get("padded") else np.full(batch, pos)
    mask = np.arange(pos)[None] < lengths[:, None]
    build = _forward_jaxqkv if side == "jaxqkv" else _forward_torch
    run, as_array, *settle = build(side, spec, ids, mask)

    def compared(value: Any) -> np.ndarray:
        """First, middle and last layer, `[layer, 3, batch, pos, …]`, with nothing at pads; of a cache one long row."""
        array = as_array(value)
        if spec.get("cache"):
            return array
        real = mask if spec.get("norms") else mask[..., None]
        return np.where(real, array, 0)

    made = _jax_work(run, compared) if side == "jaxqkv" else _torch_work(run, spec, compared)
    return dataclasses.replace(made, settle=settle[0]) if settle else made


def _row(parts: dict[str, Any], logits: Any) -> np.ndarray:
    """Each part of a cache as a share of its largest value, at first, middle and last layer, in one row."""
    chosen = [_host(parts[name][layer]) for name in CACHED for layer in _ends(len(parts["q"]))]
    return np.concatenate([(x / np.abs(x).max()).ravel() for x in (*chosen, _host(logits))])


def _ends(layers: int) -> list[int]:
    return sorted({0, layers // 2, layers - 1})


def _forward_jaxqkv(side: str, spec: Spec, ids: np.ndarray, mask: np.ndarray) -> Any:
    import jax.numpy as jnp

    import jaxqkv
    from jaxqkv.runtime import devices

    tokens = jaxqkv.Batch(ids=ids, mask=mask, token_types=np.zeros_like(ids))
    if spec.get("compiled programs"):
        devices.enable_compilation_cache()
    if spec.get("first use"):  # as a user would, reading weights while it runs
        model = jaxqkv.load(spec["folder"])
        run = lambda: model.run(tokens, capture={"q", "k", "v"})  # noqa: E731
    elif spec.get("norms"):
        model = jaxqkv.load(spec["folder"], stream=False)
        params = model.params()

        def norms(attention: Any, mask: Any) -> Any:
            return jnp.stack(
                [jnp.sqrt((x**2).sum(axis=(1, 3))) for x in (attention.q, attention.k, attention.v)], axis=1
            )

        run = lambda: jaxqkv.forward(params, tokens, model.config, reduce=norms, memory=2 << 30)  # noqa: E731
        return run, lambda x: np.asarray(x)[_ends(x.shape[0])].swapaxes(1, 2)
    elif spec.get("cache"):
        model = jaxqkv.load(spec["folder"], stream=False)
        params = model.params()
        run = lambda: jaxqkv.forward(params, tokens, model.config, capture={*CACHED, "logits"})  # noqa: E731

        def row(acts: Any) -> np.ndarray:
            parts = {name: np.asarray(acts[name]) for name in CACHED}
            for name in ("q", "k", "v", "z"):  # as PyTorch has them, heads side by side
                x = parts[name].swapaxes(2, 3)
                parts[name] = x.reshape(*x.shape[:3], -1)
            return _row(parts, np.asarray(acts.logits))

        return run, row
    else:
        model = jaxqkv.load(spec["folder"], stream=False)
        params = model.params()
        run = lambda: jaxqkv.forward(params, tokens, model.config, capture={"q", "k", "v"})  # noqa: E731

    def as_array(acts: Any) -> np.ndarray:
        parts = [np.asarray(x[np.array(_ends(x.shape[0]))]) for x in (acts.q, acts.k, acts.v)]
        return np.stack([x.swapaxes(2, 3).reshape(*x.shape[:2], x.shape[3], -1) for x in parts], axis=1)

    return run, as_array


def _forward_torch(side: str, spec: Spec, ids: np.ndarray, mask: np.ndarray) -> Any:
    import importlib
    import time

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    baseline = importlib.import_module(f"baselines.{side}")
    put, synchronise, _ = _on_torch(spec["device"])
    cache = spec.get("cache", False)
    model = (baseline.load_with_logits if cache else baseline.load)(spec["folder"]).to(spec["device"])
    if cache:
        arguments = (put(ids).long(), put(mask).long())
        return lambda: baseline.cached(model, *arguments), lambda x: _row(x, x["logits"])
    function = baseline.qkv_norms if spec.get("norms") else baseline.qkv
    arguments = (put(ids).long(), put(mask).long())

    def settle() -> None:
        """Whichever attention is faster here; runs of a minute and more stay with sdpa, the default."""
        seconds = {}
        for kind in ("eager", "sdpa") if side == "tuned" and ids.size <= 4096 else ():
            model.set_attn_implementation(kind)
            start = time.perf_counter()
            function(model, *arguments)
            synchronise()
            seconds[kind] = time.perf_counter() - start
        if seconds:
            model.set_attn_implementation(min(seconds, key=seconds.__getitem__))

    return lambda: function(model, *arguments), lambda x: _host(x[_ends(len(x))]), settle


# --- kernels ---

# Case, and the function of both baselines.
KERNELS = {
    "last-token scores": "last_token_densities",
    "causal samples": "causal_densities",
    "head pairs": "head_pair_densities",
    "column cosines": "column_cosine_moments",
    "groups of dimensions": "group_densities",
    "binned scores": "binned_moments",
    "principal components": "principal_components",
    "distance from normal": "ks_normal",
    "neighbouring positions": "neighbour_correlations",
    "singular values": "spectrum",
    "permuted histograms": "permuted_divergences",
}


def kernel_arguments(name: str, small: bool) -> tuple[Any, ...]:
    """What the function gets: random arrays of GPT-2's shapes, or small ones, and settings."""
    generator = np.random.default_rng(0)
    n_head, pos, head_dim, width = (3, 29, 8, 24) if small else (16, 115, 64, 768)
    layers, length, bins = (2, 31, 8) if small else (24, 512, 40)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * generator.normal(size=shape)).astype(np.float32)

    if name in ("last-token scores", "causal samples"):
        edges = np.linspace(-20, 20, 101) if name == "last-token scores" else np.linspace(0, 1, 91)
        return normal(n_head, pos, head_dim), normal(n_head, pos, head_dim), edges
    if name == "head pairs":
        return normal(width, width, scale=0.1), 3 if small else 12, np.linspace(-0.4, 0.4, 101)
    if name == "groups of dimensions":
        return normal(54, 3 * width), np.linspace(-1, 1, 101)
    if name == "binned scores":
        frequency = generator.normal(-8, 2, length)
        sums = frequency[:, None] + frequency[None, :]
        return sums, normal(layers, length, length), np.percentile(sums, np.linspace(0, 100, bins + 1))
    if name in ("column cosines", "singular values"):
        return (normal(width, width, scale=0.1),)
    if name == "permuted histograms":
        permutations, layers, length, bins = (37, 2, 31, 8) if small else (1000, 36, 1024, 30)
        flags = np.arange(length) < 0.4 * length
        permuted = np.array([generator.permutation(flags) for _ in range(permutations)])
        return permuted.astype(np.float32), normal(layers, length), bins
    if name == "neighbouring positions":
        return (normal(4 * width // 3, width),)
    return (normal(width, 3 * width, scale=0.1),)


def _kernel(side: str, spec: Spec) -> Work:
    arguments = kernel_arguments(spec["kernel"], spec["small"])
    if side == "jaxqkv":
        return _jax_work(_jaxqkv_kernel(spec["kernel"], *arguments))
    import importlib

    put, *_ = _on_torch(spec["device"])
    function = getattr(importlib.import_module(f"baselines.{side}"), KERNELS[spec["kernel"]])
    on_device = [put(x) if isinstance(x, np.ndarray) and x.ndim > 1 else x for x in arguments]
    return _torch_work(lambda: function(*on_device), spec)


def _jaxqkv_kernel(name: str, *arguments: Any) -> Callable[[], Any]:
    """The package's kernel on arrays that are on the device."""
    import jax
    import jax.numpy as jnp

    from jaxqkv import kernels
    from jaxqkv.architectures import attention
    from jaxqkv.runtime.devices import jit

    first = jnp.asarray(arguments[0])
    if name in ("last-token scores", "causal samples"):
        k, edges = jnp.asarray(arguments[1]), arguments[2]
        mask = np.ones((1, first.shape[1]), bool)

        @jit
        def samples(q: Any, k: Any) -> Any:
            if name == "last-token scores":
                chosen = kernels.last_token_scores(q[None], k[None], mask)
            else:
                visible = attention.visible_keys(mask, causal=True)[:, None]
                pattern = attention.attention_pattern(attention.scaled_scores(q[None], k[None]), visible)
                chosen = kernels.causal_samples(pattern, mask)
            return jnp.stack([kernels.density(each.values, edges, each.where) for each in chosen])

        return lambda: samples(first, k)
    if name == "binned scores":
        sums, scores, edges = arguments
        on_device = jnp.asarray(scores)

        @jit
        def binned(scores: Any, index: Any) -> Any:
            moments = lambda layer: kernels.binned_moments(layer.ravel(), index, n_bin=len(edges) - 1)  # noqa: E731
            return jax.lax.map(lambda layer: jnp.stack(moments(layer)[1:]), scores)

        return lambda: binned(on_device, kernels.bin_index(sums, edges).ravel())

    if name == "permuted histograms":
        _, values, bins = arguments
        index = [kernels.bin_index(row, np.linspace(row.min(), row.max(), bins + 1)) for row in values]
        hot = jnp.asarray(np.stack(index)[..., None] == np.arange(bins), jnp.float32)

        @jit
        def divergences(flags: Any) -> Any:
            one = jnp.einsum("np,lpb->nlb", flags, hot)
            return jax.vmap(jax.vmap(kernels.jensen_shannon))(one, hot.sum(axis=1)[None] - one)

        return lambda: divergences(first)

    def shares_and_scores(w: Any) -> Any:
        shares, scores = kernels.principal_components(w)
        return jnp.concatenate([shares, scores.ravel() / jnp.abs(scores).max()])

    functions = {
        "head pairs": lambda w: kernels.head_pair_densities(w, arguments[2], n_head=arguments[1])[0],
        "column cosines": lambda w: jnp.stack(kernels.column_cosine_moments(w)),
        "groups of dimensions": lambda x: kernels.group_densities(x, arguments[1], centred=True),
        "principal components": shares_and_scores,
        "distance from normal": lambda w: kernels.ks_normal(w, w.mean(), w.std())[None],
        "neighbouring positions": kernels.neighbour_correlations,
        "singular values": lambda w: jnp.stack(kernels.spectrum(w)),
    }
    function = jit(functions[name])
    return lambda: function(first)
