"""Study 1: characteristics of the weights of Q, K and V. Weights only; the model is never built.

Source: Mike X Cohen, "50 ML projects to understand LLMs", project 33, QKV weights characteristics.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from jaxqkv.checkpoints.weights import Weights
from jaxqkv.figures import style
from jaxqkv.figures.displays import Display, head_images, layer_map, rows_of
from jaxqkv.figures.panels import Bars, Image, Line, Lines, Panel, Table, plain
from jaxqkv.kernels import (
    column_cosine,
    column_cosine_moments,
    density,
    freedman_diaconis_histogram,
    head_pair_densities,
    head_pair_masks,
    moments,
    require_finite,
)
from jaxqkv.runtime import console
from jaxqkv.runtime.devices import jit
from jaxqkv.studies.options import (
    Compared,
    OfOneLayer,
    beside,
    open_compared,
    open_weights,
    pick_layer,
    reduce_layers,
    short_names,
)
from jaxqkv.studies.registry import Study

LAYER = 6
ORIGINAL_GRID = (3, 4)
WEIGHT_EDGES = np.linspace(-0.8, 0.8, 81)
COSINE_EDGES = np.linspace(-0.4, 0.4, 101)
MATRICES = ("Q", "K", "V")

# One matrix and the number of heads → what is kept of it.
Reduction = Callable[[Float[Array, "embed embed"], int], dict[str, Array]]


def _moments(matrix: Float[Array, "embed embed"], n_head: int) -> dict[str, Array]:
    mean, std = moments(matrix, ddof=1)
    return {"mean": mean, "std": std}


def _densities(matrix: Float[Array, "embed embed"], n_head: int) -> dict[str, Array]:
    return {"density": density(matrix, WEIGHT_EDGES)}


def _head_cosines(matrix: Float[Array, "embed embed"], n_head: int) -> dict[str, Array]:
    values, mean, std = head_pair_densities(matrix, n_head, COSINE_EDGES)
    return {"density": values, "mean": mean, "std": std}


def _column_cosines(matrix: Float[Array, "embed embed"], n_head: int) -> dict[str, Array]:
    mean, std = column_cosine_moments(matrix, ddof=1)
    return {"mean": mean, "std": std}


REDUCTIONS: dict[str, Reduction] = {
    "moments": _moments,
    "densities": _densities,
    "head cosines": _head_cosines,
    "column cosines": _column_cosines,
}
# A figure that needs this draws every model, from these reductions; the others draw the first.
EVERY_MODEL = "every model"
ACROSS_MODELS = frozenset({"moments", "column cosines"})
# What figures 2c and 2d show of the checkpoints that are compared, too.
COMPARABLE = frozenset({"moments", "densities"})
# Figures 5b and 5c have no V.
MATRICES_OF = {"head cosines": 2}


@jit(static_argnames=("n_head", "names"))
def _reduce(wide: Float[Array, "embed three_embed"], *, n_head: int, names: frozenset[str]) -> dict[str, Any]:
    """The reductions `names` of W_Q, W_K and W_V, stacked.

    One matrix after another: a product that fills the machine gains nothing from a batch axis, and
    the columns of the wide matrix need not be moved to make one.
    """
    width = wide.shape[0]

    def reduce_one(start: Int[Array, ""], chosen: frozenset[str]) -> dict[str, Any]:
        matrix = jax.lax.dynamic_slice_in_dim(wide, start, width, axis=1)
        # In one order always, so that the compilation cache knows the program again.
        return {name: REDUCTIONS[name](matrix, n_head) for name in sorted(chosen)}

    results: dict[str, Any] = {}
    for count in (2, 3):
        chosen = frozenset(name for name in names if MATRICES_OF.get(name, 3) == count)
        results |= jax.lax.map(functools.partial(reduce_one, chosen=chosen), width * jnp.arange(count))
    return results


class Run(OfOneLayer):
    """The checkpoints, the layer, and each checkpoint's reductions `[layer, …]` after `prepare`."""

    def __init__(self, options: argparse.Namespace):
        self.weights = open_weights(options, STUDY)
        self.compared = open_compared(options)
        names = short_names([*self.weights, *self.compared])
        self.names, self.compared_names = names[: len(self.weights)], names[len(self.weights) :]
        self.first, self.name = self.weights[0], self.names[0]
        self.config = self.first.config
        self.layer, self.layer_note = pick_layer(options, LAYER, self.config.n_layer, self.name)
        # Of every checkpoint of the study, then of those it is compared with.
        self.reductions: list[dict[str, dict[str, np.ndarray]]] = [{} for _ in names]

    def describe(self) -> dict[str, Any]:
        """What the manifest says of this run."""
        checkpoints = [weights.checkpoint.identity() for weights in [*self.weights, *self.compared]]
        return {"checkpoint": checkpoints, "layer": self.layer}

    def prepare(self, needs: Collection[str]) -> None:
        """One pass over the layers of each checkpoint, with one layer's matrices in memory at a time."""
        names = frozenset(needs) - {EVERY_MODEL}
        across = names & ACROSS_MODELS if EVERY_MODEL in needs else frozenset()
        compared = names & COMPARABLE
        wanted = [names] + [across] * (len(self.weights) - 1) + [compared] * len(self.compared)
        everything = [*self.weights, *self.compared]
        total = sum(w.config.n_layer for w, names in zip(everything, wanted, strict=True) if names)
        with console.bar(total=total, desc="layers", unit="layer") as progress:
            for index, (weights, names) in enumerate(zip(everything, wanted, strict=True)):
                if names:
                    self.reductions[index] = _reduce_layers(weights, names, progress)

    @cached_property
    def wide(self) -> Float[np.ndarray, "embed three_embed"]:
        """W_Q, W_K and W_V of the layer, side by side."""
        return self.first.W_QKV(self.layer)

    @cached_property
    def qkv(self) -> list[Float[np.ndarray, "embed embed"]]:
        """W_Q, W_K and W_V of the layer."""
        return np.split(self.wide, 3, axis=1)

    @property
    def shown(self) -> list[Compared]:
        """What figures 2b to 2d show: the first checkpoint and those it is compared with."""
        names = [self.name, *self.compared_names]
        reductions = [self.reductions[0], *self.reductions[len(self.weights) :]]
        together = zip(names, [self.first, *self.compared], reductions, strict=True)
        return [Compared(w, name, order, self.layer, each) for order, (name, w, each) in enumerate(together)]

    @property
    def in_model(self) -> str:
        """How a title names the model, when there is one alone."""
        return "" if self.compared else f" in {self.label}"

    @property
    def beside(self) -> str:
        """The checkpoints of figures 2b to 2d, for a caption."""
        return beside([self.name, *self.compared_names])


def _reduce_layers(weights: Weights, names: frozenset[str], progress: tqdm) -> dict[str, dict[str, np.ndarray]]:
    def reduce(layer: int, wide: Float[Array, "embed three_embed"]) -> dict[str, Any]:
        return _reduce(wide, n_head=weights.config.n_head, names=names)

    layers = reduce_layers(weights, range(weights.config.n_layer), reduce, progress)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)


STUDY = Study(
    name="qkv-weights",
    title="QKV weights characteristics",
    models=("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"),
    demo="demo-gpt2",
    run=Run,
    options=("compare",),
)
figure = STUDY.draw


def _label(matrix: str) -> str:
    return rf"$\mathbf{{W_{matrix}}}$"


def _by_matrix(x: np.ndarray, columns: np.ndarray, markers: bool) -> list[Line]:
    """Three curves in the colours of Q, K and V, from `columns [x, qkv]`."""
    return [
        Line(x=x, y=column, label=_label(m), color=style.QKV[m], marker=style.MARKERS[m] if markers else "")
        for m, column in zip(MATRICES, columns.T, strict=True)
    ]


def _mean_and_std(mean: np.ndarray, std: np.ndarray, title: str = "") -> list[Lines]:
    layers = np.arange(len(mean))
    return [
        Lines(
            lines=_by_matrix(layers, values, markers=len(mean) <= 24),
            xlabel="Transformer layer",
            ylabel=ylabel,
            title=title,
            integer_x=True,
        )
        for values, ylabel in ((mean, "Mean"), (std, "Standard deviation"))
    ]


def _across_models(run: Run, need: str, caption: str) -> Display:
    """A row of means and standard deviations for every model."""
    arrays: dict[str, np.ndarray] = {}
    rows = []
    for name, reductions in zip(run.names, run.reductions[: len(run.names)], strict=True):
        mean, std = reductions[need]["mean"], reductions[need]["std"]
        arrays |= {f"mean_{name}": mean, f"std_{name}": std}
        rows.append(_mean_and_std(mean, std, title=plain(name)))
    return Display(arrays=arrays, panels=rows, caption=caption, size=(10, 0.7 + 2.4 * len(rows)), legend=True)


@STUDY.figure("1", "table of the models and their attention parameters")
def figure_1(run: Run) -> Display:
    rows = []
    for weights in run.weights:
        config = weights.config
        # W_Q, W_K, W_V and W_O, each with a bias.
        parameters = config.n_layer * 4 * (config.n_embd**2 + config.n_embd)
        rows.append((config.n_embd, config.n_layer, config.n_head, config.head_dim, parameters / 1e6))
    fields = ("n_embd", "n_layer", "n_head", "head_dim", "attention_parameters")
    arrays = {"model": np.array(run.names)} | dict(zip(fields, map(np.array, zip(*rows, strict=True)), strict=True))
    cells = [(name, *map(str, row[:-1]), f"{row[-1]:.2f} M") for name, row in zip(run.names, rows, strict=True)]
    heading = ("Model", "Embedding", "Layers", "Heads", "Head dim", "Attention parameters")
    table = Table(heading=heading, rows=cells)
    return Display(
        arrays=arrays,
        panels=[[table]],
        caption="Sizes of the models. Attention parameters are the weights and biases of W_Q, W_K, W_V and W_O.",
        size=(10, 1 + 0.4 * len(rows)),
        text=table.text(),
    )


@STUDY.figure("2a", "W_Q, W_K and W_V of one layer as one wide matrix")
def figure_2a(run: Run) -> Display:
    n_embd = run.config.n_embd
    image = Image(
        values=run.wide,
        vmin=-0.1,
        vmax=0.1,
        colorbar="Weight value",
        vlines=(n_embd - 0.5, 2 * n_embd - 0.5),
        xticks=(),
        xlabel="Queries dimensions   |   Keys dimensions   |   Values dimensions",
        ylabel="Embeddings dimensions",
    )
    caption = f"Attention weights of {run.where}, colours from −0.1 to 0.1.{run.layer_note}"
    return Display(arrays={"weights": run.wide}, panels=[[image]], caption=caption, title=run.heading, size=(10, 3.7))


@STUDY.figure("2b", "histograms of W_Q, W_K and W_V of one layer")
def figure_2b(run: Run) -> Display:
    arrays: dict[str, np.ndarray] = {}
    lines = []
    for each in run.shown:
        for name, matrix in zip(MATRICES, np.split(each.weights.W_QKV(each.layer), 3, axis=1), strict=True):
            heights, edges = freedman_diaconis_histogram(matrix)
            arrays |= {f"counts_{name.lower()}{each.suffix}": heights, f"edges_{name.lower()}{each.suffix}": edges}
            label = _label(name) + (f" {plain(each.name)}" if run.compared else "")
            lines.append(Line(x=edges[:-1], y=heights, label=label, color=style.QKV[name], linestyle=each.line))
    title = f"Distribution of QKV weights in layer {run.layer}{run.in_model}"
    panel = Lines(lines=lines, xlabel="Weight value", ylabel="Count", title=title)
    others = "".join(f"; layer {each.layer} of {each.name}" for each in run.shown[1:])
    caption = (
        f"Weights of {run.where}{others} counted in Freedman–Diaconis bins, each sample's own, drawn at left "
        f"edges.{run.layer_note}"
    )
    return Display(arrays=arrays, panels=[[panel]], caption=caption, size=(8, 3.4))


@STUDY.figure("2c", "distributions of W_Q, W_K and W_V by layer", needs={"densities"})
def figure_2c(run: Run) -> Display:
    arrays, rows = {"edges": WEIGHT_EDGES}, []
    for each in run.shown:
        values = each.reductions["densities"]["density"]
        arrays[f"density{each.suffix}"] = values
        rows.append(
            [
                layer_map(
                    values[:, index],
                    WEIGHT_EDGES,
                    vmax=3.5,
                    title=_label(matrix) + (f" of {plain(each.name)}" if run.compared else ""),
                    xlabel="Weight value",
                    colorbar="Density" if index == 2 else "",
                )
                for index, matrix in enumerate(MATRICES)
            ]
        )
    return Display(
        arrays=arrays,
        panels=rows,
        title=f"Laminar distributions of attention weights{run.in_model}",
        caption=f"Density of the weights of each layer of {run.beside}, colours from 0 to 3.5.",
        size=(10, 0.4 + 3 * len(rows)),
    )


@STUDY.figure("2d", "mean and standard deviation of W_Q, W_K and W_V by layer", needs={"moments"})
def figure_2d(run: Run) -> Display:
    arrays: dict[str, np.ndarray] = {}
    panels: list[Lines] = []
    for each in run.shown:
        mean, std = each.reductions["moments"]["mean"], each.reductions["moments"]["std"]
        arrays |= {f"mean{each.suffix}": mean, f"std{each.suffix}": std}
        own = _mean_and_std(mean, std)
        for panel in own if run.compared else ():
            for line in panel.lines:
                line.label += f" {plain(each.name)}"
                line.linestyle = each.line
        if each.order:
            own = [dataclasses.replace(p, lines=[*p.lines, *q.lines]) for p, q in zip(panels, own, strict=True)]
        panels = own
    return Display(
        arrays=arrays,
        panels=[panels],
        title=f"Means and standard deviations of attention weights{run.in_model}",
        caption=f"Mean and sample standard deviation of the weights of each layer of {run.beside}.",
        size=(10, 3.8),
        legend=True,
    )


@STUDY.figure("3", "means and standard deviations by layer, every model", needs={"moments", EVERY_MODEL})
def figure_3(run: Run) -> Display:
    return _across_models(
        run, "moments", "Mean and sample standard deviation of the weights of each layer, one row a model."
    )


@STUDY.figure("4a", "W_Q of every head of one layer")
def figure_4a(run: Run) -> Display:
    heads = run.first.W_Q(run.layer, by_head=True)
    panels, grid = head_images(heads.swapaxes(1, 2), "H", ORIGINAL_GRID, vmin=-0.1, vmax=0.1)
    corner = panels[-1][0]
    corner.xlabel, corner.ylabel = "Embeddings dimensions", "Head dimension"
    caption = f"W_Q of every head of {run.where}, transposed, colours from −0.1 to 0.1.{grid}{run.layer_note}"
    return Display(
        arrays={"heads": heads}, panels=panels, caption=caption, title=run.heading, size=(10, 0.3 + 1.7 * len(panels))
    )


@STUDY.figure("4b", "cosine similarity of the columns of head 0 of W_Q")
def figure_4b(run: Run) -> Display:
    similarity = np.asarray(column_cosine(run.first.W_Q(run.layer, by_head=True)[0]))
    values = similarity[np.triu_indices(len(similarity), 1)]
    heights, edges = np.histogram(require_finite(values), bins=40)
    panels = [
        Image(
            values=similarity,
            cmap="viridis",
            colorbar="Cosine similarity",
            xlabel="Head dimension",
            ylabel="Head dimension",
            title="A) Cosine similarity matrix",
        ),
        Bars(
            heights=heights,
            edges=edges,
            xlabel="Cosine similarity",
            ylabel="Count",
            title="B) Distribution of similarities",
        ),
    ]
    caption = (
        f"Cosine similarities between the columns of W_Q of head 0, {run.where}; "
        f"the histogram (40 bins) is of the upper triangle.{run.layer_note}"
    )
    arrays = {"similarity": similarity, "values": values}
    return Display(arrays=arrays, panels=[panels], caption=caption, title=run.heading, size=(10, 3.9))


@STUDY.figure("5a", "cosine similarities within and across heads of one layer")
def figure_5a(run: Run) -> Display:
    arrays: dict[str, np.ndarray] = {}
    panels: list[Panel] = []
    masks = np.asarray(head_pair_masks(run.config.n_head, run.config.head_dim))
    groups = (("within", "Within heads", style.WITHIN), ("across", "Across heads", style.ACROSS))
    for letter, name, matrix in zip("AB", "QK", run.qkv, strict=False):
        cosine = np.asarray(column_cosine(matrix))
        lines = []
        for mask, (group, label, color) in zip(masks, groups, strict=True):
            heights, edges = freedman_diaconis_histogram(cosine[mask], density=True)
            arrays |= {f"density_{name.lower()}_{group}": heights, f"edges_{name.lower()}_{group}": edges}
            lines.append(Line(x=edges[:-1], y=heights, label=label, color=color))
        title = f"{letter}) Similarities in {_label(name)}"
        panels.append(Lines(lines=lines, xlabel="Cosine similarity", ylabel="Density", title=title))
    caption = (
        f"Cosine similarities of the columns of W_Q and W_K, {run.where}: pairs in the same head and pairs in "
        f"different heads, in Freedman–Diaconis bins, drawn at left edges.{run.layer_note}"
    )
    return Display(arrays=arrays, panels=[panels], caption=caption, title=run.heading, size=(12, 3.9))


@STUDY.figure("5b", "cosine similarities within and across heads by layer", needs={"head cosines"})
def figure_5b(run: Run) -> Display:
    values = run.reductions[0]["head cosines"]["density"]
    places = [(0, 0, "A", "within"), (0, 1, "B", "across"), (1, 0, "C", "within"), (1, 1, "D", "across")]
    panels = [
        layer_map(
            values[:, matrix, group],
            COSINE_EDGES,
            cmap="magma",
            vmax=7,
            xlabel="Cosine similarity",
            title=f"{letter}) {_label('QK'[matrix])}: distributions {kind} heads",
            colorbar="Density" if group else "",
        )
        for matrix, group, letter, kind in places
    ]
    return Display(
        arrays={"edges": COSINE_EDGES, "density": values},
        panels=rows_of(panels, 2),
        caption=f"Densities of the column cosines of each layer of {run.name}, colours from 0 to 7.",
        title=run.label,
        size=(10, 5.7),
    )


@STUDY.figure("5c", "mean and standard deviation of the similarities by layer", needs={"head cosines"})
def figure_5c(run: Run) -> Display:
    mean, std = (run.reductions[0]["head cosines"][name] for name in ("mean", "std"))
    panels = []
    for values, ylabel, title in (
        (mean, "Mean", "A) Average of the cosine similarities"),
        (std, "Standard deviation", "B) Spread of the cosine similarities"),
    ):
        lines = [
            Line(
                x=np.arange(len(values)),
                y=values[:, matrix, group],
                label=f"{_label('QK'[matrix])} {('within', 'across')[group]} heads",
                color=(style.WITHIN, style.ACROSS)[group],
                marker=style.MARKERS["QK"[matrix]],
                linestyle=("-", "--")[matrix],
            )
            for matrix in (0, 1)
            for group in (0, 1)
        ]
        panels.append(Lines(lines=lines, xlabel="Transformer layer", ylabel=ylabel, title=title, integer_x=True))
    return Display(
        arrays={"mean": mean, "std": std},
        panels=[panels],
        caption=f"Mean and population standard deviation of figure 5b's samples in each layer of {run.name}.",
        title=run.label,
        size=(12, 4.4),
        legend=True,
    )


@STUDY.figure("6", "cosine similarities of all columns by layer, every model", needs={"column cosines", EVERY_MODEL})
def figure_6(run: Run) -> Display:
    return _across_models(
        run,
        "column cosines",
        "Mean and sample standard deviation of the cosine similarities of all pairs of columns of W_Q, W_K and W_V "
        "in each layer, one row a model.",
    )
