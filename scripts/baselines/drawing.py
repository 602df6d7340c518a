"""The figures of the first five studies in plain matplotlib, from the arrays of either baseline.

Both baselines draw alike, since only computing is compared. Each function takes a figure's arrays and
returns a matplotlib figure of the size that the package draws.
"""

import matplotlib.pyplot as plt
import numpy as np

DPI = 200
CMAP = plt.get_cmap("plasma")


def draw(study, figures, folder):
    """Draws every figure of a study as `folder/ID.png`."""
    for name, arrays in figures.items():
        figure = DRAWERS[study][name](arrays)
        figure.savefig(folder / f"{name}.png", dpi=DPI)
        plt.close(figure)


def _subplots(rows, columns, width, height, **options):
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained", **options)
    return figure, axes


def _images(stack, columns, width, height, titles=(), colorbar=True, **options):
    """Draws a panel for each of several matrices."""
    rows = -(-len(stack) // columns)
    figure, axes = _subplots(rows, columns, width, height)
    for place, (ax, values) in enumerate(zip(axes.flat, stack, strict=False)):
        image = ax.imshow(values, **({"aspect": "auto"} | options))
        if place < len(titles):
            ax.set_title(titles[place])
    if colorbar:
        figure.colorbar(image, ax=axes)
    return figure


def _lines(x, rows, width=10, height=4, labels=None, errors=None, colored=False, **options):
    """Draws one panel with a curve for each row."""
    figure, ((ax,),) = _subplots(1, 1, width, height)
    for place, row in enumerate(rows):
        color = CMAP(place / len(rows)) if colored else None
        ax.plot(x, row, label=labels and labels[place], color=color, **options)
        if errors is not None:
            ax.fill_between(x, row - errors[place], row + errors[place], alpha=0.3, color=color)
    if labels:
        ax.legend()
    return figure


def _table(rows, heading, width, height):
    figure, ((ax,),) = _subplots(1, 1, width, height)
    ax.axis("off")
    ax.table(cellText=rows, colLabels=heading, loc="center")
    return figure


def _histograms(pairs, width=10, height=4):
    figure, ((ax,),) = _subplots(1, 1, width, height)
    for heights, edges in pairs:
        ax.plot(edges[:-1], heights)
    return figure


def _by_model(arrays):
    """Draws means and standard deviations by layer, a row of panels for each model."""
    names = [key.removeprefix("mean_") for key in arrays if key.startswith("mean_")]
    figure, axes = _subplots(len(names), 2, 10, 3 * len(names))
    for row, name in zip(axes, names, strict=True):
        for ax, statistic in zip(row, ("mean", "std"), strict=True):
            ax.plot(arrays[f"{statistic}_{name}"], "o-")
            ax.set_title(f"{name}: {statistic}")
    return figure


def _points(panels, columns, width, height, **options):
    rows = -(-len(panels) // columns)
    figure, axes = _subplots(rows, columns, width, height)
    for ax, (x, y) in zip(axes.flat, panels, strict=False):
        ax.plot(x, y, "o", **({"markersize": 2, "alpha": 0.5} | options))
    return figure


def _violins(samples, width=10, height=4):
    figure, ((ax,),) = _subplots(1, 1, width, height)
    generator = np.random.default_rng(0)
    for place, sample in enumerate(samples):
        ax.plot(place + generator.normal(0, 0.05, np.size(sample)), np.ravel(sample), "o", markersize=2, alpha=0.5)
    ax.violinplot([np.ravel(sample) for sample in samples], positions=range(len(samples)))
    return figure


def _wide(arrays):
    figure = _images([arrays["weights"]], 1, 12, 5, cmap="plasma", vmin=-0.1, vmax=0.1)
    for place in (1, 2):
        figure.axes[0].axvline(place * arrays["weights"].shape[1] / 3, linestyle="--", color="w")
    return figure


def _similarity(arrays):
    figure, ((left, right),) = _subplots(1, 2, 10, 4)
    left.imshow(arrays["similarity"], vmin=-0.4, vmax=0.4)
    if "counts" in arrays:
        right.plot(arrays["edges"][:-1], arrays["counts"])
    else:
        right.hist(arrays["values"], bins=40)
    return figure


def _laminar_heads(density):
    flat = density.reshape(len(density), -1, density.shape[-1])
    return _images(flat.swapaxes(0, 1), 2, 10, 8, origin="lower", cmap="magma", vmin=0, vmax=7)


def _all_scores(arrays):
    figure, ((one, two, three),) = _subplots(1, 3, 13, 4)
    layers = np.arange(len(arrays["mean"]))
    one.errorbar(layers, arrays["mean"], arrays["std"], fmt="o")
    for layer in layers:
        color = CMAP(layer / len(layers))
        two.plot(arrays["edges"][:-1], arrays["density"][layer], color=color)
        three.plot(arrays["softmax_edges"][layer][:-1], arrays["softmax_density"][layer], color=color)
    three.set_yscale("log")
    return figure


def _whole_and_heads(arrays):
    return _images([arrays["all_heads"], arrays["mean_of_heads"]], 2, 10, 4)


def _adjustments(arrays):
    panels = [(arrays["log_frequency"][:, 1:], layer[:, 1:]) for layer in arrays["adjustment"]]
    return _points(panels, 3, 13, 4, color="b")


def _binned(arrays, colored):
    figure, ((one, two),) = _subplots(1, 2, 10, 4)
    for place, (x, mean, std) in enumerate(zip(arrays["centres"], arrays["mean"], arrays["std"], strict=True)):
        color = CMAP(place / len(arrays["mean"])) if colored else None
        one.plot(x, mean, color=color)
        two.plot(x, std, color=color)
    return figure


def _linkages(arrays):
    from scipy.cluster.hierarchy import dendrogram

    figure, axes = _subplots(2, 3, 13, 7)
    for ax, linkage in zip(axes.flat, arrays["linkage"], strict=True):
        dendrogram(linkage, ax=ax)
    return figure


def _boxes(arrays):
    figure, ((one, two),) = _subplots(1, 2, 13, 5)
    one.boxplot(list(arrays["variance"]))
    two.violinplot(list(arrays["variance"]))
    return figure


def _statistics(arrays):
    figure, axes = _subplots(2, 2, 13, 8)
    for ax, (name, values) in zip(axes.flat, arrays.items(), strict=True):
        ax.plot(values, "o-")
        ax.set_title(name)
    return figure


def _groups(arrays):
    centres = (arrays["edges"][:-1] + arrays["edges"][1:]) / 2
    figure, (axes,) = _subplots(1, 2, 12, 4)
    for ax, rows in zip(axes, (slice(0, 3), slice(3, 6)), strict=True):
        ax.plot(centres, arrays["target"][rows].T)
        ax.plot(centres, arrays["non_target"][rows].T, ":")
        ax.plot(centres, arrays["random"] / 3, "--")
    return figure


DRAWERS = {
    "qkv-weights": {
        "1": lambda a: _table(np.stack(list(a.values()), axis=1), list(a), 10, 2),
        "2a": _wide,
        "2b": lambda a: _histograms([(a[f"counts_{x}"], a[f"edges_{x}"]) for x in "qkv"]),
        "2c": lambda a: _images(a["density"].swapaxes(0, 1), 3, 12, 4, origin="lower", cmap="magma", vmax=3.5),
        "2d": lambda a: _statistics({name: a[name] for name in ("mean", "std")} | {"": [], " ": []}),
        "3": _by_model,
        "4a": lambda a: _images(a["heads"].swapaxes(1, 2), 4, 12, 8, cmap="plasma", vmin=-0.1, vmax=0.1),
        "4b": _similarity,
        "5a": lambda a: _histograms(
            [(a[f"density_{x}"], a[f"edges_{x}"]) for x in ("q_within", "q_across", "k_within", "k_across")]
        ),
        "5b": lambda a: _laminar_heads(a["density"]),
        "5c": lambda a: _statistics({f"{n}{p}": a[n][:, p] for n in ("mean", "std") for p in (0, 1)}),
        "6": _by_model,
    },
    "attention-scores": {
        "1": lambda a: _lines(a["n"], [a["raw"], a["scaled"], np.sqrt(a["n"])], labels=("raw", "scaled", "theory")),
        "3": lambda a: _images(a["q"].swapaxes(1, 2), 4, 12, 8, cmap="plasma", vmin=-2, vmax=2, origin="lower"),
        "4": lambda a: _violins([a["within"], a["across"]]),
        "5a": lambda a: _images(a["density"].swapaxes(0, 1), 2, 10, 4, origin="lower", cmap="magma", vmax=0.15),
        "5b": lambda a: _lines(a["edges"][:-1], a["mean"], errors=a["std"], labels=("within", "across")),
        "6": _all_scores,
        "7a": lambda a: _images([a["mask"], np.where(a["mask"], -np.inf, 0), a["softmax"]], 3, 10, 4),
        "7b": lambda a: _violins([a["final_to_previous"], a["self_other"], a["self_first"]]),
        "8": lambda a: _images(a["density"].swapaxes(0, 1), 3, 12, 4, origin="lower", cmap="magma", vmax=0.5),
        "9": _whole_and_heads,
    },
    "token-frequency": {
        "1": lambda a: _points([(np.arange(len(a["counts"])), a["log_frequency"])], 1, 10, 4),
        "2": lambda a: _images([a["ids"]], 1, 10, 4),
        "4a": _adjustments,
        "4b": lambda a: _lines(np.arange(len(a["r"])), [a["r"]], marker="o"),
        "5a": lambda a: _images([a["pair_log_frequency"]], 1, 6, 5),
        "5b": lambda a: _points([(a["pair_log_frequency"], a["score"])], 1, 10, 4),
        "5-edges": lambda a: _lines(np.arange(41), [a["percentile_edges"], a["linear_edges"]], labels=("p", "l")),
        "5c": lambda a: _binned(a, colored=False),
        "5d": lambda a: _violins([a["r_mean"], a["r_std"]]),
        "6": lambda a: _binned(a, colored=True),
    },
    "weight-tour": {
        "architecture": lambda a: _table([[str(a["total_with_tied"])]], ["parameters"], 12, 10),
        "positions": lambda a: _images([a["positions"]], 1, 9, 6, cmap="RdBu"),
        "position-dimension": lambda a: _lines(np.arange(len(a["values"])), [a["values"]]),
        "position-dimensions": lambda a: _lines(np.arange(a["values"].shape[1]), a["values"]),
        "position-variance": lambda a: _lines(np.arange(a["values"].shape[1]), a["values"]),
        "position-correlation": lambda a: _lines(np.arange(len(a["r"])), [a["r"]]),
        "weight-histogram": lambda a: _histograms([(a["density"], a["edges"])]),
        "weights": lambda a: _images([a["weights"]], 1, 12, 6, cmap="RdBu"),
        "weights-zoom": lambda a: _images([a["window_1"], a["window_2"]], 2, 12, 6, cmap="RdBu"),
        "pca-variance": lambda a: _lines(np.arange(a["explained"].shape[1]), a["explained"]),
        "pca-scatter": lambda a: _points([(scores[:, 0], scores[:, 1]) for scores in a["scores"]], 3, 13, 8),
        "layer-statistics": _statistics,
        "row-variance": _boxes,
        "query-heads": lambda a: _images([a["heads"]], 1, 12, 6),
        "head-clusters": _linkages,
        "training-signature": _statistics,
    },
    "token-similarity": {
        "pairs": lambda a: _points(
            [(a["target"][0], a["target"][-1]), (a["target"][:, 0], a["target"][:, 1])], 2, 10, 4
        ),
        "cosine": _similarity,
        "correlation": _similarity,
        "mask": lambda a: _images([a["matrix"]], 1, 8, 6),
        "distributions": _groups,
        "means": lambda a: _lines(np.arange(len(a["mean"])), [a["mean"]], marker="o", linestyle=""),
        "pair-order": lambda a: _lines(np.arange(len(a["values"])), [a["values"]], marker="o", linestyle=""),
        "laminar": lambda a: _images(a["target"].swapaxes(0, 1), 3, 12, 8, origin="lower", cmap="magma"),
    },
}
