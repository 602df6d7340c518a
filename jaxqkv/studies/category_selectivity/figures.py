"""Figures 1 to 4: the words, their activations and similarities."""

from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from jaxqkv.errors import NotDrawable
from jaxqkv.figures import style
from jaxqkv.figures.displays import Display
from jaxqkv.figures.panels import Image, Line, Lines, Panel
from jaxqkv.studies.category_selectivity import STUDY
from jaxqkv.studies.category_selectivity.run import PAIRS, CategorySelectivityRun, Reduced
from jaxqkv.studies.category_selectivity.selectivity import rsa, rsa_intervals

LIMITS = {"vmin": 0.3, "vmax": 1.0}
NAMES = list(style.QKV)


def matrix(run: CategorySelectivityRun, values: Shaped[np.ndarray, "word word"], title: str, **image: Any) -> Image:
    """Returns an image of all pairs of words, with lines between categories."""
    ends = run.words.ends
    label = f"Word ({', '.join(run.words.categories)})"
    return Image(
        values=values, title=title, aspect="equal", vlines=ends, hlines=ends, xlabel=label, ylabel="Word", **image
    )


def against(
    values: Float[np.ndarray, "qkv sample"], r: Float[np.ndarray, "pair"], what: str, size: float
) -> list[Panel]:
    """Returns panels of Q against K, Q against V and K against V, with their correlations."""
    panels: list[Panel] = []
    for (pair, (a, b)), value in zip(PAIRS.items(), r, strict=True):
        points: dict[str, Any] = {"marker": "o", "linestyle": "", "color": style.GROUPS[pair], "size": size}
        panels.append(
            Lines(
                lines=[Line(x=values[a], y=values[b], **points)],
                xlabel=f"{NAMES[a]} {what}",
                ylabel=f"{NAMES[b]} {what}",
                title=f"{pair[0]}-{pair[1]}, r = {value:.2f}",
            )
        )
    return panels


@STUDY.define("1", "which pairs of words are compared", "same, upper, within, across [word, word]")
def figure_1(run: CategorySelectivityRun) -> Display:
    masks = run.words.masks()
    titles = ("A) Same category", "B) Above the diagonal", "C) Within categories", "D) Across categories")
    panels = [
        matrix(run, mask.astype(float), title, cmap="gray") for mask, title in zip(masks.values(), titles, strict=True)
    ]
    return Display(
        arrays=masks,
        panels=[panels],
        caption="Pairs of words (white) of one category, above the diagonal, both, and above the diagonal but of two "
        f"categories; no checkpoint is used.{run.of_words}",
        size=(15, 4.2),
    )


@STUDY.define(
    "2a",
    "Q, K and V against each other, all words and dimensions",
    "activations [qkv, word, head·head_dim], r [Q-K/Q-V/K-V]",
)
def figure_2a(run: CategorySelectivityRun, shown: Reduced) -> Display:
    activations, r = shown["activations"], shown["r"]
    return Display(
        arrays={"activations": activations, "r": r},
        panels=[against(activations.reshape(3, -1), r, "activation", 2)],
        title=run.heading,
        caption=f"Activations of all words and dimensions in {run.where}{run.at_position}, of Q, K and V against each "
        f"other, with their correlations.{run.of_words}{run.layer_note}",
        size=(13, 4.3),
    )


def by_layer(values: Float[np.ndarray, "layer pair"], **intervals: Any) -> list[Line]:
    """Returns a curve for each pair of Q, K and V, with shaded intervals if given."""
    layers = np.arange(len(values))
    low, high = intervals.get("low"), intervals.get("high")
    lines = []
    for index, pair in enumerate(PAIRS):
        between = None if low is None or high is None else (low[:, index], high[:, index])
        name = f"{pair[0]}-{pair[1]}"
        lines.append(
            Line(x=layers, y=values[:, index], label=name, color=style.GROUPS[pair], marker="o", interval=between)
        )
    return lines


@STUDY.define("2b", "correlations of Q, K and V by layer", "r [layer, Q-K/Q-V/K-V]")
def figure_2b(run: CategorySelectivityRun, layers: Reduced) -> Display:
    panel = Lines(
        lines=by_layer(layers["r"]), xlabel="Transformer layer", ylabel="Correlation", integer_x=True, zero_y=True
    )
    return Display(
        arrays={"r": layers["r"]},
        panels=[[panel]],
        title=run.label,
        caption=f"Figure 2a's correlations in each layer of {run.name}{run.at_position}.{run.of_words}",
        size=(8, 4.3),
    )


@STUDY.define("3a", "cosine similarities of words in Q, K and V", "similarity [qkv, word, word]")
def figure_3a(run: CategorySelectivityRun, shown: Reduced) -> Display:
    panels = [
        matrix(
            run,
            np.minimum(values, 1),
            name,
            **LIMITS,
            cmap="plasma",
            colorbar="Cosine similarity" if name == "V" else "",
        )
        for values, name in zip(shown["similarity"], NAMES, strict=True)
    ]
    return Display(
        arrays={"similarity": shown["similarity"]},
        panels=[panels],
        title=run.heading,
        caption=f"Cosine similarities between words over the whole width of Q, K and V in {run.where}, colours from "
        f"0.3 to 1, dashed lines between categories.{run.of_words}{run.layer_note}",
        size=(14, 4.6),
    )


@STUDY.define("3b", "similarities of words in Q, K and V against each other", "values [qkv, pair], r [Q-K/Q-V/K-V]")
def figure_3b(run: CategorySelectivityRun, shown: Reduced) -> Display:
    values = shown["similarity"][:, *np.triu_indices(len(run.words.words), 1)]
    r = rsa(shown["similarity"][None])[0]
    return Display(
        arrays={"values": values, "r": r},
        panels=[against(values, r, "cosine similarity", 3)],
        title=run.heading,
        caption=f"Cosine similarities of all pairs of words in {run.where}, of Q, K and V against each other, with "
        f"their correlations (RSA).{run.of_words}{run.layer_note}",
        size=(13, 4.3),
    )


@STUDY.define("4", "similarity of Q's, K's and V's representations by layer", "rsa, low, high [layer, Q-K/Q-V/K-V]")
def figure_4(run: CategorySelectivityRun, layers: Reduced) -> Display:
    if len(run.words.words) < 3:
        raise NotDrawable("figure 4 correlates pairs of words, and two words are a single pair")
    values = rsa(layers["similarity"])
    low, high = rsa_intervals(layers["similarity"], run.seed, run.permutations)
    panel = Lines(
        lines=by_layer(values, low=low, high=high), xlabel="Transformer layer", ylabel="RSA score", integer_x=True
    )
    return Display(
        arrays={"rsa": values, "low": low, "high": high},
        panels=[[panel]],
        title=run.label,
        caption=f"Figure 3b's correlations (RSA) in each layer of {run.name}; shaded, 95 % bootstrap intervals over "
        f"words ({run.permutations:,} resamples, seed {run.seed}; pairs of two copies of a word are left "
        f"out).{run.of_words}",
        size=(9, 4.5),
    )
