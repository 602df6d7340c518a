"""The figures of the study `head-patching`."""

from typing import Any

import numpy as np

from jaxqkv.errors import NotDrawable
from jaxqkv.figures import style
from jaxqkv.figures.displays import Display, head_map, rows_of, strongest
from jaxqkv.figures.panels import Image, Line, Lines, Panel, plain
from jaxqkv.studies.head_patching import STUDY
from jaxqkv.studies.head_patching.run import HeadPatchingRun, Scores

# Percentiles of figure 3a's colours, colour limit and step of layers in figure 4, and columns of both.
COLOURS, LIMIT, STEP, COLUMNS = (2, 98), 0.4, 3, 5


def _need(run: HeadPatchingRun, found: Any) -> Any:
    """Returns a reduction that needs next-token logits, or refuses the figure.

    Raises:
      NotDrawable: for a model without next-token logits.
    """
    if found is None:
        raise NotDrawable(f"{run.name} has no next-token logits")
    return found


def _over_heads(values: np.ndarray) -> Lines:
    """Returns a panel of the mean and population standard deviation over heads, of values `[layer, head]`."""
    line = Line(x=np.arange(len(values)), y=values.mean(axis=1), error=values.std(axis=1), marker="o")
    return Lines(lines=[line], xlabel="Transformer layer", ylabel="ΔIOI", integer_x=True, zero_y=True)


@STUDY.define(
    "1",
    "log probabilities of the next token after both texts",
    "clean, donor [vocab], score_clean, score_donor []",
)
def figure_1(run: HeadPatchingRun, scores: Any) -> Display:
    found: Scores = _need(run, scores)
    points: dict[str, Any] = {"marker": ".", "linestyle": "", "size": 3}
    tokens = np.arange(len(found.clean))
    colors = (style.WITHIN, style.ACROSS)
    marks = [
        [Line(x=np.array([token]), y=each[[token]], marker="s", linestyle="", color=color, label=word if not i else "")
         for token, word, color in zip(run.answers[0], map(plain, run.pairs[0].answers), colors, strict=True)]
        for i, each in enumerate((found.clean, found.donor))
    ]  # fmt: skip
    panels: list[Panel] = [
        Lines(lines=[Line(x=tokens, y=each, color="0.6", **points), *marked], xlabel="Token", ylabel="Log probability",
              title=title)
        for each, marked, title in zip((found.clean, found.donor), marks, ("Clean", "Donor"), strict=True)
    ]  # fmt: skip
    both = [
        Line(x=found.clean[[token]], y=found.donor[[token]], marker="s", linestyle="", color=color)
        for token, color in zip(run.answers[0], colors, strict=True)
    ]
    ends = np.array([min(found.clean.min(), found.donor.min()), 0])
    lines = [Line(x=found.clean, y=found.donor, color="0.6", **points), *both, Line(x=ends, y=ends, linestyle="--")]
    panels.append(Lines(lines=lines, xlabel="Clean", ylabel="Donor"))
    clean, donor = found.score_clean.mean(), found.score_donor.mean()
    pair = run.pairs[0]
    return Display(
        arrays={"clean": found.clean, "donor": found.donor, "score_clean": clean, "score_donor": donor},
        panels=[panels],
        title=run.label,
        caption=f"Log probabilities (nats) of the next token of {run.name} after {pair.clean!r} (clean) and "
        f"{pair.donor!r} (donor); squares, {pair.answers[0]!r} and {pair.answers[1]!r}. IOI score, the logit of the "
        f"first minus that of the second: {clean:.3f} clean, {donor:.3f} donor.{run.of_pairs}",
        size=(14, 4),
    )


@STUDY.define("2", "every head shuffled", "delta, norm [layer, head]")
def figure_2(run: HeadPatchingRun, shuffled: Any) -> Display:
    delta, norm = _need(run, shuffled)
    layers = np.repeat(np.arange(len(delta)), delta.shape[1]) / len(delta)
    points = [
        Line(x=norm[layer], y=delta[layer], marker="o", linestyle="", color=float(layers[layer * delta.shape[1]]))
        for layer in range(len(delta))
    ]
    against = Lines(lines=points, xlabel="Norm of z", ylabel="ΔIOI", zero_y=True, colorbar="Layer")
    repeats = run.options.repeats
    how = f"; mean over {repeats} shuffles" if repeats > 1 else ""
    return Display(
        arrays={"delta": delta, "norm": norm},
        panels=[[head_map(delta, colorbar="ΔIOI"), _over_heads(delta), against]],
        title=run.label,
        caption=f"Change of the IOI score with z of each head of {run.name} shuffled over positions and dimensions "
        f"together (seed {run.options.seed}{how}): by head, mean and standard deviation over heads, and against the "
        f"norm of z over both. Colours to ± twice the mean of absolute values. Strongest (layer.head): "
        f"{strongest(delta)}.{run.of_pairs}",
        size=(14, 4.2),
    )


@STUDY.define("3a", "z of every head by token, in one layer of the donor", "z [pos, head, head_dim]")
def figure_3a(run: HeadPatchingRun, z: Any) -> Display:
    values = z[run.layer]
    panels = []
    for token, each in zip(run.tokens(run.donor, 0), values, strict=True):
        finite = each[np.isfinite(each)]
        low, high = np.percentile(finite, COLOURS) if finite.size else (0.0, 1.0)
        panels.append(Image(values=each, vmin=float(low), vmax=float(high), title=plain(repr(token)), xticks=()))
    panels[0].ylabel = "Head"
    rows = rows_of(panels, COLUMNS)
    return Display(
        arrays={"z": values},
        panels=rows,
        title=run.heading,
        caption=f"z of every head (rows) and dimension (columns) at each token of the donor, {run.where}; colours from "
        f"the {COLOURS[0]}nd to the {COLOURS[1]}th percentile of each token.{run.layer_note}",
        size=(12, 0.4 + 2.2 * len(rows)),
    )


@STUDY.define("3b", "norm of z by layer and token of the donor", "norm [layer, pos]")
def figure_3b(run: HeadPatchingRun, z: Any) -> Display:
    norm = np.linalg.norm(z, axis=-1).mean(axis=-1)
    image = Image(values=norm, origin="lower", ylabel="Transformer layer", xlabel="Token", colorbar="Norm of z",
                  integer_y=True)  # fmt: skip
    words = " ".join(map(repr, run.tokens(run.donor, 0)))
    return Display(
        arrays={"norm": norm},
        panels=[[image]],
        title=run.label,
        caption=f"Euclidean norm of z, mean over heads, by layer of {run.name} and token of the donor: {words}.",
        size=(8, 5),
    )


@STUDY.define("4", "z at the two places of a name, by layer", "difference [layer, head, head_dim], ratio [layer]")
def figure_4(run: HeadPatchingRun, z: Any) -> Display:
    first, second = run.places()
    difference = z[:, first] - z[:, second]
    sizes = np.sort(np.abs(difference).mean(axis=-1), axis=1)
    few = min(2, sizes.shape[1])
    ratio = sizes[:, -few:].mean(axis=1) / sizes[:, :few].mean(axis=1)
    drawn = range(0, len(difference), STEP)
    panels = [
        Image(values=difference[layer], cmap="RdBu_r", vmin=-LIMIT, vmax=LIMIT, title=f"Layer {layer}", xticks=())
        for layer in drawn
    ]
    line = Line(x=np.arange(len(ratio)), y=ratio, marker="o")
    last = Lines(lines=[line], xlabel="Transformer layer", ylabel="Ratio", integer_x=True, wide=True)
    return Display(
        arrays={"difference": difference, "ratio": ratio},
        panels=[*rows_of(panels, COLUMNS), [last]],
        title=run.label,
        caption="z of every head (rows) and dimension (columns) at the first minus the second "
        f"{run.pairs[0].answers[0]!r} of the donor, positions {first} and {second}, every third layer of {run.name}, "
        f"colours ±{LIMIT}; below, the mean of the two largest heads' mean absolute differences over that of the two "
        "smallest.",
        size=(12, 3 + 2.4 * -(-len(panels) // COLUMNS)),
    )


@STUDY.define(
    "5",
    "every head taken from the donor",
    "delta, recovered [layer, head]; with several --pairs: low, high [layer, head]",
)
def figure_5(run: HeadPatchingRun, patched: Any) -> Display:
    every = _need(run, patched)
    delta = every.mean(axis=0)
    gap = run.score_donor.mean() - run.score_clean.mean()
    recovered = delta / gap
    arrays = {"delta": delta, "recovered": recovered}
    said = ""
    if len(every) > 1:
        arrays["low"], arrays["high"] = run.intervals(every)
        apart = int(((arrays["low"] > 0) | (arrays["high"] < 0)).sum())
        said = f" 95 % bootstrap intervals over pairs leave out 0 for {apart} heads."
    spread = Line(x=np.arange(len(delta)), y=delta.std(axis=1), marker="o")
    panels = [
        head_map(delta, title="A) ΔIOI", colorbar="ΔIOI"),
        _over_heads(delta),
        Lines(lines=[spread], xlabel="Transformer layer", ylabel="Standard deviation of ΔIOI", integer_x=True),
        head_map(recovered, title="B) Share recovered", colorbar="Share"),
    ]
    return Display(
        arrays=arrays,
        panels=[panels[:2], panels[2:]],
        title=run.label,
        caption=f"Change of the IOI score with z of each head of {run.name} taken from the donor: by head, mean and "
        f"standard deviation over heads by layer, and as a share of the way from the clean score to the donor's, "
        f"{gap:.3f}. Colours to ± twice the mean of absolute values. Strongest (layer.head): {strongest(delta)}."
        f"{said}{run.of_pairs}",
        size=(12, 8),
    )


@STUDY.define("5-positions", "every head taken from the donor, each position apart", "delta [layer, head, pos]")
def figure_5_positions(run: HeadPatchingRun, positions: Any) -> Display:
    delta = _need(run, positions)
    n_layer, n_head, pos = delta.shape
    rows = delta.reshape(n_layer * n_head, pos)
    largest = np.take_along_axis(delta, np.abs(delta).argmax(-1, keepdims=True), -1)[..., 0]
    image = head_map(rows.T, xlabel="Position", ylabel=f"Layer · {n_head} + head", colorbar="ΔIOI")
    return Display(
        arrays={"delta": delta},
        panels=[[image]],
        title=run.label,
        caption=f"Change of the IOI score with z of each head of {run.name} taken from the donor at one position "
        f"alone; a row a head, those of a layer together. Colours to ± twice the mean of absolute values; "
        f"strongest heads, at their best position: {strongest(largest)}.{run.of_pairs}",
        size=(8, 8),
    )
