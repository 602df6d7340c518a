"""The run of the study `qkv-weights`: the checkpoints, and one pass over the layers of each."""

import functools
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxqkv.checkpoints.weights import Weights
from jaxqkv.kernels import column_cosine_moments, density, head_pair_densities, moments
from jaxqkv.runtime import console
from jaxqkv.runtime.devices import jit
from jaxqkv.studies.comparison import Compared, beside, reduce_layers, short_names
from jaxqkv.studies.layers import OfOneLayer, pick_layer
from jaxqkv.studies.opening import open_compared, open_weights
from jaxqkv.studies.qkv_weights import STUDY, QKVWeightsOptions
from jaxqkv.studies.study import Run

LAYER = 6
WEIGHT_EDGES = np.linspace(-0.8, 0.8, 81)
COSINE_EDGES = np.linspace(-0.4, 0.4, 101)

# A function of one matrix and the number of heads to the arrays that are kept.
Reduction = Callable[[Float[Array, "embed inner"], int], dict[str, Array]]


def matrix_moments(matrix: Float[Array, "embed inner"], n_head: int) -> dict[str, Float[Array, "..."]]:
    """Returns mean and sample standard deviation of all weights."""
    mean, std = moments(matrix, ddof=1)
    return {"mean": mean, "std": std}


def matrix_densities(matrix: Float[Array, "embed inner"], n_head: int) -> dict[str, Float[Array, "..."]]:
    """Returns the density of the weights, `[bin]` of `WEIGHT_EDGES`."""
    return {"density": density(matrix, WEIGHT_EDGES)}


def matrix_head_cosines(matrix: Float[Array, "embed inner"], n_head: int) -> dict[str, Float[Array, "..."]]:
    """Returns densities `[2, bin]`, means and deviations of column cosines, within and across heads."""
    values, mean, std = head_pair_densities(matrix, COSINE_EDGES, n_head=n_head)
    return {"density": values, "mean": mean, "std": std}


def matrix_column_cosines(matrix: Float[Array, "embed inner"], n_head: int) -> dict[str, Float[Array, "..."]]:
    """Returns mean and sample standard deviation of all column cosines."""
    mean, std = column_cosine_moments(matrix, ddof=1)
    return {"mean": mean, "std": std}


# Reductions that figures take: a function of every matrix of every layer, and the checkpoints that it is computed for:
# the first, those that are `shown` together, or all `models` of the study.
REDUCTIONS: dict[str, tuple[Reduction, str]] = {
    "densities": (matrix_densities, "shown"),
    "moments": (matrix_moments, "shown"),
    "moments_of_models": (matrix_moments, "models"),
    "head_cosines": (matrix_head_cosines, "first"),
    "column_cosines_of_models": (matrix_column_cosines, "models"),
}
FUNCTIONS = {function.__name__: function for function, _ in REDUCTIONS.values()}
# Matrices of a reduction, if not all three: figures 5b and 5c have no V.
MATRICES_OF = {"matrix_head_cosines": 2}


@jit(static_argnames=("n_head", "names"))
def _reduce(wide: Float[Array, "embed three_embed"], *, n_head: int, names: frozenset[str]) -> dict[str, Any]:
    """Applies the functions of these names to W_Q, W_K and W_V, and stacks the results.

    The matrices are taken one after another: large products gain nothing from a batch axis, and making one would move
    the columns of the wide matrix.
    """
    width = wide.shape[1] // 3

    def reduce_one(start: Int[Array, ""], chosen: frozenset[str]) -> dict[str, Any]:
        matrix = jax.lax.dynamic_slice_in_dim(wide, start, width, axis=1)
        # Always in the same order, so that the compilation cache recognises the program.
        return {name: FUNCTIONS[name](matrix, n_head) for name in sorted(chosen)}

    results: dict[str, Any] = {}
    for count in (2, 3):
        chosen = frozenset(name for name in names if MATRICES_OF.get(name, 3) == count)
        results |= jax.lax.map(functools.partial(reduce_one, chosen=chosen), width * jnp.arange(count))
    return results


# A reduction's arrays `[layer, matrix, …]` by name.
Reduced = Mapping[str, np.ndarray]


@STUDY.computation
class QKVWeightsRun(OfOneLayer, Run):
    """The checkpoints and the layer that is shown."""

    def __init__(self, options: QKVWeightsOptions, folder: Path | None = None):
        self.weights = open_weights(options, STUDY)
        self.compared = open_compared(options)
        names = short_names([*self.weights, *self.compared])
        self.names, self.compared_names = names[: len(self.weights)], names[len(self.weights) :]
        self.first, self.name = self.weights[0], self.names[0]
        self.config = self.first.config
        self.layer, self.layer_note = pick_layer(options, LAYER, self.config.n_layer, self.name)
        self.seed, self.significance, self.permutations = options.seed, options.significance, options.permutations

    def describe(self) -> dict[str, Any]:
        """Returns this run's entries in the manifest."""
        checkpoints = [weights.checkpoint.identity() for weights in [*self.weights, *self.compared]]
        return {"checkpoint": checkpoints, "layer": self.layer}

    def compute(self, names: Collection[str]) -> dict[str, list[Reduced]]:
        """Makes one pass over the layers of each checkpoint, with one layer's matrices in memory at a time.

        Returns:
          For each name, the reduction of each checkpoint that it is computed for.
        """
        everything = [*self.weights, *self.compared]
        models = list(range(len(self.weights)))
        checkpoints = {"first": [0], "models": models, "shown": [0, *range(len(models), len(everything))]}
        wanted: list[set[str]] = [set() for _ in everything]
        for name in names:
            function, group = REDUCTIONS[name]
            for index in checkpoints[group]:
                wanted[index].add(function.__name__)
        total = sum(w.config.n_layer for w, chosen in zip(everything, wanted, strict=True) if chosen)
        with console.bar(total=total, desc="layers", unit="layer") as progress:
            results = [
                _reduce_layers(weights, frozenset(chosen), progress) if chosen else {}
                for weights, chosen in zip(everything, wanted, strict=True)
            ]
        return {
            name: [results[index][REDUCTIONS[name][0].__name__] for index in checkpoints[REDUCTIONS[name][1]]]
            for name in names
        }

    @cached_property
    def wide(self) -> Float[np.ndarray, "embed three_embed"]:
        """W_Q, W_K and W_V of the layer, side by side."""
        return self.first.W_QKV(self.layer)

    @cached_property
    def qkv(self) -> list[Float[np.ndarray, "embed inner"]]:
        """W_Q, W_K and W_V of the layer."""
        return np.split(self.wide, 3, axis=1)

    @property
    def shown(self) -> list[Compared]:
        """The checkpoints of figures 2b to 2d: the first and those it is compared with."""
        together = zip([self.name, *self.compared_names], [self.first, *self.compared], strict=True)
        return [Compared(weights, name, order, self.layer) for order, (name, weights) in enumerate(together)]

    @property
    def in_model(self) -> str:
        """The model's name in a title; empty if several are compared."""
        return "" if self.compared else f" in {self.label}"

    @property
    def tested(self) -> str:
        """The sentence on tests in the captions of figures 5c and 6; empty without tests."""
        if not self.significance:
            return ""
        return (
            f" Stars: the means within and across heads differ, q < 0.05 of two-sided tests in which the columns are "
            f"permuted over the heads ({self.permutations:,} times, seed {self.seed})."
        )

    @property
    def beside(self) -> str:
        """The checkpoints of figures 2b to 2d, for a caption."""
        return beside([self.name, *self.compared_names])


def _reduce_layers(weights: Weights, names: frozenset[str], progress: Any) -> dict[str, Reduced]:
    def reduce(layer: int, wide: Float[Array, "embed three_embed"]) -> dict[str, Any]:
        return _reduce(wide, n_head=weights.config.n_head, names=names)

    layers = reduce_layers(weights, range(weights.config.n_layer), reduce, progress)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
