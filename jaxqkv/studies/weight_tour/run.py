"""The run of the study `weight-tour`: the checkpoints, and one pass over the layers of each."""

import functools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxqkv.checkpoints.config import Config
from jaxqkv.figures import style
from jaxqkv.figures.panels import Line, plain
from jaxqkv.kernels import distribution_shape, ks_normal, principal_components, spectrum
from jaxqkv.runtime import console
from jaxqkv.runtime.devices import compile_early, jit
from jaxqkv.studies.comparison import Compared, beside, reduce_layers, short_names
from jaxqkv.studies.layers import pick_layer
from jaxqkv.studies.opening import open_compared, open_weights
from jaxqkv.studies.study import Run
from jaxqkv.studies.weight_tour import STUDY, WeightTourOptions

LAYER = 0
ORIGINAL_WIDTH = 768
ENDS = 3  # layers at either end of the model that are shown

Wide = Float[Array, "embed three_embed"]
# A reduction by name of the checkpoint: an array `[layer, …]`, or a mapping or a tuple of several.
ByCheckpoint = Mapping[str, Any]


def _statistics(wide: Wide) -> dict[str, Array]:
    return {"mean": wide.mean(), "std": wide.std(), "max": wide.max(), "min": wide.min()}


def _row_variance(wide: Wide) -> Float[Array, " embed"]:
    return wide.var(axis=1)


def _signature(wide: Wide) -> dict[str, Float[Array, " qkv"]]:
    """Returns four statistics that tell trained from fresh weights, for each of W_Q, W_K and W_V."""

    def of_one(matrix: Float[Array, "embed inner"]) -> dict[str, Array]:
        shape = distribution_shape(matrix)
        rank, largest = spectrum(matrix)
        distance = ks_normal(matrix, shape.mean, shape.std)
        return {"ks": distance, "kurtosis": shape.kurtosis, "effective_rank": rank, "largest_singular_value": largest}

    return jax.lax.map(of_one, jnp.stack(jnp.split(wide, 3, axis=1)))


# Reductions that figures take: functions of a layer's wide matrix, for every layer or for those at the model's ends.
OF_EVERY_LAYER: dict[str, Callable[[Wide], Any]] = {
    "statistics": _statistics,
    "row_variance": _row_variance,
    "signature": _signature,
}
OF_ENDS: dict[str, Callable[[Wide], Any]] = {"components": principal_components}
REDUCTIONS = OF_EVERY_LAYER | OF_ENDS


@jit(static_argnames="names")
def _reduce(wide: Wide, *, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: REDUCTIONS[name](wide) for name in names}


@functools.cache
def _program(width: int, inner: int, names: tuple[str, ...]) -> Callable[[Wide], dict[str, Any]]:
    """Returns `_reduce` for some names, compiled once for all checkpoints of these widths."""
    return compile_early(_reduce, jax.ShapeDtypeStruct((width, 3 * inner), np.float32), names=names)


class Tour(Compared):
    """One checkpoint of the tour."""

    @property
    def config(self) -> Config:
        """Settings of the checkpoint."""
        return self.weights.config

    @property
    def label(self) -> str:
        """Name of the checkpoint, for a title."""
        return plain(self.name)

    @property
    def color(self) -> str:
        """Colour of its curves and points."""
        return style.CHECKPOINTS[self.order % len(style.CHECKPOINTS)]

    @property
    def ends(self) -> list[int]:
        """First and last layers."""
        layers = range(self.config.n_layer)
        return sorted({*layers[:ENDS], *layers[-ENDS:]})

    @property
    def where(self) -> str:
        """Layer that is drawn and checkpoint, for a title."""
        return f"layer {self.layer} of {self.label}"

    @functools.cached_property
    def positions(self) -> Float[np.ndarray, "pos embed"]:
        """Position embeddings."""
        return self.weights.positions

    @functools.cached_property
    def wide(self) -> Float[np.ndarray, "embed three_embed"]:
        """W_Q, W_K and W_V of the layer, side by side."""
        return self.weights.W_QKV(self.layer)

    def reduce(self, names: Collection[str], progress: Any) -> dict[str, Any]:
        """Makes one pass over the layers that are needed, with one layer's matrices in memory at a time.

        Returns:
          For each name, its arrays `[layer, …]`.
        """
        every, few = (tuple(sorted(set(names) & group.keys())) for group in (OF_EVERY_LAYER, OF_ENDS))
        groups = [(every, range(self.config.n_layer))] * bool(every) + [(few, self.ends)] * bool(few)
        widths = self.config.n_embd, self.config.attention_width
        programs = {chosen: _program(*widths, chosen) for chosen, _ in groups}

        def reduce(layer: int, wide: Wide) -> dict[str, Any]:
            return {k: v for names, layers in groups if layer in layers for k, v in programs[names](wide).items()}

        results = reduce_layers(
            self.weights, sorted({layer for _, layers in groups for layer in layers}), reduce, progress
        )
        kept = {name: [result[name] for result in results if name in result] for name in names}
        return {name: jax.tree.map(lambda *leaves: np.stack(leaves), *each) for name, each in kept.items()}


@STUDY.computation
class WeightTourRun(Run):
    """The checkpoint of the tour and those it is compared with."""

    def __init__(self, options: WeightTourOptions, folder: Path | None = None):
        (first, *more) = open_weights(options, STUDY)
        demo = [f"random:{STUDY.demo}"] if options.demo else []
        weights = [first, *more, *open_compared(options, demo)]
        # The first checkpoint must have the layer.
        layer, _ = pick_layer(options, LAYER, first.config.n_layer, first.checkpoint.name)
        names = short_names(weights)
        self.tours = [Tour(w, name, order, layer) for order, (w, name) in enumerate(zip(weights, names, strict=True))]
        self.first = self.tours[0]
        self.as_published = options.as_published
        self.seed = options.seed

    def describe(self) -> dict[str, Any]:
        """Returns this run's entries in the manifest."""
        return {
            "checkpoint": [tour.weights.checkpoint.identity() for tour in self.tours],
            "layer": self.first.layer,
            "as published": self.as_published,
        }

    def compute(self, names: Collection[str]) -> dict[str, ByCheckpoint]:
        """Reduces every checkpoint, layer by layer."""
        if not names:
            return {}
        every = not OF_EVERY_LAYER.keys().isdisjoint(names)
        total = sum(tour.config.n_layer if every else len(tour.ends) for tour in self.tours)
        with console.bar(total=total, desc="layers", unit="layer") as progress:
            reduced = {tour.name: tour.reduce(names, progress) for tour in self.tours}
        return {name: {tour: each[name] for tour, each in reduced.items()} for name in names}

    @property
    def names(self) -> str:
        """All checkpoints, for a caption."""
        return beside([tour.name for tour in self.tours])

    @property
    def at_layers(self) -> str:
        """Layers of the checkpoints that a figure of one layer shows, for a caption."""
        return ", ".join(f"layer {tour.layer} of {tour.name}" for tour in self.tours)

    def arrays(self, make: Callable[[Tour], dict[str, Any]]) -> dict[str, Any]:
        """Returns the arrays of all checkpoints; the names of all but the first's end with the checkpoint's name."""
        return {f"{name}{tour.suffix}": array for tour in self.tours for name, array in make(tour).items()}

    def overlaid(self, values: Callable[[Tour], Float[np.ndarray, "point"]], **line: Any) -> list[Line]:
        """Returns a curve for each checkpoint over the indices of its values, named if there are several."""
        lines = []
        for tour in self.tours:
            y, label = values(tour), tour.label if len(self.tours) > 1 else ""
            lines.append(Line(x=np.arange(len(y)), y=y, color=tour.color, label=label, **line))
        return lines
