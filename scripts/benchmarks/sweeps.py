"""Sweeps: the logit difference with each head of a model silenced alone."""

import importlib
import json
from pathlib import Path

import numpy as np

from benchmarks.sides import Spec, Work, fastest, host, jax_work, on_torch, torch_work


def sweep(side: str, spec: Spec) -> Work:
    """Returns a sweep over all heads, `[layer, head]`, of one text of random tokens."""
    config = json.loads((Path(spec["folder"]) / "config.json").read_text())
    generator = np.random.default_rng(0)
    ids = generator.integers(0, config["vocab_size"], (1, spec["pos"])).astype(np.int32)
    answers = [int(each) for each in generator.choice(config["vocab_size"], 2, replace=False)]
    return _jaxqkv(spec, ids, answers) if side == "jaxqkv" else _torch(side, spec, ids, answers)


def _about_mean(scores: np.ndarray) -> np.ndarray:
    """Returns scores about their mean, since a head changes little of the score and the change is compared."""
    scores = np.asarray(scores, np.float64)
    return scores - scores.mean()


def _jaxqkv(spec: Spec, ids: np.ndarray, answers: list[int]) -> Work:
    import jaxqkv
    from jaxqkv import edits, metrics

    model = jaxqkv.load(spec["folder"], stream=False)
    model.params(copy=False)  # read now
    metric = metrics.logit_difference(*answers)
    return jax_work(lambda: model.sweep(ids, edits.zero, metric, progress=False), _about_mean)


def _torch(side: str, spec: Spec, ids: np.ndarray, answers: list[int]) -> Work:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    baseline = importlib.import_module(f"baselines.{side}")
    put, *_ = on_torch(spec["device"])
    model = baseline.load_with_logits(spec["folder"]).to(spec["device"])
    tokens = put(ids).long()
    if side == "notebook":
        return torch_work(lambda: baseline.head_sweep(model, tokens, answers), spec, lambda x: _about_mean(host(x)))
    size = {"branches": 16}

    def settle() -> None:
        """Chooses the microbatch that is fastest here."""
        sizes = (8, 16, 32, 64) if spec["device"] == "cpu" else (32, 128, 512)
        run = lambda branches: baseline.head_sweep(model, tokens, answers, branches)  # noqa: E731
        size["branches"] = fastest(sizes, run, spec["device"])

    work = torch_work(
        lambda: baseline.head_sweep(model, tokens, answers, size["branches"]), spec, lambda x: _about_mean(host(x))
    )
    work.settle = settle
    return work
