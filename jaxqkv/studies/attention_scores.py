"""Study 2: raw and softmax attention scores, on the activations of one text or a few.

Source: Mike X Cohen, "50 ML projects to understand LLMs", project 35, raw and softmax attention scores.
"""

import argparse
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxqkv.architectures.attention import attention_pattern, merge_heads, scaled_scores, visible_keys
from jaxqkv.errors import JaxqkvError, NotDrawable
from jaxqkv.figures import style
from jaxqkv.figures.displays import Display, head_images, layer_lines, layer_map, layer_points
from jaxqkv.figures.panels import Image, Line, Lines, Violins
from jaxqkv.kernels import (
    Sample,
    causal_samples,
    density,
    density_by_group,
    freedman_diaconis_histogram,
    last_token_scores,
    moments,
)
from jaxqkv.runtime import console
from jaxqkv.runtime.devices import compile_early, jit
from jaxqkv.studies.options import OfOneLayer, load_model, pick_layer, stimuli
from jaxqkv.studies.registry import Study
from jaxqkv.text.batches import Batch
from jaxqkv.text.reading import read_text
from jaxqkv.typing import AnyArray

LAYER = 6
ORIGINAL_GRID = (4, 4)
LAST_TOKEN_EDGES = np.linspace(-20, 20, 101)
SCORE_EDGES = np.linspace(-15, 15, 201)
SOFTMAX_BINS = 201
PATTERN_EDGES = np.linspace(0, 1, 91)
# Sizes of the matrices of figure 1, and of the mask of figure 7a.
MATRIX_SIZES = np.arange(5, 101)
MASK_SIZE = 5

Heads = Float[AnyArray, "batch head pos head_dim"]
Mask = Bool[AnyArray, "batch pos"]
# Q, K and the mask of one layer → what is kept of it.
Reduction = Callable[[Heads, Heads, Mask], dict[str, Array]]


def _sample_densities(samples: Sequence[Sample], edges: np.ndarray) -> Float[Array, "sample bin"]:
    """The samples' densities, all in one pass."""
    groups = [jnp.broadcast_to(jnp.where(s.where, i, -1), s.values.shape) for i, s in enumerate(samples)]
    return density_by_group(jnp.stack([s.values for s in samples]), edges, jnp.stack(groups), len(samples))


def _last_token(q: Heads, k: Heads, mask: Mask) -> dict[str, Array]:
    return {"density": _sample_densities(last_token_scores(q, k, mask), LAST_TOKEN_EDGES)}


def _scores(q: Heads, k: Heads, mask: Mask) -> dict[str, Array]:
    scores = scaled_scores(q, k)
    keys = visible_keys(mask, causal=False)[:, None]
    pairs = keys & mask[:, None, :, None]
    mean, std = moments(scores, pairs, ddof=1)
    softmax = attention_pattern(scores, keys)
    smallest, largest = jnp.where(pairs, softmax, 2).min(), jnp.where(pairs, softmax, -1).max()
    softmax_edges = jnp.linspace(smallest, largest, SOFTMAX_BINS + 1)
    return {
        "mean": mean,
        "std": std,
        "density": density(scores, SCORE_EDGES, pairs),
        "softmax_edges": softmax_edges,
        "softmax_density": density(softmax, softmax_edges, pairs),
    }


def _causal_pattern(q: Heads, k: Heads, mask: Mask) -> dict[str, Array]:
    return {"density": _sample_densities(causal_samples(_pattern(q, k, mask), mask), PATTERN_EDGES)}


def _pattern(q: Heads, k: Heads, mask: Mask) -> Float[Array, "batch head query key"]:
    return attention_pattern(scaled_scores(q, k), visible_keys(mask, causal=True)[:, None])


REDUCTIONS: dict[str, Reduction] = {"last token": _last_token, "scores": _scores, "causal pattern": _causal_pattern}
# What figures of one layer need.
LAYER_NEED = "the layer"


@jit(static_argnames="names")
def _reduce(q: Heads, k: Heads, mask: Mask, *, names: frozenset[str]) -> dict[str, dict[str, Array]]:
    # In one order always, so that the compilation cache knows the program again.
    return {name: REDUCTIONS[name](q, k, mask) for name in sorted(names)}


@jit
def _of_layer(q: Heads, k: Heads, mask: Mask) -> dict[str, Any]:
    """What figures 4, 7b and 9 show of one layer, in one program."""
    n_head, head_dim = q.shape[1], q.shape[-1]
    wide_q, wide_k = (merge_heads(x[0]) for x in (q, k))
    return {
        "last token": last_token_scores(q, k, mask),
        "causal": causal_samples(_pattern(q, k, mask), mask),
        "all heads": scaled_scores(wide_q, wide_k, 1 / (head_dim**0.5 * n_head)),
        "mean of heads": scaled_scores(q[0], k[0]).mean(axis=0),
    }


class Run(OfOneLayer):
    """The model, the texts, and after `prepare` the reductions `[layer, …]` and what is shown of the layer."""

    def __init__(self, options: argparse.Namespace):
        self.model = load_model(options, STUDY)
        self.config = self.model.config
        self.name = self.model.checkpoint.name
        self.seed = options.seed
        self.layer, self.layer_note = pick_layer(options, LAYER, self.config.n_layer, self.name)
        self.texts = _texts(options)
        self.reductions: dict[str, dict[str, np.ndarray]] = {}

    def describe(self) -> dict[str, Any]:
        """What the manifest says of this run."""
        return {"checkpoint": [self.model.checkpoint.identity()], "layer": self.layer, "text": self.texts}

    @cached_property
    def batch(self) -> Batch:
        """The texts as ids; BERT's between [CLS] and [SEP]."""
        return self.model.tokenize(self.texts, special_tokens=not self.config.causal)

    def prepare(self, needs: Collection[str]) -> None:
        """One forward pass, to the last layer that is needed; each layer is reduced and let go."""
        names = frozenset(needs) & frozenset(REDUCTIONS)
        if not self.config.causal:
            names -= {"causal pattern"}
        if not needs:
            return
        layers = range(self.config.n_layer) if names else [self.layer]
        mask = self.batch.mask
        heads = jax.ShapeDtypeStruct((len(mask), self.config.n_head, mask.shape[1], self.config.head_dim), np.float32)
        if names:
            reduce = compile_early(_reduce, heads, heads, mask, names=names)
        if LAYER_NEED in needs:
            of_layer = compile_early(_of_layer, heads, heads, mask)
        results = []
        with console.bar(total=len(layers), desc="layers", unit="layer") as progress:
            for layer, attention in self.model.layerwise(self.batch, capture={"q", "k"}, layers=layers):
                attention = attention.astype(np.float32)
                if names:
                    results.append(reduce(attention.q, attention.k, mask))
                if layer == self.layer and LAYER_NEED in needs:
                    self.q = np.asarray(attention.q)
                    self.of_layer = of_layer(attention.q, attention.k, mask)
                progress.update()
        if results:
            self.reductions = jax.tree.map(lambda *leaves: np.stack(leaves), *results)

    def need_tokens(self, count: int, what: str) -> None:
        """Refuses a figure that needs longer texts."""
        longest = int(self.batch.mask.sum(axis=1).max())
        if longest < count:
            raise NotDrawable(f"{what} needs a text of {count} tokens or more, not {longest}")

    def need_causal(self, what: str) -> None:
        """Refuses a figure of causal attention for a model that sees both ways."""
        if not self.config.causal:
            raise NotDrawable(f"{what} is about causal attention, and {self.name} attends to later tokens too")

    @property
    def of_texts(self) -> str:
        """How a caption ends whose figure shows all texts."""
        lengths = self.batch.mask.sum(axis=1)
        if len(lengths) == 1:
            return self.of_first_text
        return f" {len(lengths)} texts of {lengths.min()} to {lengths.max()} tokens, pooled."

    @property
    def of_first_text(self) -> str:
        """How a caption ends whose figure shows the first text alone."""
        others = f", the first of {len(self.texts)} texts" if len(self.texts) > 1 else ""
        count = int(self.first_text.sum())
        return f" {count} token{'s' * (count != 1)}{others}."

    @property
    def first_text(self) -> Bool[np.ndarray, " pos"]:
        """Which positions of the first text are real."""
        return np.asarray(self.batch.mask[0])


def _texts(options: argparse.Namespace) -> list[str]:
    if options.text and options.text_file:
        raise JaxqkvError("--text and --text-file exclude each other")
    if options.text_file:
        return [read_text(path) for path in options.text_file]
    return options.text or stimuli("purple.txt")


STUDY = Study(
    name="attention-scores",
    title="Raw and softmax attention scores",
    models=("gpt2-medium",),
    demo="demo-gpt2",
    run=Run,
    options=("text", "text_file", "tokenizer", "dtype"),
)
figure = STUDY.draw


def _chosen(samples: Sequence[Sample]) -> list[np.ndarray]:
    """The values that count, flat, in the order of the arrays."""
    return [np.asarray(s.values)[np.broadcast_to(s.where, s.values.shape)] for s in samples]


@STUDY.figure("1", "standard deviation of matrix products, and what scaling does to it")
def figure_1(run: Run) -> Display:
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


@STUDY.figure("3", "Q of every head of one layer", needs={LAYER_NEED})
def figure_3(run: Run) -> Display:
    q = run.q[0][:, run.first_text]
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


@STUDY.figure("4", "scores of the last token within and across heads", needs={LAYER_NEED})
def figure_4(run: Run) -> Display:
    run.need_tokens(3, "figure 4")
    within, across = _chosen(run.of_layer["last token"])
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


@STUDY.figure("5a", "scores of the last token within and across heads by layer", needs={"last token"})
def figure_5a(run: Run) -> Display:
    run.need_tokens(3, "figure 5a")
    values = run.reductions["last token"]["density"]
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


@STUDY.figure("5b", "the same, averaged over layers", needs={"last token"})
def figure_5b(run: Run) -> Display:
    run.need_tokens(3, "figure 5b")
    values = run.reductions["last token"]["density"]
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


@STUDY.figure("6", "all scores and their softmax by layer", needs={"scores"})
def figure_6(run: Run) -> Display:
    reduction = run.reductions["scores"]
    n_layer = len(reduction["mean"])
    means = layer_points(reduction["mean"], "h", face=0.45)
    for point, std in zip(means, reduction["std"], strict=True):
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
            lines=layer_lines([SCORE_EDGES[:-1]] * n_layer, reduction["density"]),
            xlabel="Activation value",
            ylabel="Density",
            title=f"B) Distributions of {style.SCORE}",
        ),
        Lines(
            lines=layer_lines(reduction["softmax_edges"][:, :-1], reduction["softmax_density"]),
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
        arrays={"edges": SCORE_EDGES} | {name: reduction[name] for name in names},
        panels=[panels],
        title=run.label,
        caption=f"All scores of each layer of {run.name}, before any mask: mean ± sample standard deviation, "
        f"densities, and densities of their unmasked softmax over keys.{run.of_texts}",
        size=(12, 3.9),
    )


@STUDY.figure("7a", "what a causal mask does to the softmax")
def figure_7a(run: Run) -> Display:
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


@STUDY.figure("7b", "causal attention to others and to oneself", needs={LAYER_NEED})
def figure_7b(run: Run) -> Display:
    run.need_causal("figure 7b")
    run.need_tokens(2, "figure 7b")
    samples = _chosen(run.of_layer["causal"])
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


@STUDY.figure("8", "causal attention to others and to oneself by layer", needs={"causal pattern"})
def figure_8(run: Run) -> Display:
    run.need_causal("figure 8")
    run.need_tokens(2, "figure 8")
    values = run.reductions["causal pattern"]["density"]
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


@STUDY.figure("9", "scores of the whole width against the mean over heads", needs={LAYER_NEED})
def figure_9(run: Run) -> Display:
    real = np.ix_(run.first_text, run.first_text)
    all_heads, mean_of_heads = (np.asarray(run.of_layer[name])[real] for name in ("all heads", "mean of heads"))
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
