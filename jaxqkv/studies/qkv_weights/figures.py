"""The figures of the study `qkv-weights`."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxqkv.figures import style
from jaxqkv.figures.displays import Display, head_images, layer_map, rows_of
from jaxqkv.figures.distributions import Bars
from jaxqkv.figures.panels import Image, Line, Lines, Panel, plain
from jaxqkv.figures.tables import Table
from jaxqkv.kernels import column_cosine, freedman_diaconis_histogram, head_pair_masks, require_finite
from jaxqkv.studies.qkv_weights import STUDY
from jaxqkv.studies.qkv_weights.heads import head_tests
from jaxqkv.studies.qkv_weights.run import COSINE_EDGES, WEIGHT_EDGES, QKVWeightsRun, Reduced
from jaxqkv.studies.significance import stars

ORIGINAL_GRID = (3, 4)
MATRICES = ("Q", "K", "V")


def _label(matrix: str) -> str:
    return rf"$\mathbf{{W_{matrix}}}$"


def _by_matrix(x: np.ndarray, columns: np.ndarray, markers: bool) -> list[Line]:
    """Returns three curves in the colours of Q, K and V, given `columns [x, qkv]`."""
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


def _across_models(run: QKVWeightsRun, moments: Sequence[Reduced], caption: str) -> Display:
    """Returns a display with a row of means and standard deviations for every model."""
    arrays: dict[str, np.ndarray] = {}
    rows = []
    for name, reduced in zip(run.names, moments, strict=True):
        mean, std = reduced["mean"], reduced["std"]
        arrays |= {f"mean_{name}": mean, f"std_{name}": std}
        rows.append(_mean_and_std(mean, std, title=plain(name)))
    return Display(arrays=arrays, panels=rows, caption=caption, size=(10, 0.7 + 2.4 * len(rows)), legend=True)


@STUDY.define(
    "1",
    "table of the models and their attention parameters",
    "model, n_embd, n_layer, n_head, head_dim, attention_parameters [model]",
)
def figure_1(run: QKVWeightsRun) -> Display:
    rows = []
    for weights in run.weights:
        config = weights.config
        # W_Q, W_K, W_V and W_O, each with a bias.
        width, inner = config.n_embd, config.attention_width
        parameters = config.n_layer * (4 * width * inner + 3 * inner + width)
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


@STUDY.define("2a", "W_Q, W_K and W_V of one layer as one wide matrix", "weights [embed, qkv·head·head_dim]")
def figure_2a(run: QKVWeightsRun) -> Display:
    inner = run.config.attention_width
    image = Image(
        values=run.wide,
        vmin=-0.1,
        vmax=0.1,
        colorbar="Weight value",
        vlines=(inner - 0.5, 2 * inner - 0.5),
        xticks=(),
        xlabel="Queries dimensions   |   Keys dimensions   |   Values dimensions",
        ylabel="Embeddings dimensions",
    )
    caption = f"Attention weights of {run.where}, colours from −0.1 to 0.1.{run.layer_note}"
    return Display(arrays={"weights": run.wide}, panels=[[image]], caption=caption, title=run.heading, size=(10, 3.7))


@STUDY.define(
    "2b",
    "histograms of W_Q, W_K and W_V of one layer",
    "counts_MATRIX [bin], edges_MATRIX [edge]; MATRIX: q, k, v; with --compare: *_NAME",
)
def figure_2b(run: QKVWeightsRun) -> Display:
    arrays: dict[str, np.ndarray] = {}
    lines = []
    for each in run.shown:
        for name, matrix in zip(MATRICES, np.split(each.weights.W_QKV(each.layer), 3, axis=1), strict=True):
            heights, edges = freedman_diaconis_histogram(matrix)
            arrays |= {f"counts_{name.lower()}{each.suffix}": heights, f"edges_{name.lower()}{each.suffix}": edges}
            label = _label(name) + (f" {plain(each.name)}" if run.compared else "")
            lines.append(Line(x=edges[:-1], y=heights, label=label, color=style.QKV[name], linestyle=each.line))
    title = f"Distribution of QKV weights{run.in_model}, layer {run.layer}"
    panel = Lines(lines=lines, xlabel="Weight value", ylabel="Count", title=title)
    others = "".join(f"; layer {each.layer} of {each.name}" for each in run.shown[1:])
    caption = (
        f"Weights of {run.where}{others} counted in Freedman–Diaconis bins, each sample's own, drawn at left "
        f"edges.{run.layer_note}"
    )
    return Display(arrays=arrays, panels=[[panel]], caption=caption, size=(8, 3.4))


@STUDY.define(
    "2c",
    "distributions of W_Q, W_K and W_V by layer",
    "edges [edge], density [layer, qkv, bin]; with --compare: density_NAME [layer, qkv, bin]",
)
def figure_2c(run: QKVWeightsRun, densities: Sequence[Reduced]) -> Display:
    arrays, rows = {"edges": WEIGHT_EDGES}, []
    for each, reduced in zip(run.shown, densities, strict=True):
        values = reduced["density"]
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


@STUDY.define(
    "2d",
    "mean and standard deviation of W_Q, W_K and W_V by layer",
    "mean, std [layer, qkv]; with --compare: *_NAME",
)
def figure_2d(run: QKVWeightsRun, moments: Sequence[Reduced]) -> Display:
    arrays: dict[str, np.ndarray] = {}
    panels: list[Lines] = []
    for each, reduced in zip(run.shown, moments, strict=True):
        mean, std = reduced["mean"], reduced["std"]
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


@STUDY.define("3", "means and standard deviations by layer, every model", "mean_NAME, std_NAME [layer, qkv]")
def figure_3(run: QKVWeightsRun, moments_of_models: Sequence[Reduced]) -> Display:
    return _across_models(
        run, moments_of_models, "Mean and sample standard deviation of the weights of each layer, one row a model."
    )


@STUDY.define("4a", "W_Q of every head of one layer", "heads [head, embed, head_dim]")
def figure_4a(run: QKVWeightsRun) -> Display:
    heads = run.first.W_Q(run.layer, by_head=True)
    panels, grid = head_images(heads.swapaxes(1, 2), "H", ORIGINAL_GRID, vmin=-0.1, vmax=0.1)
    corner = panels[-1][0]
    corner.xlabel, corner.ylabel = "Embeddings dimensions", "Head dimension"
    caption = f"W_Q of every head of {run.where}, transposed, colours from −0.1 to 0.1.{grid}{run.layer_note}"
    return Display(
        arrays={"heads": heads}, panels=panels, caption=caption, title=run.heading, size=(10, 0.3 + 1.7 * len(panels))
    )


@STUDY.define(
    "4b",
    "cosine similarity of the columns of head 0 of W_Q",
    "similarity [head_dim, head_dim], values [pair]",
)
def figure_4b(run: QKVWeightsRun) -> Display:
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


@STUDY.define(
    "5a",
    "cosine similarities within and across heads of one layer",
    "density_MATRIX_GROUP [bin], edges_MATRIX_GROUP [edge]; MATRIX: q, k; GROUP: within, across",
)
def figure_5a(run: QKVWeightsRun) -> Display:
    arrays: dict[str, np.ndarray] = {}
    panels: list[Panel] = []
    masks = np.asarray(head_pair_masks(n_head=run.config.n_head, head_dim=run.config.head_dim))
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


@STUDY.define(
    "5b",
    "cosine similarities within and across heads by layer",
    "edges [edge], density [layer, qk, within/across, bin]",
)
def figure_5b(run: QKVWeightsRun, head_cosines: Sequence[Reduced]) -> Display:
    values = head_cosines[0]["density"]
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


@STUDY.define(
    "5c",
    "mean and standard deviation of the similarities by layer",
    "mean, std [layer, qk, within/across]; with --significance: p, q_value [layer, qk]",
)
def figure_5c(run: QKVWeightsRun, head_cosines: Sequence[Reduced]) -> Display:
    mean, std = head_cosines[0]["mean"], head_cosines[0]["std"]
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
    arrays = {"mean": mean, "std": std}
    if run.significance:
        (found,) = head_tests([run.first], 2, run.seed, run.permutations)
        arrays |= found._asdict()
        for (matrix, group), q in zip(np.ndindex(2, 2), found.q_value.T.repeat(2, axis=0), strict=True):
            color = (style.WITHIN, style.ACROSS)[group]
            panels[0].lines = [*panels[0].lines, stars(np.arange(len(q)), mean[:, matrix, group], q, color)]
    return Display(
        arrays=arrays,
        panels=[panels],
        caption=f"Mean and population standard deviation of figure 5b's samples in each layer of {run.name}."
        f"{run.tested}",
        title=run.label,
        size=(12, 4.4),
        legend=True,
    )


@STUDY.define(
    "6",
    "cosine similarities of all columns by layer, every model",
    "mean_NAME, std_NAME [layer, qkv]; with --significance: p_NAME, q_value_NAME [layer, qkv]",
)
def figure_6(run: QKVWeightsRun, column_cosines_of_models: Sequence[Reduced]) -> Display:
    display = _across_models(
        run,
        column_cosines_of_models,
        "Mean and sample standard deviation of the cosine similarities of all pairs of columns of W_Q, W_K and W_V "
        f"in each layer, one row a model.{run.tested}",
    )
    if not run.significance:
        return display
    arrays = dict(display.arrays)
    tests = head_tests(run.weights, 3, run.seed, run.permutations)
    for name, (panel, _), found in zip(run.names, display.panels, tests, strict=True):
        arrays |= {f"{key}_{name}": values for key, values in found._asdict().items()}
        assert isinstance(panel, Lines)  # as `_across_models` makes them
        x, mean = np.arange(len(found.q_value)), arrays[f"mean_{name}"]
        marks = [stars(x, mean[:, i], found.q_value[:, i], style.QKV[matrix]) for i, matrix in enumerate(MATRICES)]
        panel.lines = [*panel.lines, *marks]
    return dataclasses.replace(display, arrays=arrays)
