"""Study 5: similarities of a token's Q, K and V dimensions over sentences.

Source: Mike X Cohen, "A deep understanding of AI language model mechanisms", the lecture on
token-related similarities within and across Q, K, V matrices.
"""

import argparse
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxqkv.architectures.activations import Attention
from jaxqkv.errors import JaxqkvError
from jaxqkv.figures import style
from jaxqkv.figures.displays import Display, layer_lines, layer_map, rows_of
from jaxqkv.figures.panels import Bars, Image, Line, Lines
from jaxqkv.kernels import (
    GROUPS,
    column_correlation,
    column_cosine,
    group_densities,
    permute_entries,
    require_finite,
    upper_density,
)
from jaxqkv.runtime import console
from jaxqkv.runtime.devices import compile_early, jit
from jaxqkv.studies.options import OfOneLayer, load_model, nearest_index, pick_layer, stimuli
from jaxqkv.studies.registry import Study
from jaxqkv.text.reading import read_sentences
from jaxqkv.text.tokenizers import find_token
from jaxqkv.typing import AnyArray

LAYER = 6
EDGES = np.linspace(-1, 1, 101)
CENTRES = (EDGES[:-1] + EDGES[1:]) / 2
HISTOGRAM_BINS = 100
# The original's choices, of 54 sentences and 768 dimensions.
SENTENCES, DIMENSIONS = (1, 40), (123, 700)
ORIGINAL_SENTENCES, ORIGINAL_WIDTH = 54, 768
PAIRS_SHOWN = 20_000
MEASURES = ("correlation", "cosine")
LAYER_NEED, GROUPS_NEED, LAMINAR_NEED = "samples of the layer", "densities by group", "laminar"

Samples = Float[AnyArray, "sentence three_embed"]


@jit
def _at(attention: Attention, positions: Int[AnyArray, " sentence"]) -> Samples:
    """Q, K and V of one position of each sentence, side by side."""

    def pick(x: Float[Array, "sentence head pos head_dim"] | None) -> Float[Array, "sentence embed"]:
        assert x is not None  # q, k and v are captured
        chosen = jnp.take_along_axis(x, positions[:, None, None, None], axis=2)
        return chosen.reshape(x.shape[0], -1)

    return jnp.concatenate([pick(attention.q), pick(attention.k), pick(attention.v)], axis=1)


@jit(static_argnames="centred")
def _densities(target: Samples, non_target: Samples, *, centred: bool) -> Float[Array, "two group bin"]:
    return jax.lax.map(lambda x: group_densities(x, EDGES, centred=centred), jnp.stack([target, non_target]))


@jit
def _random_density(target: Samples, key: Array) -> Float[Array, " bin"]:
    return upper_density(permute_entries(target, key), EDGES)


@jit
def _mean_and_variance(samples: Samples) -> tuple[Float[Array, " qkv"], Float[Array, " qkv"]]:
    thirds = jnp.stack(jnp.split(samples, 3, axis=1))
    return thirds.mean(axis=(1, 2)), thirds.var(axis=(1, 2))


class Run(OfOneLayer):
    """The sentences, where the target stands in them, and after `prepare` the samples."""

    def __init__(self, options: argparse.Namespace):
        self.model = load_model(options, STUDY)
        self.config = self.model.config
        self.name = self.model.checkpoint.name
        self.seed, self.measure, self.target_text = (
            options.seed,
            options.measure or MEASURES[0],
            " her" if options.target is None else options.target,
        )
        self.layer, self.layer_note = pick_layer(options, LAYER, self.config.n_layer, self.name)
        self.sentences = [line for line in _sentences(options.sentences) if line.strip()]
        if not self.sentences:
            raise JaxqkvError(f"{options.sentences}: no sentence in it")
        self.skip_missing = options.skip_missing
        self._locate()

    def _locate(self) -> None:
        """Finds the target and what stands before it; sentences without are errors or left out."""
        rows = self.model.tokenizer.encode(self.sentences, special_tokens=not self.config.causal)
        token = self.model.tokenizer.single_token(self.target_text)
        places = [find_token(ids, token) for ids in rows]
        bad = [number for number, place in enumerate(places) if place is None or place < 1]
        if bad and not self.skip_missing:
            number, target = bad[0], self.target_text
            reason = "lacks" if places[number] is None else "has nothing before"
            more = f", and so it is with {len(bad) - 1} more" if len(bad) > 1 else ""
            advice = "--skip-missing (in the library skip_missing=True) leaves such sentences out"
            if not target.startswith(" ") and f" {target}" in self.sentences[number]:
                advice = f"did you mean {f' {target}'!r}, with the space before it?"
            raise JaxqkvError(
                f"sentence {number} ({self.sentences[number]!r}) {reason} the target {target!r}{more}; {advice}"
            )
        kept = [number for number in range(len(rows)) if number not in set(bad)]
        if len(kept) < 2:
            raise JaxqkvError(f"two or more sentences with the target {self.target_text!r} are needed, not {len(kept)}")
        self.skipped = [self.sentences[number] for number in bad]
        self.sentences = [self.sentences[number] for number in kept]
        self.positions = np.array([places[number] for number in kept], np.int32)

    def describe(self) -> dict[str, Any]:
        """What the manifest says of this run."""
        return {
            "checkpoint": [self.model.checkpoint.identity()],
            "layer": self.layer,
            "measure": self.measure,
            "target": self.target_text,
            "sentences": self.sentences,
            "skipped": self.skipped,
        }

    @property
    def centred(self) -> bool:
        """Whether similarity is correlation: the cosine of what is centred."""
        return self.measure == "correlation"

    def prepare(self, needs: Collection[str]) -> None:
        """One forward pass, to the last layer that is needed; of each layer two positions a sentence are kept."""
        if not needs:
            return
        batch = self.model.tokenize(self.sentences, special_tokens=not self.config.causal)
        layers = range(self.config.n_layer) if LAMINAR_NEED in needs else [self.layer]
        samples = jax.ShapeDtypeStruct((len(self.sentences), 3 * self.embed), np.float32)
        if {GROUPS_NEED, LAMINAR_NEED} & set(needs):
            self.group_densities = compile_early(_densities, samples, samples, centred=self.centred)
        if GROUPS_NEED in needs:
            self.random_density = compile_early(_random_density, samples, self.key)
        results = []
        with console.bar(total=len(layers), desc="layers", unit="layer") as progress:
            for layer, attention in self.model.layerwise(batch, capture={"q", "k", "v"}, layers=layers):
                attention = attention.astype(np.float32)
                target, non_target = (_at(attention, self.positions - shift) for shift in (0, 1))
                if layer == self.layer:
                    self.target, self.non_target = np.asarray(target), np.asarray(non_target)
                if LAMINAR_NEED in needs:
                    mean, variance = _mean_and_variance(target)
                    results.append((self.group_densities(target, non_target), mean, variance))
                    jax.block_until_ready(results[-1])
                progress.update()
        if results:
            self.laminar = jax.tree.map(lambda *leaves: np.stack(leaves), *results)

    @cached_property
    def similarity(self) -> Float[np.ndarray, "three_embed three_embed"]:
        """The measure between all dimensions of the target."""
        return np.asarray((column_correlation if self.centred else column_cosine)(self.target))

    @cached_property
    def key(self) -> Key[Array, ""]:
        """Of the shuffled control."""
        return jax.random.key(self.seed)

    @property
    def embed(self) -> int:
        """Width of Q, of K and of V."""
        return self.config.n_embd

    @property
    def left_out(self) -> str:
        """What a caption says of sentences that are not among the samples."""
        return f" {len(self.skipped)} sentences without the target were left out." if self.skipped else ""


def _sentences(given: Path | list[str] | None) -> list[str]:
    """The lines of a file, a list from Python, or the study's own."""
    if given is None:
        return stimuli("her.txt")
    return read_sentences(given) if isinstance(given, Path) else given


STUDY = Study(
    name="token-similarity",
    title="Token-related similarities within and across Q, K, V",
    models=("gpt2",),
    demo="demo-gpt2",
    run=Run,
    options=("sentences", "target", "measure", "skip_missing", "tokenizer", "dtype"),
)
figure = STUDY.draw


@STUDY.figure("pairs", "Q and K of the target in two sentences, and two dimensions over sentences", needs={LAYER_NEED})
def figure_pairs(run: Run) -> Display:
    q, k = run.target[:, : run.embed], run.target[:, run.embed : 2 * run.embed]
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
        arrays={"target": run.target},
        panels=[panels],
        title=run.heading,
        caption=f"Q and K of the target {run.target_text!r} in sentences {one} and {two} (counted from 0), and its "
        f"Q dimensions {a} and {b} over {len(q)} sentences; {run.where}.{run.layer_note}{run.left_out}",
        size=(12, 4.1),
    )


def _matrix(run: Run, similarity: np.ndarray, what: str) -> Display:
    """A similarity matrix and the histogram of its upper triangle."""
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


@STUDY.figure("cosine", "cosine similarity of all dimensions of the target", needs={LAYER_NEED})
def figure_cosine(run: Run) -> Display:
    return _matrix(run, np.asarray(column_cosine(run.target)), "Cosine similarity")


@STUDY.figure("correlation", "correlation of all dimensions of the target", needs={LAYER_NEED})
def figure_correlation(run: Run) -> Display:
    return _matrix(run, np.asarray(column_correlation(run.target)), "Correlation")


@STUDY.figure("mask", "which pairs of dimensions are within and across Q, K and V")
def figure_mask(run: Run) -> Display:
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
    """The densities of some groups; within a matrix in its colour, across in a blend's."""
    order = list(GROUPS)
    return [Line(x=CENTRES, y=densities[order.index(g)], label=g, color=style.GROUPS[g]) for g in groups]


@STUDY.figure("distributions", "similarities by group, target and non-target", needs={LAYER_NEED, GROUPS_NEED})
def figure_distributions(run: Run) -> Display:
    target, non_target = np.asarray(run.group_densities(run.target, run.non_target))
    random = np.asarray(run.random_density(run.target, run.key))
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
    return Display(
        arrays={"edges": EDGES, "target": target, "non_target": non_target, "random": random},
        panels=rows_of(panels, 2),
        title=run.heading,
        caption=f"Densities of the {run.measure} between dimensions over {len(run.sentences)} sentences, by group, for "
        f"the target {run.target_text!r} and the token before it; dashed, the cosine similarity after all entries of "
        f"the target were shuffled (seed {run.seed}), divided by 3; {run.where}.{run.layer_note}{run.left_out}",
        size=(14, 6.7),
    )


@STUDY.figure("means", "mean activation of every dimension of the target", needs={LAYER_NEED})
def figure_means(run: Run) -> Display:
    mean = run.target.mean(axis=0)
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


@STUDY.figure("pair-order", "similarities of Q pairs in the order of the upper triangle", needs={LAYER_NEED})
def figure_pair_order(run: Run) -> Display:
    qq = run.similarity[: run.embed, : run.embed]
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


@STUDY.figure("laminar", "similarities, means and variances by layer", needs={LAMINAR_NEED})
def figure_laminar(run: Run) -> Display:
    densities, mean, variance = run.laminar
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
    return Display(
        arrays={
            "edges": EDGES,
            "target": densities[:, 0],
            "non_target": densities[:, 1],
            "mean": mean,
            "variance": variance,
        },
        panels=rows,
        title=run.label,
        caption=f"Densities of the {run.measure} between Q dimensions (QQ) and between K and V dimensions (KV) in "
        f"every layer of {run.name}, for the target {run.target_text!r} and the token before it, over "
        f"{len(run.sentences)} sentences; mean and variance of the target's Q, K and V.{run.left_out}",
        size=(18, 11),
    )
