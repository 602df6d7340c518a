"""How much attention moves beside how large its weights are: figure `norms`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxqkv.errors import NotDrawable
from jaxqkv.figures.displays import Display
from jaxqkv.figures.panels import Image, Line, Lines, Panel, extremes
from jaxqkv.kernels import weighted_attention
from jaxqkv.model.model import Model
from jaxqkv.runtime import console
from jaxqkv.runtime.devices import jit
from jaxqkv.studies.heads import STUDY
from jaxqkv.studies.heads.run import HeadsRun, reduction
from jaxqkv.studies.heads.types import map_of_heads
from jaxqkv.studies.opening import wide_weights
from jaxqkv.text.batches import Batch
from jaxqkv.typing import AnyArray

# Layers that are drawn, and the percentile of a map's values that its colours end at: a few are far larger.
DRAWN, LARGEST = 4, 98


class Norms(NamedTuple):
    """Weights of attention, and norms of what it moves with them.

    Attributes:
      weight, norm: mean over heads.
      first_weight, first_norm: share of the first token in both, mean over queries from 1 on.
    """

    weight: Float[np.ndarray, "layer query key"]
    norm: Float[np.ndarray, "layer query key"]
    first_weight: Float[np.ndarray, "layer head"]
    first_norm: Float[np.ndarray, "layer head"]


@jit
def _of_layer(
    pattern: Float[Array, "head query key"],
    v: Float[Array, "head key head_dim"],
    output: Float[AnyArray, "head head_dim embed"],
) -> tuple[Array, ...]:
    """Returns what `Norms` has, of one layer."""
    pattern = pattern.astype(jnp.float32)
    norm = weighted_attention(pattern, v, output)
    of_first = (each[:, 1:, 0] / each[:, 1:].sum(axis=-1) for each in (pattern, norm))
    return pattern.mean(axis=0), norm.mean(axis=0), *(share.mean(axis=1) for share in of_first)


def measure_norms(model: Model, batch: Batch) -> Norms:
    """Returns weights and norms of one text, with one layer's pattern in memory at a time.

    Raises:
      NotDrawable: for a text of one token.
    """
    if batch.ids.shape[1] < 2:
        raise NotDrawable(
            "what later tokens take from the first needs a text of 2 tokens or more; choose a longer one with --text"
        )
    weights, layers = wide_weights(model), model.layerwise(batch, {"pattern", "v"})
    rows = []
    for layer, attention in console.bar(layers, total=model.config.n_layer, desc="layers", unit="layer"):
        pattern, v = (getattr(attention, name)[0] for name in ("pattern", "v"))
        found = _of_layer(pattern, v, weights.W_O(layer, by_head=True))
        rows.append([np.asarray(each) for each in found])
    return Norms(*(np.stack(each) for each in zip(*rows, strict=True)))


@reduction
def norms(run: HeadsRun) -> Norms:
    """Returns weights and norms of the text."""
    return measure_norms(run.model, run.batch)


@STUDY.define(
    "norms",
    "what attention moves beside how large its weights are",
    "weight, norm [layer, query, key], first_weight, first_norm [layer, head]",
)
def figure_norms(run: HeadsRun, norms: Norms) -> Display:
    n_layer = run.config.n_layer
    layers = [run.options.layer] if run.options.layer is not None else _spread(n_layer)
    rows: list[Sequence[Panel]] = [
        [_map(values[layer], f"{name}, layer {layer}", unit) for layer in layers]
        for name, values, unit in (("Weight", norms.weight, "α"), ("Norm", norms.norm, "‖α v W_O‖"))
    ]
    largest = extremes(norms.first_weight, norms.first_norm)[1]
    ends = np.array([0, largest])
    points = [
        Line(x=norms.first_weight[layer], y=norms.first_norm[layer], marker="o", linestyle="", color=layer / n_layer)
        for layer in range(n_layer)
    ]
    against = Lines(
        lines=[*points, Line(x=ends, y=ends, linestyle="--", color="0.5")],
        xlabel="Share of the weights",
        ylabel="Share of the norms",
        title="First token",
        colorbar="Layer",
    )
    share: dict[str, Any] = {"vmin": 0, "vmax": largest, "colorbar": "Share"}
    rows.append([
        map_of_heads(norms.first_weight, title="First token, weights", **share),
        map_of_heads(norms.first_norm, title="First token, norms", **share),
        against,
    ])  # fmt: skip
    return Display(
        arrays=norms._asdict(),
        panels=rows,
        title=run.label,
        caption=f"Weights of attention α, and Euclidean norms of what they move, ‖α v W_O‖, mean over the heads of "
        f"{run.name}, by query and key of {run.text!r}; colours to the {LARGEST}th percentile. Below, the share of the "
        "first token in both in every head, mean over queries from 1 on: under the diagonal, a large weight moves "
        "little. A head that writes nothing has no share of the norms (NaN).",
        size=(3.6 * max(len(layers), 3), 10.5),
    )


def _spread(n_layer: int) -> list[int]:
    """Returns some layers from the first to the last."""
    return sorted({round(place) for place in np.linspace(0, n_layer - 1, DRAWN)})


def _map(values: Float[np.ndarray, "query key"], title: str, unit: str) -> Image:
    seen = values[np.isfinite(values) & (values != 0)]
    largest = float(np.percentile(seen, LARGEST)) if seen.size else 1.0
    about: dict[str, Any] = {"xlabel": "Key", "ylabel": "Query", "integer_x": True, "integer_y": True}
    return Image(values=values, vmin=0, vmax=largest, title=title, colorbar=unit, **about)
