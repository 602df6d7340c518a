"""Figures of W_Q by head, and of how W_Q, W_K and W_V differ from fresh weights."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxqkv.errors import NotDrawable
from jaxqkv.figures import style
from jaxqkv.figures.displays import Display, rows_of
from jaxqkv.figures.distributions import Dendrogram
from jaxqkv.figures.panels import Image, Line, Lines, Panel, extremes
from jaxqkv.studies.weight_tour import STUDY
from jaxqkv.studies.weight_tour.run import ENDS, ByCheckpoint, Tour, WeightTourRun


def _query_rows(tour: Tour, as_published: bool) -> Float[np.ndarray, "head weight"]:
    """Returns W_Q as a row for each head; as published, the first third of the wide matrix's rows in as many pieces."""
    n_head = tour.config.n_head
    if as_published:
        return tour.wide[: tour.config.n_embd // 3].reshape(n_head, -1)
    return tour.weights.W_Q(tour.layer, by_head=True).reshape(n_head, -1)


@STUDY.define(
    "query-heads",
    "W_Q of one layer as one row a head",
    "heads [head, embed·head_dim]; with more checkpoints: *_NAME",
)
def figure_query_heads(run: WeightTourRun) -> Display:
    heads = {tour.name: _query_rows(tour, run.as_published) for tour in run.tours}
    smallest, largest = extremes(*heads.values())
    panels = [
        Image(
            values=heads[tour.name],
            cmap="viridis",
            vmin=smallest,
            vmax=largest,
            title=f"Query weights by head, {tour.where}" + (" (as published)" if run.as_published else ""),
            xlabel="Weight index",
            ylabel="Piece" if run.as_published else "Attention head",
            colorbar="Weight value",
        )
        for tour in run.tours
    ]
    how = (
        "The first third of the rows of the wide matrix, cut into as many pieces as there are heads: as published, and "
        "not the queries of heads"
        if run.as_published
        else "W_Q with a row for each head, input dimension by input dimension"
    )
    return Display(
        arrays=run.arrays(lambda tour: {"heads": heads[tour.name]}),
        panels=rows_of(panels, 1),
        caption=f"{how}; {run.at_layers}.",
        size=(11, 4.6 * len(panels)),
    )


def _head_vectors(tour: Tour, layer: int, as_published: bool) -> Float[np.ndarray, "head embed"]:
    """Returns the mean over the columns of each head's W_Q; as published, over equal pieces of the wide matrix."""
    matrix = tour.weights.W_QKV(layer) if as_published else tour.weights.W_Q(layer)
    return matrix.reshape(len(matrix), tour.config.n_head, -1).mean(axis=-1, dtype=np.float64).T


@STUDY.define(
    "head-clusters",
    "clusters of heads in the first and last layers",
    "layers [shown_layer], linkage [shown_layer, head-1, left/right/distance/count]; with more checkpoints: *_NAME",
)
def figure_head_clusters(run: WeightTourRun) -> Display:
    from scipy.cluster.hierarchy import linkage

    left_out: dict[str, str] = {}
    linkages: dict[str, Float[np.ndarray, "layer merge four"]] = {}
    for tour in run.tours:
        vectors = [_head_vectors(tour, layer, run.as_published) for layer in tour.ends]
        if tour.config.n_head < 2:
            left_out[tour.name] = f"head-clusters needs two heads, and {tour.name} has one"
        elif not np.isfinite(vectors).all():
            left_out[tour.name] = f"head-clusters: weights of {tour.name} are NaN or infinite"
        else:
            linkages[tour.name] = np.stack([linkage(each, "ward") for each in vectors])
    if run.first.name in left_out:
        raise NotDrawable(left_out[run.first.name])
    shown = [tour for tour in run.tours if tour.name in linkages]
    highest = 1.05 * max(trees[:, :, 2].max() for trees in linkages.values())
    arrays: dict[str, Any] = {}
    panels: list[Sequence[Panel]] = []
    for tour in shown:
        arrays |= {f"layers{tour.suffix}": np.array(tour.ends), f"linkage{tour.suffix}": linkages[tour.name]}
        each = [
            Dendrogram(
                linkage=tree,
                color=tour.color,
                xlabel="Piece" if run.as_published else "Attention head",
                ylabel="Distance",
                ylim=(0, highest or 1),
                title=f"Layer {layer} of {tour.label}" + (" (as published)" if run.as_published else ""),
            )
            for layer, tree in zip(tour.ends, linkages[tour.name], strict=True)
        ]
        panels += rows_of(each, min(ENDS, len(each)))
    what = (
        "pieces of the wide matrix, as many as heads: as published, and not heads (a piece has columns of Q, K and V)"
        if run.as_published
        else "heads, each the mean over its columns of W_Q"
    )
    return Display(
        arrays=arrays,
        panels=panels,
        caption=f"Ward's clustering of {what}, in the first and last layers of {', '.join(linkages)}."
        + "".join(f" (Not drawn: {reason}.)" for reason in left_out.values()),
        size=(13, 3.6 * len(panels)),
    )


# --- trained or not ---


@STUDY.define(
    "training-signature",
    "what tells trained weights from fresh ones, by layer",
    "ks, kurtosis, effective_rank, largest_singular_value [layer, qkv]; with more checkpoints: *_NAME",
)
def figure_training_signature(run: WeightTourRun, signature: ByCheckpoint) -> Display:
    titles = {
        "ks": "KS distance from normal",
        "kurtosis": "Excess kurtosis",
        "effective_rank": "Effective rank",
        "largest_singular_value": "Largest singular value",
    }
    several = len(run.tours) > 1
    panels = []
    for name, title in titles.items():
        lines = []
        for tour in run.tours:
            values = signature[tour.name][name]
            for column, (matrix, color) in enumerate(style.QKV.items()):
                label = rf"$\mathbf{{W_{matrix}}}$" + (f" {tour.label}" if several else "")
                lines.append(
                    Line(
                        x=np.arange(len(values)),
                        y=values[:, column],
                        label=label,
                        color=color,
                        linestyle=tour.line,
                        marker=style.MARKERS[matrix],
                    )
                )
        panels.append(Lines(lines=lines, xlabel="Layer", ylabel=title, title=title, integer_x=True))
    return Display(
        arrays=run.arrays(lambda tour: signature[tour.name]),
        panels=rows_of(panels, 2),
        caption="Kolmogorov and Smirnov's distance from a normal distribution, excess kurtosis, effective rank (the "
        "exponential of the entropy of the normalised singular values) and largest singular value of W_Q, W_K and W_V "
        f"in each layer; {run.names}.",
        legend=True,
        size=(13, 8),
    )
