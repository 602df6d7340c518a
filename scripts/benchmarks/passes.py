"""Forward passes: Q, K and V of every layer, their norms alone, or everything in a cache."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sides import Spec, Work, fastest, host, jax_work, on_torch, torch_work

# Most sentences whose Q, K and V are compared; those of a whole large batch are gigabytes to copy from the device.
COMPARED = 16
# Fields that a pass with a cache keeps of each layer, besides the logits.
CACHED = ("q", "k", "v", "pattern", "z", "attn_out", "mlp_out", "resid_post")


def forward(side: str, spec: Spec) -> Work:
    """Returns Q, K and V of every layer; with `norms` their lengths by token, where all of them would not fit.

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
        """Returns first, middle and last layer, `[layer, 3, batch, pos, …]`, 0 at pads; of a cache one long row."""
        array = as_array(value)
        if spec.get("cache"):
            return array
        real = mask if spec.get("norms") else mask[_some(batch), :, None]
        return np.where(real, array, 0)

    made = jax_work(run, compared) if side == "jaxqkv" else torch_work(run, spec, compared)
    return dataclasses.replace(made, settle=settle[0]) if settle else made


def _row(parts: dict[str, Any], logits: Any) -> np.ndarray:
    """Returns each part of a cache relative to its largest value, at first, middle and last layer, in one row."""
    chosen = [host(parts[name][layer]) for name in CACHED for layer in _ends(len(parts["q"]))]
    return np.concatenate([(x / np.abs(x).max()).ravel() for x in (*chosen, host(logits))])


def _ends(layers: int) -> list[int]:
    return sorted({0, layers // 2, layers - 1})


def _some(batch: int) -> np.ndarray:
    """Returns the numbers of the sentences that are compared, evenly spread over the batch."""
    return np.linspace(0, batch - 1, min(batch, COMPARED)).astype(int)


def _forward_jaxqkv(side: str, spec: Spec, ids: np.ndarray, mask: np.ndarray) -> Any:
    import jax.numpy as jnp

    import jaxqkv
    from jaxqkv.runtime import devices

    tokens = jaxqkv.Batch(ids=ids, mask=mask, token_types=np.zeros_like(ids))
    if spec.get("compiled programs"):
        devices.enable_compilation_cache()
    if spec.get("first use"):  # like a user, reads weights during the run
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
        rows = _some(len(ids))
        parts = [np.stack([np.asarray(x[layer][rows]) for layer in _ends(len(x))]) for x in (acts.q, acts.k, acts.v)]
        return np.stack([x.swapaxes(2, 3).reshape(*x.shape[:2], x.shape[3], -1) for x in parts], axis=1)

    return run, as_array


def _forward_torch(side: str, spec: Spec, ids: np.ndarray, mask: np.ndarray) -> Any:
    import importlib

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    baseline = importlib.import_module(f"baselines.{side}")
    put, *_ = on_torch(spec["device"])
    cache = spec.get("cache", False)
    model = (baseline.load_with_logits if cache else baseline.load)(spec["folder"]).to(spec["device"])
    if cache:
        arguments = (put(ids).long(), put(mask).long())
        return lambda: baseline.cached(model, *arguments), lambda x: _row(x, x["logits"])
    function = baseline.qkv_norms if spec.get("norms") else baseline.qkv
    arguments = (put(ids).long(), put(mask).long())

    def settle() -> None:
        """Chooses the attention that is faster here; a CPU's runs of a minute and more keep sdpa, the default."""

        def run(kind: str) -> None:
            model.set_attn_implementation(kind)
            function(model, *arguments)

        if side == "tuned" and (ids.size <= 4096 or spec["device"] != "cpu"):
            model.set_attn_implementation(fastest(("eager", "sdpa"), run, spec["device"]))

    def as_array(x: Any) -> np.ndarray:
        if spec.get("norms"):
            return host(x[_ends(len(x))])
        return np.stack([host(x[layer][:, _some(len(ids))]) for layer in _ends(len(x))])

    return lambda: function(model, *arguments), as_array, settle
