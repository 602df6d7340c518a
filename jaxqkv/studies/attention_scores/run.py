"""The run of the study `attention-scores`: the model, the texts, and one forward pass."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxqkv.architectures.attention import attention_pattern, merge_heads, scaled_scores, visible_keys
from jaxqkv.errors import NotDrawable
from jaxqkv.kernels import Sample, causal_samples, density, density_by_group, last_token_scores, moments
from jaxqkv.runtime import console
from jaxqkv.runtime.devices import compile_early, jit
from jaxqkv.runtime.showing import plural
from jaxqkv.studies.attention_scores import STUDY, AttentionScoresOptions
from jaxqkv.studies.layers import OfOneLayer, pick_layer
from jaxqkv.studies.opening import load_model
from jaxqkv.studies.stimuli import stimuli
from jaxqkv.studies.study import Run
from jaxqkv.text.batches import Batch
from jaxqkv.text.reading import read_text
from jaxqkv.typing import AnyArray

LAYER = 6
LAST_TOKEN_EDGES = np.linspace(-20, 20, 101)
SCORE_EDGES = np.linspace(-15, 15, 201)
SOFTMAX_BINS = 201
PATTERN_EDGES = np.linspace(0, 1, 91)

Heads = Float[AnyArray, "batch head pos head_dim"]
Mask = Bool[AnyArray, "batch pos"]
# A function of Q, K and the mask of one layer to the arrays that are kept.
Reduction = Callable[[Heads, Heads, Mask], dict[str, Array]]


def _sample_densities(samples: Sequence[Sample], edges: np.ndarray) -> Float[Array, "sample bin"]:
    """Returns the samples' densities, all in one pass."""
    groups = [jnp.broadcast_to(jnp.where(s.where, i, -1), s.values.shape) for i, s in enumerate(samples)]
    return density_by_group(jnp.stack([s.values for s in samples]), edges, jnp.stack(groups), n_group=len(samples))


def last_token_densities(q: Heads, k: Heads, mask: Mask) -> dict[str, Float[Array, "..."]]:
    """Returns densities `[2, bin]` of the last token's scores, within and across heads."""
    return {"density": _sample_densities(last_token_scores(q, k, mask), LAST_TOKEN_EDGES)}


def score_statistics(q: Heads, k: Heads, mask: Mask) -> dict[str, Float[Array, "..."]]:
    """Returns moments of the unmasked scores, and densities of the scores and of their softmax over real keys."""
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


def causal_densities(q: Heads, k: Heads, mask: Mask) -> dict[str, Float[Array, "..."]]:
    """Returns densities `[3, bin]` of the samples of the causal pattern."""
    return {"density": _sample_densities(causal_samples(_pattern(q, k, mask), mask), PATTERN_EDGES)}


def _pattern(q: Heads, k: Heads, mask: Mask) -> Float[Array, "batch head query key"]:
    return attention_pattern(scaled_scores(q, k), visible_keys(mask, causal=True)[:, None])


# Reductions of every layer that figures take.
REDUCTIONS: dict[str, Reduction] = {
    "last_token": last_token_densities,
    "scores": score_statistics,
    "causal_pattern": causal_densities,
}
# Reductions that need causal attention.
CAUSAL = frozenset({"causal_pattern"})
# Name of the arrays of the layer that is shown.
OF_LAYER = "of_layer"


@jit(static_argnames="names")
def _reduce(q: Heads, k: Heads, mask: Mask, *, names: frozenset[str]) -> dict[str, dict[str, Array]]:
    # Always in the same order, so that the compilation cache recognises the program.
    return {name: REDUCTIONS[name](q, k, mask) for name in sorted(names)}


@jit
def _of_layer(q: Heads, k: Heads, mask: Mask) -> dict[str, Any]:
    """Returns the arrays of one layer for figures 4, 7b and 9, in one program."""
    n_head, head_dim = q.shape[1], q.shape[-1]
    wide_q, wide_k = (merge_heads(x[0]) for x in (q, k))
    return {
        "last_token": last_token_scores(q, k, mask),
        "causal": causal_samples(_pattern(q, k, mask), mask),
        "all_heads": scaled_scores(wide_q, wide_k, 1 / (head_dim**0.5 * n_head)),
        "mean_of_heads": scaled_scores(q[0], k[0]).mean(axis=0),
    }


# A reduction's arrays `[layer, …]` by name.
Reduced = Mapping[str, np.ndarray]


@STUDY.computation
class AttentionScoresRun(OfOneLayer, Run):
    """The model, the layer that is shown, and the texts."""

    def __init__(self, options: AttentionScoresOptions, folder: Path | None = None):
        self.model = load_model(options, STUDY)
        self.config = self.model.config
        self.name = self.model.checkpoint.name
        self.seed = options.seed
        self.layer, self.layer_note = pick_layer(options, LAYER, self.config.n_layer, self.name)
        self.texts = _texts(options)

    def describe(self) -> dict[str, Any]:
        """Returns this run's entries in the manifest."""
        return {"checkpoint": [self.model.checkpoint.identity()], "layer": self.layer, "text": self.texts}

    @cached_property
    def batch(self) -> Batch:
        """The texts as ids, with the tokenizer's special tokens unless the model is causal."""
        return self.model.tokenize(self.texts, special_tokens=not self.config.causal)

    def compute(self, names: Collection[str]) -> dict[str, Mapping[str, Any]]:
        """Makes one forward pass up to the last layer that is needed; each layer is reduced and then freed.

        Returns:
          For each name, its arrays: `[layer, …]` for those in `REDUCTIONS`, of one layer for `OF_LAYER`; none for those
          in `CAUSAL` unless the model is causal.
        """
        every_layer = frozenset(names) & frozenset(REDUCTIONS)
        if not self.config.causal:
            every_layer -= CAUSAL
        computed: dict[str, Mapping[str, Any]] = {name: {} for name in names}
        if every_layer or OF_LAYER in names:
            computed |= self._forward(every_layer, OF_LAYER in names)
        return computed

    def _forward(self, names: frozenset[str], of_layer: bool) -> dict[str, Mapping[str, Any]]:
        """Returns the named reductions of every layer, and with `of_layer` the arrays of the layer that is shown."""
        layers = range(self.config.n_layer) if names else [self.layer]
        mask = self.batch.mask
        heads = jax.ShapeDtypeStruct((len(mask), self.config.n_head, mask.shape[1], self.config.head_dim), np.float32)
        if names:
            reduce = compile_early(_reduce, heads, heads, mask, names=names)
        if of_layer:
            show = compile_early(_of_layer, heads, heads, mask)
        results: list[Any] = []
        shown: dict[str, Mapping[str, Any]] = {}
        with console.bar(total=len(layers), desc="layers", unit="layer") as progress:
            for layer, attention in self.model.layerwise(self.batch, capture={"q", "k"}, layers=layers):
                attention = attention.astype(np.float32)
                if names:
                    results.append(reduce(attention.q, attention.k, mask))
                if of_layer and layer == self.layer:
                    q = np.asarray(attention.q)
                    shown[OF_LAYER] = {"q": q, **show(attention.q, attention.k, mask)}
                progress.update()
        return (jax.tree.map(lambda *leaves: np.stack(leaves), *results) if results else {}) | shown

    def need_tokens(self, count: int, what: str) -> None:
        """Refuses a figure that needs longer texts."""
        longest = int(self.batch.mask.sum(axis=1).max())
        if longest < count:
            raise NotDrawable(f"{what} needs a text of {count} tokens or more, not {longest}")

    def need_causal(self, what: str) -> None:
        """Refuses a figure of causal attention unless the model is causal."""
        if not self.config.causal:
            raise NotDrawable(f"{what} is about causal attention, and {self.name} attends to later tokens too")

    @property
    def of_texts(self) -> str:
        """The end of the caption of a figure that shows all texts."""
        lengths = self.batch.mask.sum(axis=1)
        if len(lengths) == 1:
            return self.of_first_text
        return f" {len(lengths)} texts of {lengths.min()} to {lengths.max()} tokens, pooled."

    @property
    def of_first_text(self) -> str:
        """The end of the caption of a figure that shows the first text only."""
        others = f", the first of {len(self.texts)} texts" if len(self.texts) > 1 else ""
        count = int(self.first_text.sum())
        return f" {count} {plural(count, 'token')}{others}."

    @property
    def first_text(self) -> Bool[np.ndarray, " pos"]:
        """Mask of the first text's real positions."""
        return np.asarray(self.batch.mask[0])


def _texts(options: AttentionScoresOptions) -> list[str]:
    """Returns the texts that the options give, or the study's own."""
    if options.text_file:
        return [read_text(path) for path in options.text_file]
    return list(options.text) or stimuli("attention_scores/purple.txt")
