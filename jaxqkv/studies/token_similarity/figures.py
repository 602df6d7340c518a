"""The figures of the study `token-similarity`."""

import dataclasses
from collections.abc import Collection
from typing import Any

import numpy as np

from jaxqkv.figures import style
from jaxqkv.figures.displays import Display, layer_lines, layer_map, rows_of
from jaxqkv.figures.distributions import Bars
from jaxqkv.figures.panels import Image, Line, Lines
from jaxqkv.kernels import GROUPS, column_correlation, column_cosine, require_finite
from jaxqkv.studies.layers import nearest_index
from jaxqkv.studies.significance import LEVEL, q_values
from jaxqkv.studies.token_similarity import STUDY
from jaxqkv.studies.token_similarity.run import EDGES, Reduced, TokenSimilarityRun

CENTRES = (EDGES[:-1] + EDGES[1:]) / 2
HISTOGRAM_BINS = 100
# The original's choices among 54 sentences and 768 dimensions.
SENTENCES, DIMENSIONS = (1, 40), (123, 700)
ORIGINAL_SENTENCES, ORIGINAL_WIDTH = 54, 768
PAIRS_SHOWN = 20_000


@STUDY.define(
    "pairs",
    "Q and K of the target in two sentences, and two dimensions over sentences",
    "target [sentence, qkv·head·head_dim]",
)
def figure_pairs(run: TokenSimilarityRun, samples: Reduced) -> Display:
    q, k = samples["target"][:, : run.embed], samples["target"][:, run.embed : 2 * run.embed]
    one, two = (nearest_index(sentence, len(q), ORIGINAL_SENTENCES) for sentence in SENTENCES)
    a, b = (nearest_index(dimension, run.embed, ORIGINAL_WIDTH) for dimension in DIMENSIONS)
    points: dict[str, Any] = {"marker": "o", "linestyle": ""}
    axes: dict[str, Any] = {"xlabel": f"Sentence {one} target token", "ylabel": f"Sentence {two} target token"}
    panels = [
        Lines(lines=[Line(x=q[one], y=q[two], color=style.Q, **points)], title="Different tokens, same Q", **axes),
        Lines(lines=[Line(x=k[one], y=k[two], color=style.K, **points)], title="Different tokens, same K", **axes),
        Lines(
            lines=[Line(x=q[:, a], y=q[:, b], color=style.Q, marker="s", linestyle="")],
            title="All tokens, two Qs",
            xlabel=f"Q$_{{{a}}}$ activation",
            ylabel=f"Q$_{{{b}}}$ activation",
        ),
    ]
    return Display(
        arrays={"target": samples["target"]},
        panels=[panels],
        title=run.heading,
        caption=f"Q and K of the target {run.target_text!r} in sentences {one} and {two} (counted from 0), and its "
        f"Q dimensions {a} and {b} over {len(q)} sentences; {run.where}.{run.layer_note}{run.left_out}",
        size=(12, 4.1),
    )


def _matrix(run: TokenSimilarityRun, similarity: np.ndarray, what: str) -> Display:
    """Returns a display of a similarity matrix and the histogram of its upper triangle."""
    values = similarity[np.triu_indices(len(similarity), 1)]
    heights, edges = np.histogram(require_finite(values), bins=HISTOGRAM_BINS)
    panels = [
        Image(
            values=similarity,
            cmap="viridis",
            vmin=-0.4,
            vmax=0.4,
            aspect="equal",
            colorbar=what,
            xlabel="Dimension (Q, K, V)",
            ylabel="Dimension (Q, K, V)",
        ),
        Bars(heights=heights, edges=edges, xlabel=what, ylabel="Count", color=style.TARGET, outline=False),
    ]
    return Display(
        arrays={"similarity": similarity, "values": values, "counts": heights, "edges": edges},
        panels=[panels],
        title=run.heading,
        caption=f"{what} between all dimensions of Q, K and V of the target {run.target_text!r} over "
        f"{len(run.sentences)} sentences, colours from −0.4 to 0.4, and the histogram of the upper triangle "
        f"({HISTOGRAM_BINS} bins); {run.where}.{run.layer_note}{run.left_out}",
        size=(12, 4.7),
    )


@STUDY.define(
    "cosine",
    "cosine similarity of all dimensions of the target",
    "similarity [qkv·head·head_dim, qkv·head·head_dim], values [pair], counts [bin], edges [edge]",
)
def figure_cosine(run: TokenSimilarityRun, samples: Reduced) -> Display:
    return _matrix(run, np.asarray(column_cosine(samples["target"])), "Cosine similarity")


@STUDY.define(
    "correlation",
    "correlation of all dimensions of the target",
    "similarity [qkv·head·head_dim, qkv·head·head_dim], values [pair], counts [bin], edges [edge]",
)
def figure_correlation(run: TokenSimilarityRun, samples: Reduced) -> Display:
    return _matrix(run, np.asarray(column_correlation(samples["target"])), "Correlation")


@STUDY.define(
    "mask",
    "which pairs of dimensions are within and across Q, K and V",
    "vector [qkv·head·head_dim], matrix [qkv·head·head_dim, qkv·head·head_dim]",
)
def figure_mask(run: TokenSimilarityRun) -> Display:
    vector = np.repeat([1, 2, 3], run.embed)
    matrix = np.triu(vector[:, None] * vector[None, :], 1)
    dots = Line(x=np.arange(vector.size), y=vector, color="0.5", marker="s", linestyle="")
    panels = [
        Lines(
            lines=[dots],
            title="Vector mask",
            xlabel="Dimension index (Q, K, V)",
            ylabel="Matrix (1 Q, 2 K, 3 V)",
            yticks=(1, 2, 3),
        ),
        Image(
            values=matrix,
            cmap="viridis",
            aspect="equal",
            title="Matrix mask",
            xlabel="Indices",
            ylabel="Indices",
            colorbar="Product",
        ),
    ]
    return Display(
        arrays={"vector": vector, "matrix": matrix},
        panels=[panels],
        title=run.label,
        caption="1, 2 and 3 for the dimensions of Q, K and V; their products above the diagonal name the groups: "
        f"QQ 1, QK 2, QV 3, KK 4, KV 6, VV 9. Sizes of {run.name}.",
        size=(12, 4.5),
    )


def _group_lines(densities: np.ndarray, groups: Collection[str]) -> list[Line]:
    """Returns curves of some groups' densities, in the matrix's colour or in a blend of two."""
    order = list(GROUPS)
    return [Line(x=CENTRES, y=densities[order.index(g)], label=g, color=style.GROUPS[g]) for g in groups]


def _starred(line: Line, significant: bool) -> Line:
    """Returns a line, with a star in the legend if it is significant."""
    return dataclasses.replace(line, label=f"{line.label} *") if significant else line


@STUDY.define(
    "distributions",
    "similarities by group, target and non-target",
    "edges [edge], target, non_target [QQ/KK/VV/QK/QV/KV, bin], random [bin]; with --significance: p, q_value "
    "[QQ/KK/VV/QK/QV/KV]",
)
def figure_distributions(run: TokenSimilarityRun, group_densities: Reduced) -> Display:
    target, non_target, random = (group_densities[name] for name in ("target", "non_target", "random"))
    within, across = ("QQ", "KK", "VV"), ("QK", "QV", "KV")
    control = Line(x=CENTRES, y=random / 3, label="Random / 3", color="gray", linestyle="--")
    places = [
        (target, within, [control], "TARGET within-matrix"),
        (target, across, [], "TARGET across-matrix"),
        (non_target, within, [], "NON-TARGET within-matrix"),
        (non_target, across, [], "NON-TARGET across-matrix"),
    ]
    panels = [
        Lines(
            lines=_group_lines(densities, groups) + extra,
            title=title,
            xlabel=run.measure.capitalize(),
            ylabel="Density",
            xlim=(-1, 1),
            ylim=(0, None),
        )
        for densities, groups, extra, title in places
    ]
    arrays, tested = {"edges": EDGES, "target": target, "non_target": non_target, "random": random}, ""
    if run.significance:
        p = group_densities["p"]
        arrays |= {"p": p, "q_value": q_values(p)[0]}
        tested = f" A star in the legend: {run.tested}"
        significant = [group for group, q in zip(GROUPS, arrays["q_value"], strict=True) if q < LEVEL]
        for panel in panels:
            panel.lines = [_starred(line, line.label in significant) for line in panel.lines]
    return Display(
        arrays=arrays,
        panels=rows_of(panels, 2),
        title=run.heading,
        caption=f"Densities of the {run.measure} between dimensions over {len(run.sentences)} sentences, by group, for "
        f"the target {run.target_text!r} and the token before it; dashed, the cosine similarity after all entries of "
        f"the target were shuffled (seed {run.seed}), divided by 3; {run.where}.{run.layer_note}{run.left_out}{tested}",
        size=(14, 6.7),
    )


@STUDY.define("means", "mean activation of every dimension of the target", "mean [qkv·head·head_dim]")
def figure_means(run: TokenSimilarityRun, samples: Reduced) -> Display:
    mean = samples["target"].mean(axis=0)
    lines = []
    for index, (name, color) in enumerate(style.QKV.items()):
        x = np.arange(index * run.embed, (index + 1) * run.embed)
        lines.append(Line(x=x, y=mean[x], label=name, color=color, marker=style.MARKERS[name], linestyle=""))
    panel = Lines(lines=lines, xlabel="Neurons", ylabel="Token average activation", xlim=(-5, 3 * run.embed + 4))
    return Display(
        arrays={"mean": mean},
        panels=[[panel]],
        title=run.heading,
        caption=f"Mean over {len(run.sentences)} sentences of every Q, K and V dimension of the target "
        f"{run.target_text!r}; {run.where}.{run.layer_note}{run.left_out}",
        size=(10, 4.3),
    )


@STUDY.define("pair-order", "similarities of Q pairs in the order of the upper triangle", "values [pair]")
def figure_pair_order(run: TokenSimilarityRun, samples: Reduced) -> Display:
    qq = run.similarity(samples["target"])[: run.embed, : run.embed]
    values = qq[np.triu_indices(run.embed, 1)][:PAIRS_SHOWN]
    panel = Lines(
        lines=[Line(x=np.arange(values.size), y=values, color=style.Q, marker=".", linestyle="")],
        xlabel="Q pairs",
        ylabel=run.measure.capitalize(),
        title=f"Target-related {run.measure} in Q-Q pairs",
        xlim=(-5, values.size + 4),
    )
    return Display(
        arrays={"values": values},
        panels=[[panel]],
        title=run.heading,
        caption=f"The first {values.size:,} {run.measure}s between Q dimensions of the target {run.target_text!r}, in "
        f"the order of the upper triangle; {run.where}.{run.layer_note}{run.left_out}",
        size=(10, 4.3),
    )


@STUDY.define(
    "laminar",
    "similarities, means and variances by layer",
    "edges [edge], target, non_target [layer, QQ/KK/VV/QK/QV/KV, bin], mean, variance [layer, qkv]; with "
    "--significance: p, q_value [layer, QQ/KK/VV/QK/QV/KV]",
)
def figure_laminar(run: TokenSimilarityRun, laminar: Reduced) -> Display:
    densities, mean, variance = (laminar[name] for name in ("densities", "mean", "variance"))
    n_layer = len(densities)
    order = list(GROUPS)
    rows = []
    for index, kind in enumerate(("target", "non-target")):
        row = []
        for group in ("QQ", "KV"):
            values = densities[:, index, order.index(group)]
            image = layer_map(
                values,
                EDGES,
                cmap="magma",
                vmax=float(densities[:, :, order.index(group)].max()),
                xlabel=run.measure.capitalize(),
                title=f"{group}, {kind}",
                colorbar="Density",
            )
            curves = Lines(
                lines=layer_lines([CENTRES] * n_layer, values),
                xlabel=run.measure.capitalize(),
                ylabel="Density",
                title=f"{group}, {kind}",
                xlim=(-1, 1),
                ylim=(0, None),
                colorbar="Transformer layer",
            )
            row += [image, curves]
        rows.append(row)
    layers = np.arange(n_layer)
    rows.append(
        [
            Lines(
                lines=[
                    Line(x=layers, y=values[:, i], label=name, color=color, marker=style.MARKERS[name])
                    for i, (name, color) in enumerate(style.QKV.items())
                ],
                xlabel="Transformer layer",
                ylabel=ylabel,
                title=f"{ylabel} of the target's activations",
                integer_x=True,
            )
            for values, ylabel in ((mean, "Mean"), (variance, "Variance"))
        ]
    )
    arrays = {
        "edges": EDGES,
        "target": densities[:, 0],
        "non_target": densities[:, 1],
        "mean": mean,
        "variance": variance,
    }
    tested = ""
    if run.significance:
        arrays |= {"p": laminar["p"], "q_value": q_values(laminar["p"])[0]}
        for row in rows[:2]:
            for place, group in ((1, "QQ"), (3, "KV")):
                count = int((arrays["q_value"][:, order.index(group)] < LEVEL).sum())
                row[place].title += f" (* in {count} of {n_layer} layers)"
        tested = f" Stars: {run.tested}"
    return Display(
        arrays=arrays,
        panels=rows,
        title=run.label,
        caption=f"Densities of the {run.measure} between Q dimensions (QQ) and between K and V dimensions (KV) in "
        f"every layer of {run.name}, for the target {run.target_text!r} and the token before it, over "
        f"{len(run.sentences)} sentences; mean and variance of the target's Q, K and V.{run.left_out}{tested}",
        size=(18, 11),
    )
