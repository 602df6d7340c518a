"""The null of statistics of heads: their values in freshly initialised checkpoints of the same config."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxqkv.checkpoints.checkpoint import Checkpoint
from jaxqkv.checkpoints.config import Config
from jaxqkv.checkpoints.fresh import FreshCheckpoint
from jaxqkv.errors import NotDrawable
from jaxqkv.runtime import console
from jaxqkv.runtime.caches import cache_folder, keep, recall
from jaxqkv.runtime.devices import precision
from jaxqkv.studies.significance import q_values
from jaxqkv.text.corpora import digest

# Raised when what is kept changes its form.
VERSION = 1

# Statistics of every head by name, of a checkpoint.
Statistics = Callable[[Checkpoint], Mapping[str, Float[np.ndarray, "layer head"]]]


def null_values(
    config: Config, count: int, compute: Statistics, **about: Any
) -> dict[str, Float[np.ndarray, "seed layer head"]]:
    """Returns statistics of freshly initialised checkpoints of a config, with the seeds 0 … count − 1.

    One checkpoint after another is computed, its weights made as they are used. The values are kept in the user's cache
    folder, and taken from there the next time; of more seeds than are kept, only the others are computed.

    Args:
      config: of the checkpoint that they are compared with.
      count: how many, from 1 up.
      compute: of a checkpoint, the statistics by name.
      about: all that decides the values besides the config, as JSON has it: name and version of the statistics, a
        digest of the tokens, dtype.

    Raises:
      NotDrawable: for a config that does not say how weights are initialised.
    """
    if config.initializer_range is None:
        raise NotDrawable(f"a fresh checkpoint cannot be made: {config.missing('initializer_range')}; or give --null 0")
    sizes = {"model_type": config.model_type, **dataclasses.asdict(config)}
    key = {"version": VERSION, "config": sizes, "precision": precision(), "about": about}
    path = cache_folder() / "nulls" / f"{digest(key)[:32]}.npz"
    kept = recall(path) or {}
    done = min(map(len, kept.values()), default=0)
    seeds = range(done, count)
    fresh = [
        compute(FreshCheckpoint(f"random:{config.model_type}", config, seed))
        for seed in console.bar(seeds, desc="fresh checkpoints", unit="checkpoint")
    ]
    if fresh:
        together = {name: np.stack([each[name] for each in fresh]) for name in fresh[0]}
        kept = {name: np.concatenate([*([kept[name]] if kept else []), each]) for name, each in together.items()}
        keep(path, "values of fresh checkpoints", kept)
    return {name: values[:count] for name, values in kept.items()}


def null_q(
    observed: Float[np.ndarray, "layer head"], null: Float[np.ndarray, "seed layer head"]
) -> Float[np.ndarray, "layer head"]:
    """Returns Benjamini and Hochberg's q-values, over layers and heads, of what is larger than in fresh checkpoints.

        p = (1 + #{null ≥ observed}) / (1 + number of null values)

    with the null values of all layers, heads and seeds. NaN where `observed` is NaN.
    """
    return q_values(null_p(observed, null))[0]


def null_p(
    observed: Float[np.ndarray, "layer head"], null: Float[np.ndarray, "seed layer head"]
) -> Float[np.ndarray, "layer head"]:
    """Returns the p-values that `null_q` is made of."""
    ordered = np.sort(null, axis=None)
    larger = ordered.size - np.searchsorted(ordered, observed, side="left")
    return np.where(np.isnan(observed), np.nan, (1 + larger) / (1 + ordered.size))
