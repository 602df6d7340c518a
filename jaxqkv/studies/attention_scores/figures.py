"""The figures of the study `attention-scores`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxqkv.figures import style
from jaxqkv.figures.displays import Display, head_images, layer_lines, layer_map, layer_points
from jaxqkv.figures.distributions import Violins
from jaxqkv.figures.panels import Image, Line, Lines
from jaxqkv.kernels import Sample, freedman_diaconis_histogram
from jaxqkv.studies.attention_scores import STUDY
from jaxqkv.studies.attention_scores.run import (
    LAST_TOKEN_EDGES,
    PATTERN_EDGES,
    SCORE_EDGES,
    AttentionScoresRun,
    Reduced,
)

ORIGINAL_GRID = (4, 4)
# Sizes of the matrices of figure 1, and of the mask of figure 7a.
MATRIX_SIZES = np.arange(5, 101)
MASK_SIZE = 5


def _chosen(samples: Sequence[Sample]) -> list[np.ndarray]:
    """Returns the values that count, flat, in the order of the arrays."""
    return [np.asarray(s.values)[np.broadcast_to(s.where, s.values.shape)] for s in samples]


@STUDY.define("1", "standard deviation of matrix products, and what scaling does to it", "n, raw, scaled [size]")
def figure_1(run: AttentionScoresRun) -> Display:
    generator = np.random.default_rng(run.seed)
    products = [generator.normal(size=(n, n)) @ generator.normal(size=(n, n)) for n in MATRIX_SIZES]
    raw = np.array([product.std() for product in products])
    scaled = np.array([(product / np.sqrt(n)).std() for product, n in zip(products, MATRIX_SIZES, strict=True)])
    points: dict[str, Any] = {"marker": "o", "linestyle": ""}
    lines = [
        Line(x=MATRIX_SIZES, y=raw, label="No scaling", color=style.ACROSS, **points),
        Line(x=MATRIX_SIZES, y=scaled, label=r"$\sqrt{N}$ scaling", color=style.WITHIN, **points),
        Line(x=MATRIX_SIZES, y=np.sqrt(MATRIX_SIZES), label="Theory", color="r"),
    ]
    panel = Lines(lines=lines, xlabel="Matrix size", ylabel="Matrix standard deviation")
    return Display(
        arrays={"n": MATRIX_SIZES, "raw": raw, "scaled": scaled},
        panels=[[panel]],
        caption="Standard deviation of the product of two random normal N×N matrices, raw and divided by √N; "
        f"theory √N. Seed {run.seed}; no checkpoint is used.",
        size=(10, 4),
    )


@STUDY.define("3", "Q of every head of one layer", "q [head, pos, head_dim]")
def figure_3(run: AttentionScoresRun, of_layer: Mapping[str, Any]) -> Display:
    q = of_layer["q"][0][:, run.first_text]
    panels, grid = head_images(q.swapaxes(1, 2), "Qh", ORIGINAL_GRID, vmin=-2, vmax=2, origin="lower")
    corner = panels[-1][0]
    corner.xlabel, corner.ylabel = "Token position", "Head dim"
    return Display(
        arrays={"q": q},
        panels=panels,
        title=run.heading,
        caption=f"Q of every head of {run.where}, colours from −2 to 2.{grid}{run.of_first_text}{run.layer_note}",
        size=(12, 0.3 + 1.6 * len(panels)),
    )


@STUDY.define(
    "4",
    "scores of the last token within and across heads",
    "GROUP [score], density_GROUP [bin], edges_GROUP [edge]; GROUP: within, across",
)
def figure_4(run: AttentionScoresRun, of_layer: Mapping[str, Any]) -> Display:
    run.need_tokens(3, "figure 4")
    within, across = _chosen(of_layer["last_token"])
    arrays, lines = {"within": within, "across": across}, []
    samples = {
        "within": (within, "Same head", style.WITHIN),
        "across": (across, "Different heads", style.ACROSS),
    }
    samples = {name: sample for name, sample in samples.items() if sample[0].size}  # a model may have one head
    for name, (values, label, color) in samples.items():
        heights, edges = freedman_diaconis_histogram(values, density=True)
        arrays |= {f"density_{name}": heights, f"edges_{name}": edges}
        lines.append(Line(x=edges[:-1], y=heights, label=label, color=color))
    values, names, colors = zip(*samples.values(), strict=True)
    panels = [
        Violins(
            samples=values,
            names=names,
            colors=colors,
            seed=run.seed,
            zero_y=True,
            ylabel=f"{style.SCORE} dot products",
            title="A) Raw attention scores",
        ),
        Lines(lines=lines, xlabel=f"{style.SCORE} value", ylabel="Density", title="B) Distributions", zero_x=True),
    ]
    return Display(
        arrays=arrays,
        panels=[panels],
        title=run.heading,
        caption=f"Scores of the last token's Q in every head with the K of every head, {run.where}, at all earlier "
        f"positions but the first: same head and different heads.{run.of_texts}{run.layer_note}",
        size=(10, 4.3),
    )


@STUDY.define(
    "5a",
    "scores of the last token within and across heads by layer",
    "edges [edge], density [layer, within/across, bin]",
)
def figure_5a(run: AttentionScoresRun, last_token: Reduced) -> Display:
    run.need_tokens(3, "figure 5a")
    values = last_token["density"]
    panels = [
        layer_map(
            values[:, group],
            LAST_TOKEN_EDGES,
            cmap="magma",
            vmax=0.15,
            xlabel=f"{style.SCORE} activation value",
            title=("A) Within heads", "B) Across heads")[group],
            colorbar="Density" if group else "",
        )
        for group in (0, 1)
    ]
    return Display(
        arrays={"edges": LAST_TOKEN_EDGES, "density": values},
        panels=[panels],
        title=run.label,
        caption=f"Densities of figure 4's samples in each layer of {run.name}, colours from 0 to 0.15.{run.of_texts}",
        size=(10, 4.3),
    )


@STUDY.define("5b", "the same, averaged over layers", "edges [edge], mean, std [within/across, bin]")
def figure_5b(run: AttentionScoresRun, last_token: Reduced) -> Display:
    run.need_tokens(3, "figure 5b")
    values = last_token["density"]
    mean, std = values.mean(axis=0), values.std(axis=0)
    groups = zip(mean, std, ("Within heads", "Across heads"), (style.WITHIN, style.ACROSS), strict=True)
    lines = [Line(x=LAST_TOKEN_EDGES[:-1], y=m, band=s, label=label, color=color) for m, s, label, color in groups]
    panel = Lines(lines=lines, xlabel=f"{style.SCORE} activation value", ylabel="Density", xlim=(-20, 20))
    return Display(
        arrays={"edges": LAST_TOKEN_EDGES, "mean": mean, "std": std},
        panels=[[panel]],
        title=run.label,
        caption=f"Mean and standard deviation over the layers of {run.name} of figure 5a's densities.{run.of_texts}",
        size=(10, 4.3),
    )


@STUDY.define(
    "6",
    "all scores and their softmax by layer",
    "edges [edge], mean, std [layer], density [layer, bin], softmax_edges [layer, softmax_edge], softmax_density "
    "[layer, softmax_bin]",
)
def figure_6(run: AttentionScoresRun, scores: Reduced) -> Display:
    n_layer = len(scores["mean"])
    means = layer_points(scores["mean"], "h", face=0.45)
    for point, std in zip(means, scores["std"], strict=True):
        point.error = np.array([std])
    panels = [
        Lines(
            lines=means,
            xlabel="Transformer layer",
            ylabel="Activation mean",
            title=f"A) Means of {style.SCORE}",
            integer_x=True,
        ),
        Lines(
            lines=layer_lines([SCORE_EDGES[:-1]] * n_layer, scores["density"]),
            xlabel="Activation value",
            ylabel="Density",
            title=f"B) Distributions of {style.SCORE}",
        ),
        Lines(
            lines=layer_lines(scores["softmax_edges"][:, :-1], scores["softmax_density"]),
            xlabel="Softmax probability",
            ylabel="Density (log scale)",
            title=rf"C) Distributions of $\sigma$({style.SCORE})",
            log_y=True,
            xlim=(0, 1),
            colorbar="Transformer layer",
        ),
    ]
    names = ("mean", "std", "density", "softmax_edges", "softmax_density")
    return Display(
        arrays={"edges": SCORE_EDGES} | {name: scores[name] for name in names},
        panels=[panels],
        title=run.label,
        caption=f"All scores of each layer of {run.name}, before any mask: mean ± sample standard deviation, "
        f"densities, and densities of their unmasked softmax over keys.{run.of_texts}",
        size=(12, 3.9),
    )


@STUDY.define("7a", "what a causal mask does to the softmax", "mask, softmax [query, key]")
def figure_7a(run: AttentionScoresRun) -> Display:
    mask = np.triu(np.ones((MASK_SIZE, MASK_SIZE)), 1)
    softmax = np.tril(np.ones_like(mask)) / np.arange(1, MASK_SIZE + 1)[:, None]
    words = [[f"{value:.0f}" for value in row] for row in mask]
    infinite = [["−∞" if value else "0" for value in row] for row in mask]
    shares = [[f"{value:.2f}".rstrip("0").rstrip(".") for value in row] for row in softmax]
    titles = ("A) Binary mask (0 or 1)", "B) Time-causal mask (M)", "C) Impact of softmax")
    panels = [
        Image(
            values=values,
            texts=texts,
            cmap="viridis",
            vmin=0,
            vmax=1,
            aspect="equal",
            cells=True,
            xlabel="Token position",
            ylabel="Token position",
            title=title,
            colorbar="Attention weight" if title[0] == "C" else "",
        )
        for values, texts, title in zip((mask, mask, softmax), (words, infinite, shares), titles, strict=True)
    ]
    return Display(
        arrays={"mask": mask, "softmax": softmax},
        panels=[panels],
        caption="A causal mask of five tokens: 1 where a later token is hidden, the same as −∞ added to the scores, "
        "and the softmax of that mask alone. No checkpoint is used.",
        size=(10, 3.4),
    )


@STUDY.define(
    "7b",
    "causal attention to others and to oneself",
    "SAMPLE [weight]; SAMPLE: final_to_previous, self_other, self_first",
)
def figure_7b(run: AttentionScoresRun, of_layer: Mapping[str, Any]) -> Display:
    run.need_causal("figure 7b")
    run.need_tokens(2, "figure 7b")
    samples = _chosen(of_layer["causal"])
    names = ("final_to_previous", "self_other", "self_first")
    panel = Violins(
        samples=samples,
        names=("Final to\nprevious", "Self-attention,\nother tokens", "Self-attention,\nfirst token"),
        colors=(style.ACROSS, style.WITHIN, style.Q),
        seed=run.seed,
        ylabel="Softmax attention weight",
    )
    return Display(
        arrays=dict(zip(names, samples, strict=True)),
        panels=[[panel]],
        title=run.heading,
        caption=f"Attention weights of {run.where}, all heads: the last token to every earlier one, every token but "
        f"the first to itself, the first to itself (always 1).{run.of_texts}{run.layer_note}",
        size=(8, 4.3),
    )


@STUDY.define(
    "8",
    "causal attention to others and to oneself by layer",
    "edges [edge], density [layer, final_to_previous/self_other/self_first, bin]",
)
def figure_8(run: AttentionScoresRun, causal_pattern: Reduced) -> Display:
    run.need_causal("figure 8")
    run.need_tokens(2, "figure 8")
    values = causal_pattern["density"]
    titles = ("A) Final to previous", "B) Self-attention", "C) First to self")
    panels = [
        layer_map(
            values[:, index],
            PATTERN_EDGES,
            cmap="magma",
            vmax=0.5,
            xlabel="Softmax attention probability",
            title=title,
            colorbar="Density" if index == 2 else "",
        )
        for index, title in enumerate(titles)
    ]
    return Display(
        arrays={"edges": PATTERN_EDGES, "density": values},
        panels=[panels],
        title=run.label,
        caption=f"Densities of figure 7b's samples in each layer of {run.name}, colours from 0 to 0.5.{run.of_texts}",
        size=(12, 3.9),
    )


@STUDY.define("9", "scores of the whole width against the mean over heads", "all_heads, mean_of_heads [query, key]")
def figure_9(run: AttentionScoresRun, of_layer: Mapping[str, Any]) -> Display:
    real = np.ix_(run.first_text, run.first_text)
    all_heads, mean_of_heads = (np.asarray(of_layer[name])[real] for name in ("all_heads", "mean_of_heads"))
    points: dict[str, Any] = {"marker": "o", "linestyle": ""}
    difference = (all_heads - mean_of_heads).ravel()
    panels = [
        Lines(
            lines=[Line(x=all_heads.ravel(), y=mean_of_heads.ravel(), color=style.ACROSS, **points)],
            xlabel=r"$QK^\top$ ignoring heads",
            ylabel=r"Average of per-head $QK^\top$",
            title="A) Scatter plot of the two calculations",
            grid=True,
        ),
        Lines(
            lines=[Line(x=np.arange(difference.size), y=difference, color=style.WITHIN, **points)],
            xlabel=r"$QK^\top$ matrix index",
            ylabel="Difference",
            title="B) Differences between calculations",
        ),
    ]
    return Display(
        arrays={"all_heads": all_heads, "mean_of_heads": mean_of_heads},
        panels=[panels],
        title=run.heading,
        caption="QKᵀ of the whole width divided by √head_dim · n_head, and the mean over heads of the per-head "
        f"scores, {run.where}: the same number twice, up to rounding.{run.of_first_text}{run.layer_note}",
        size=(10, 4.3),
    )
