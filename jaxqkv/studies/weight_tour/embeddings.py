"""Figures of the whole model and of its position embeddings."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxqkv.checkpoints.weights import CATEGORIES
from jaxqkv.errors import NotDrawable
from jaxqkv.figures import style
from jaxqkv.figures.displays import Display, reach, rows_of, symmetric
from jaxqkv.figures.distributions import Pie, StackedBars
from jaxqkv.figures.panels import Image, Line, Lines, Panel
from jaxqkv.figures.tables import Table
from jaxqkv.kernels import neighbour_correlations
from jaxqkv.studies.layers import nearest_indices
from jaxqkv.studies.weight_tour import STUDY
from jaxqkv.studies.weight_tour.run import ORIGINAL_WIDTH, Tour, WeightTourRun

DIMENSION, DIMENSIONS = 500, (400, 600, 700)
MEBIBYTE = 2**20
# Most characters in a line of a title over the whole width.
TITLE_WIDTH = 90


def _summary(tour: Tour) -> tuple[Table, int, int | None]:
    """Returns a table of the tensors, the number of parameters, and that with the tied output embedding, if tied."""
    inventory = tour.weights.inventory()
    kinds: dict[str, list[Any]] = {}
    for tensor in inventory:
        name = tensor.name if tensor.layer is None else tensor.name.replace(f".{tensor.layer}.", ".*.", 1)
        kinds.setdefault(name, []).append(tensor)
    order = list(dict.fromkeys(CATEGORIES.values()))
    rows = []
    for name, tensors in sorted(kinds.items(), key=lambda item: order.index(item[1][0].category)):
        parameters = sum(tensor.parameters for tensor in tensors)
        shape = " × ".join(map(str, tensors[0].shape))
        rows.append((tensors[0].category, name, shape, len(tensors), parameters))
    total = sum(tensor.parameters for tensor in inventory)
    rows.append(("Total", "each tensor once", "", len(inventory), total))
    with_tied = None
    if tour.weights.tied:
        size = tour.config.vocab_size * tour.config.n_embd
        with_tied = total + size
        rows.append(("Output Embedding", "tied: the token embedding again", "", 1, size))
        rows.append(("Total", "with the tied output embedding", "", len(inventory) + 1, with_tied))
    cells = [
        (category, name, shape, str(count), f"{parameters:,}", f"{parameters * 4 / MEBIBYTE:,.2f}")
        for category, name, shape, count, parameters in rows
    ]
    heading = ("Category", "Tensor", "Shape", "Count", "Parameters", "MiB (float32)")
    return Table(heading=heading, rows=cells, left=3, wide=True), total, with_tied


def _alike(tours: Sequence[Tour]) -> list[list[Tour]]:
    """Groups checkpoints by architecture: the names and shapes of their tensors, and whether embeddings are tied."""
    groups: dict[Any, list[Tour]] = {}
    for tour in tours:
        architecture = tuple(tour.weights.inventory()), getattr(tour.config, "tie_word_embeddings", False)
        groups.setdefault(architecture, []).append(tour)
    return list(groups.values())


def _sizes(tour: Tour) -> tuple[Pie, StackedBars]:
    """Returns two panels: the parameters by category, and the size of each layer."""
    inventory = tour.weights.inventory()
    categories = [c for c in style.CATEGORIES if any(tensor.category == c for tensor in inventory)]
    in_layers = [c for c in categories if any(t.category == c and t.layer is not None for t in inventory)]
    by_layer = np.zeros((len(in_layers), tour.config.n_layer))
    for tensor in inventory:
        if tensor.layer is not None:
            by_layer[in_layers.index(tensor.category), tensor.layer] += tensor.parameters * 4 / MEBIBYTE
    pie = Pie(
        values=[sum(t.parameters for t in inventory if t.category == c) for c in categories],
        names=categories,
        colors=[style.CATEGORIES[c] for c in categories],
        title="Distribution of parameters by category",
    )
    bars = StackedBars(
        x=np.arange(tour.config.n_layer),
        heights=by_layer,
        names=in_layers,
        colors=[style.CATEGORIES[c] for c in in_layers],
        xlabel="Layer",
        ylabel="Size (MiB)",
        title="Layer sizes across model depth",
    )
    return pie, bars


@STUDY.define(
    "architecture",
    "every tensor by category, and where the parameters are",
    "name, category, layer, parameters [tensor], total, megabytes []; with tied embeddings: total_with_tied, "
    "megabytes_with_tied []; with more checkpoints: *_NAME",
)
def figure_architecture(run: WeightTourRun) -> Display:
    summaries = {tour.name: _summary(tour) for tour in run.tours}

    def arrays(tour: Tour) -> dict[str, Any]:
        inventory = tour.weights.inventory()
        _, total, with_tied = summaries[tour.name]
        sums = {"total": total, "megabytes": total * 4 / MEBIBYTE}
        if with_tied is not None:
            sums |= {"total_with_tied": with_tied, "megabytes_with_tied": with_tied * 4 / MEBIBYTE}
        return {
            "name": np.array([tensor.name for tensor in inventory]),
            "category": np.array([tensor.category for tensor in inventory]),
            "layer": np.array([-1 if tensor.layer is None else tensor.layer for tensor in inventory]),
            "parameters": np.array([tensor.parameters for tensor in inventory]),
        } | sums

    rows: list[Sequence[Panel]] = []
    texts, notes = [], []
    groups = _alike(run.tours)
    for first, *others in groups:
        table, *_ = summaries[first.name]
        table.title, names = first.label, first.name
        if others:
            names = ", ".join(tour.name for tour in (first, *others))
            table.title = _lines([tour.label for tour in (first, *others)])
            notes.append(f" (One table for {names}, which have the same tensors.)")
        texts.append(f"{names}\n{table.text()}" if len(groups) > 1 else table.text())
        rows += [(table,), _sizes(first)]
    return Display(
        arrays=run.arrays(arrays),
        panels=rows,
        caption=f"Every tensor of {run.names}, counted once (a star stands for the layer's number), parameters by "
        "category, and the size of each layer at four bytes a parameter. A tied output embedding has its own line."
        + "".join(notes),
        size=(12, 5 * len(rows)),
        heights=[6, 4] * (len(rows) // 2),
        text="\n\n".join(texts),
    )


def _lines(labels: Sequence[str]) -> str:
    """Joins names to a title of as many lines as needed."""
    return textwrap.fill(", ".join(labels), TITLE_WIDTH, break_long_words=False, break_on_hyphens=False)


# --- position embeddings ---


def _dimensions(tour: Tour, wanted: Sequence[int]) -> list[int]:
    return nearest_indices(wanted, tour.config.n_embd, ORIGINAL_WIDTH)


def _moved(run: WeightTourRun, wanted: Sequence[int]) -> str:
    """Returns the caption's note on dimensions that a narrower model does not have, once for each width."""
    by_width = {tour.config.n_embd: _dimensions(tour, wanted) for tour in run.tours}
    return "".join(
        f" (For {width} dimensions, those at the original's fractions of the width are shown: "
        f"{', '.join(map(str, shown))} for {', '.join(map(str, wanted))}.)"
        for width, shown in by_width.items()
        if shown != list(wanted)
    )


@STUDY.define(
    "positions",
    "the whole position-embedding matrix",
    "positions [pos, embed]; with more checkpoints: *_NAME",
)
def figure_positions(run: WeightTourRun) -> Display:
    limits = symmetric(*(tour.positions for tour in run.tours))
    panels = [
        Image(
            values=tour.positions,
            cmap="RdBu",
            title=f"Positional embeddings of {tour.label}",
            xlabel="Embedding dimension",
            ylabel="Position",
            colorbar="Weight value",
            **limits,
        )
        for tour in run.tours
    ]
    return Display(
        arrays=run.arrays(lambda tour: {"positions": tour.positions}),
        panels=[panels],
        caption=f"The position embeddings of {run.names}; white is 0, the ends of the colours the largest "
        "magnitude of all.",
        size=(9 * len(panels), 6),
    )


@STUDY.define(
    "position-dimension",
    "one dimension of the position embeddings",
    "values [pos], dimension []; with more checkpoints: *_NAME",
)
def figure_position_dimension(run: WeightTourRun) -> Display:
    def arrays(tour: Tour) -> dict[str, Any]:
        (dimension,) = _dimensions(tour, [DIMENSION])
        return {"values": tour.positions[:, dimension], "dimension": dimension}

    panel = Lines(
        lines=run.overlaid(lambda tour: arrays(tour)["values"]),
        xlabel="Position",
        ylabel="Value",
        title=f"Position embedding values (dimension {arrays(run.first)['dimension']})",
        grid=True,
    )
    return Display(
        arrays=run.arrays(arrays),
        panels=[[panel]],
        caption=f"One dimension of the position embeddings of {run.names}.{_moved(run, [DIMENSION])}",
        size=(10, 4),
    )


# Name of a checkpoint → the dimensions that are shown and their names in the legend.
Chosen = Mapping[str, Sequence[tuple[int, str]]]


def _chosen_arrays(tour: Tour, chosen: Chosen) -> dict[str, np.ndarray]:
    dimensions = [dimension for dimension, _ in chosen[tour.name]]
    return {"dimensions": np.array(dimensions), "values": tour.positions[:, dimensions].T}


def _dimension_panels(run: WeightTourRun, chosen: Chosen, titles: Mapping[str, str]) -> list[Panel]:
    """Returns a panel for each checkpoint, with a curve for each of its chosen dimensions."""
    values = {tour.name: _chosen_arrays(tour, chosen)["values"] for tour in run.tours}
    ylim = reach(*values.values())
    return [
        Lines(
            lines=[
                Line(x=np.arange(y.size), y=y, label=label, color=place / 3)
                for place, (y, (_, label)) in enumerate(zip(values[tour.name], chosen[tour.name], strict=True))
            ],
            xlabel="Position",
            ylabel="Value",
            title=titles[tour.name],
            ylim=ylim,
            grid=True,
        )
        for tour in run.tours
    ]


@STUDY.define(
    "position-dimensions",
    "three dimensions of the position embeddings",
    "dimensions [dimension], values [dimension, pos]; with more checkpoints: *_NAME",
)
def figure_position_dimensions(run: WeightTourRun) -> Display:
    dimensions = {tour.name: _dimensions(tour, DIMENSIONS) for tour in run.tours}
    chosen = {name: [(each, f"Dimension {each}") for each in shown] for name, shown in dimensions.items()}
    titles = {tour.name: f"Position embedding values, {tour.label}" for tour in run.tours}
    panels = _dimension_panels(run, chosen, titles)
    return Display(
        arrays=run.arrays(lambda tour: _chosen_arrays(tour, chosen)),
        panels=rows_of(panels, 1),
        caption=f"Three dimensions of the position embeddings of {run.names}.{_moved(run, DIMENSIONS)}",
        size=(10, 4 * len(panels)),
        legend=len(set(map(tuple, dimensions.values()))) == 1,
    )


@STUDY.define(
    "position-variance",
    "dimensions of lowest, middle and highest variance over positions",
    "dimensions [lowest/middle/highest], values [lowest/middle/highest, pos], variance [embed]; with more "
    "checkpoints: *_NAME",
)
def figure_position_variance(run: WeightTourRun) -> Display:
    variances = {tour.name: _variance(tour) for tour in run.tours}
    chosen, titles = {}, {}
    for tour in run.tours:
        order = np.argsort(variances[tour.name], kind="stable").tolist()
        shown = [order[0], order[len(order) // 2], order[-1]]
        names = ("Low variance", "Middle variance", "High variance")
        chosen[tour.name] = list(zip(shown, names, strict=True))
        titles[tour.name] = f"{tour.label}: dimensions {', '.join(map(str, shown))}"
    panels = _dimension_panels(run, chosen, titles)
    return Display(
        arrays=run.arrays(lambda tour: _chosen_arrays(tour, chosen) | {"variance": variances[tour.name]}),
        panels=rows_of(panels, 1),
        caption="The dimensions of the position embeddings whose variance over positions is lowest, in the middle and "
        f"highest: of {run.names}.",
        title="Dimensions with different variances",
        size=(10, 4 * len(panels)),
        legend=True,
    )


def _variance(tour: Tour) -> Float[np.ndarray, " embed"]:
    return tour.positions.var(axis=0, dtype=np.float64)


@STUDY.define(
    "position-correlation",
    "correlation of neighbouring positions",
    "r [pos-1]; with more checkpoints: *_NAME",
)
def figure_position_correlation(run: WeightTourRun) -> Display:
    short = [tour.name for tour in run.tours if len(tour.positions) < 2]
    if short:
        raise NotDrawable(f"position-correlation needs two positions, and {short[0]} has one")
    arrays = run.arrays(lambda tour: {"r": np.asarray(neighbour_correlations(tour.positions))})
    panel = Lines(
        lines=run.overlaid(lambda tour: arrays[f"r{tour.suffix}"]),
        xlabel="Position",
        ylabel="Correlation with next position",
        title="Correlation between adjacent positions",
        grid=True,
    )
    return Display(
        arrays=arrays,
        panels=[[panel]],
        caption=f"Pearson's correlation of each position's embedding with the next one's; {run.names}.",
        size=(10, 4),
    )
