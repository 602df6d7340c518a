"""The figures of the study `head-silencing`."""

from typing import Any

import numpy as np

from jaxqkv.errors import NotDrawable
from jaxqkv.figures import style
from jaxqkv.figures.displays import Display, head_map, layer_map, strongest
from jaxqkv.figures.distributions import Bars
from jaxqkv.figures.panels import Line, Lines, plain
from jaxqkv.figures.tables import Table
from jaxqkv.kernels import freedman_diaconis_histogram
from jaxqkv.studies.head_silencing import STUDY
from jaxqkv.studies.head_silencing.run import HeadSilencingRun, Sweep

EDGES = np.linspace(0.6, 1, 32)
# Rows of a table of tokens, and limit of figure 4c's axes.
ROWS, LIMIT = 10, 0.4


def _need(run: HeadSilencingRun, found: Any) -> Any:
    """Returns a reduction that needs next-token logits, or refuses the figure.

    Raises:
      NotDrawable: for a model without next-token logits.
    """
    if found is None:
        raise NotDrawable(f"{run.name} has no next-token logits")
    return found


def _by_layer(values: np.ndarray, ylabel: str, **line: Any) -> Lines:
    lines = [Line(x=np.arange(len(values)), y=values, marker="o", **line)]
    return Lines(lines=lines, xlabel="Transformer layer", ylabel=ylabel, integer_x=True)


@STUDY.define(
    "2",
    "cosines between the hidden states of a text's positions, by layer",
    "cosine [layer, pair], counts [layer, bin], edges [edge]",
)
def figure_2(run: HeadSilencingRun, cosines: Any) -> Display:
    cosine = cosines[0]
    counts = np.stack([np.histogram(row, EDGES)[0] for row in cosine])
    panels = [
        _by_layer(cosine.mean(axis=1), "Mean cosine similarity"),
        layer_map(
            counts,
            EDGES,
            cmap="magma",
            vmax=max(0.8 * float(counts.max()), 1.0),
            xlabel="Cosine similarity",
            colorbar="Pairs",
        ),
    ]
    return Display(
        arrays={"cosine": cosine, "counts": counts, "edges": EDGES},
        panels=[panels],
        title=run.label,
        caption=f"Cosines between hidden states after each block of {run.name}, all pairs of positions but the first: "
        f"mean by layer, and histograms; {int((cosine < EDGES[0]).sum())} below {EDGES[0]} are not counted.",
        size=(10, 4),
    )


@STUDY.define(
    "3",
    "the same cosines with a head silenced",
    "difference [layer, pair], counts_LAYER [bin], edges_LAYER [edge]",
)
def figure_3(run: HeadSilencingRun, cosines: Any) -> Display:
    difference = cosines[0] - cosines[1]
    arrays, lines = {"difference": difference}, []
    layers = range(run.layer, len(difference))
    for layer in layers:
        heights, edges = freedman_diaconis_histogram(difference[layer], density=False)
        arrays |= {f"counts_{layer}": heights, f"edges_{layer}": edges}
        lines.append(Line(x=edges[:-1], y=heights, color=(layer - run.layer) / len(layers)))
    panels = [
        Lines(lines=lines, xlabel="Clean − silenced cosine", ylabel="Pairs", zero_x=True, colorbar="Layers after it"),
        _by_layer(difference.mean(axis=1), "Mean difference"),
    ]
    return Display(
        arrays=arrays,
        panels=[panels],
        title=f"Head {run.head} of layer {run.layer} of {run.label}",
        caption=f"Cosines of figure 2, clean − silenced, with head {run.head} of {run.where} silenced "
        f"({run.silenced}): histograms of the layers from the silenced one on, and the mean of every layer."
        f"{run.layer_note}",
        size=(10, 4),
    )


@STUDY.define("4a", "next-token log probabilities, clean and silenced", "clean, silenced [vocab]")
def figure_4a(run: HeadSilencingRun, runs: Any) -> Display:
    clean, silenced = _need(run, runs)
    points = Line(x=clean, y=silenced, marker=".", linestyle="", size=3, color=style.WITHIN)
    limits = np.array([min(clean.min(), silenced.min()), 0])
    scatter = Lines(
        lines=[points, Line(x=limits, y=limits, linestyle="--", color="0.5")],
        xlabel="Clean log probability",
        ylabel="Silenced log probability",
    )
    rows = []
    for one, two in zip(*(np.argsort(-each)[:ROWS] for each in (clean, silenced)), strict=True):
        rows.append((run.word(one), f"{clean[one]:.3f}", run.word(two), f"{silenced[two]:.3f}"))
    table = Table(heading=("Clean", "log p", "Silenced", "log p"), rows=rows)
    return Display(
        arrays={"clean": clean, "silenced": silenced},
        panels=[[scatter, table]],
        title=f"Head {run.head} of layer {run.layer} of {run.label}",
        caption=f"Log probabilities (nats) of the next token after the text, clean and with head {run.head} of "
        f"{run.where} silenced ({run.silenced}); the {len(rows)} largest of both.{run.layer_note}",
        size=(11, 4.5),
        text=table.text(),
    )


@STUDY.define(
    "4b",
    "most probable token with one head silenced in each layer",
    "token, log_probability [layer], clean []",
)
def figure_4b(run: HeadSilencingRun, sweep: Any) -> Display:
    found: Sweep = _need(run, sweep)
    token, log_probability = found.token[:, run.head], found.largest[:, run.head]
    clean = run.clean.max()
    panel = _by_layer(log_probability, "Largest log probability")
    panel.lines = [
        *panel.lines,
        Line(x=np.array([0, len(token) - 1]), y=np.full(2, clean), linestyle="--", color="0.5"),
    ]
    words = ", ".join(f"{layer}: {run.word(each)}" for layer, each in enumerate(token))
    return Display(
        arrays={"token": token, "log_probability": log_probability, "clean": clean},
        panels=[[panel]],
        title=f"Head {run.head} of {run.label}",
        caption=f"Largest log probability (nats) of the next token with head {run.head} of one layer of {run.name} "
        f"silenced ({run.silenced}); dashed, the clean one. Most probable tokens by layer: {words}.",
        size=(8, 4),
        text=f"Most probable token with head {run.head} of one layer silenced, by layer: {words}",
    )


@STUDY.define(
    "4c", "every head of one layer: changes of the log probabilities of two answers", "target, against, token [head]"
)
def figure_4c(run: HeadSilencingRun, fact: Any) -> Display:
    model, layer, text, words, changes, token = _need(run, fact)
    edges = np.arange(len(token) + 1) - 0.5
    panels = [
        Bars(heights=values, edges=edges, title=plain(repr(word)), xlabel="Head", ylabel="Change of log probability",
             ylim=(-LIMIT, LIMIT))
        for word, values in zip(words, changes, strict=True)
    ]  # fmt: skip
    said = ", ".join(f"{head}: {model.tokenizer.tokens([int(each)])[0]!r}" for head, each in enumerate(token))
    name = model.checkpoint.name
    return Display(
        arrays={"target": changes[0], "against": changes[1], "token": token},
        panels=[panels],
        title=f"Layer {layer} of {plain(name)}",
        caption=f"After {text!r}: change of the log probabilities (nats) of {words[0]!r} and {words[1]!r} with each "
        f"head of layer {layer} of {name} silenced ({run.silenced}). Most probable tokens by head: {said}.",
        size=(10, 4),
        text=f"Most probable token after {text!r} with one head of layer {layer} silenced, by head: {said}",
    )


def _changes(run: HeadSilencingRun, sweep: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the changes of the target's and of the largest log probability, and both clean ones."""
    found: Sweep = _need(run, sweep)
    clean = np.array([run.clean[run.target], run.clean.max()])
    return found.target - clean[0], found.largest - clean[1], clean


@STUDY.define(
    "5a",
    "every head silenced: changes of the target's log probability and of the largest",
    "target, largest [layer, head], clean [target/largest]",
)
def figure_5a(run: HeadSilencingRun, sweep: Any) -> Display:
    target, largest, clean = _changes(run, sweep)
    word = run.word(run.target)
    panels = [
        head_map(target, title=f"A) {plain(word)}", colorbar="Change"),
        head_map(largest, title="B) Most probable", colorbar="Change"),
    ]
    return Display(
        arrays={"target": target, "largest": largest, "clean": clean},
        panels=[panels],
        title=run.label,
        caption=f"Change of the log probability (nats) of {word} and of the most probable token with each head of "
        f"{run.name} silenced alone ({run.silenced}); clean {clean[0]:.3f} and {clean[1]:.3f}. Colours to ± twice the "
        f"mean of absolute values. Strongest in A (layer.head): {strongest(target)}.",
        size=(11, 4.5),
    )


@STUDY.define("5b", "their means and standard deviations over heads, by layer", "mean, std [layer, target/largest]")
def figure_5b(run: HeadSilencingRun, sweep: Any) -> Display:
    target, largest, _ = _changes(run, sweep)
    both = np.stack([target, largest], axis=-1)
    mean, std = both.mean(axis=1), both.std(axis=1)
    panels = []
    for index, name in enumerate((plain(run.word(run.target)), "Most probable")):
        panel = _by_layer(mean[:, index], "Change of log probability", error=std[:, index])
        panel.title, panel.zero_y = name, True
        panels.append(panel)
    return Display(
        arrays={"mean": mean, "std": std},
        panels=[panels],
        title=run.label,
        caption=f"Means and standard deviations over heads of figure 5a's changes, by layer of {run.name} "
        f"({run.silenced}).",
        size=(10, 4),
    )


@STUDY.define("5c", "the same sweep by its gradient", "exact, attribution [layer, head], r []")
def figure_5c(run: HeadSilencingRun, sweep: Any, gradient: Any) -> Display:
    exact, _, _ = _changes(run, sweep)
    attribution = _need(run, gradient)
    r = np.corrcoef(exact.ravel().astype(np.float64), attribution.ravel())[0, 1]
    points = Line(x=exact.ravel(), y=attribution.ravel(), marker="o", linestyle="", color=style.WITHIN)
    ends = np.array([exact.min(), exact.max()])
    maps = [
        head_map(exact, title="Exact", colorbar="Change"),
        head_map(attribution, title="First order", colorbar="Change"),
    ]
    scatter = Lines(
        lines=[points, Line(x=ends, y=ends, linestyle="--", color="0.5")],
        xlabel="Exact change",
        ylabel="First-order change",
        title=f"r = {r:.3f}",
    )
    return Display(
        arrays={"exact": exact, "attribution": attribution, "r": r},
        panels=[[*maps, scatter]],
        title=run.label,
        caption=f"Change of the log probability (nats) of {run.word(run.target)} with each head of {run.name} silenced "
        f"({run.silenced}): exact, and to first order, Σ (silenced z − z) · ∂ log p/∂z at the clean z. r = {r:.3f}.",
        size=(14, 4.2),
    )
