"""The run of the study `token-similarity`: the model, the target's position in each sentence, and one forward pass."""

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxqkv.architectures.activations import Attention
from jaxqkv.errors import JaxqkvError
from jaxqkv.kernels import column_correlation, column_cosine, group_densities, permute_entries, upper_density
from jaxqkv.runtime import console
from jaxqkv.runtime.devices import compile_early, jit
from jaxqkv.studies.layers import OfOneLayer, pick_layer
from jaxqkv.studies.opening import load_model
from jaxqkv.studies.stimuli import stimuli
from jaxqkv.studies.study import Run
from jaxqkv.studies.token_similarity import STUDY, TokenSimilarityOptions
from jaxqkv.studies.token_similarity.exchanges import exchange_p
from jaxqkv.text.reading import read_sentences
from jaxqkv.text.tokenizers import find_token
from jaxqkv.typing import AnyArray

LAYER = 6
EDGES = np.linspace(-1, 1, 101)

Samples = Float[AnyArray, "sentence three_embed"]


@jit
def _at(attention: Attention, positions: Int[AnyArray, " sentence"]) -> Samples:
    """Returns Q, K and V of one position of each sentence, side by side."""

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


# A reduction's arrays by name.
Reduced = Mapping[str, np.ndarray]


@STUDY.computation
class TokenSimilarityRun(OfOneLayer, Run):
    """The model, the layer that is shown, the sentences, and the target's position in each."""

    def __init__(self, options: TokenSimilarityOptions, folder: Path | None = None):
        self.model = load_model(options, STUDY)
        self.config = self.model.config
        self.name = self.model.checkpoint.name
        self.seed, self.measure, self.target_text = options.seed, options.measure, options.target
        self.significance, self.permutations = options.significance, options.permutations
        self.layer, self.layer_note = pick_layer(options, LAYER, self.config.n_layer, self.name)
        self.sentences = _sentences(options)
        self.skip_missing = options.skip_missing
        self._locate()

    def _locate(self) -> None:
        """Finds the target and the token before it; a sentence without either is an error, or left out."""
        rows = self.model.tokenizer.encode(self.sentences, special_tokens=not self.config.causal)
        token = self.model.tokenizer.single_token(self.target_text)
        places = [find_token(ids, token) for ids in rows]
        bad = [number for number, place in enumerate(places) if place is None or place < 1]
        if bad and not self.skip_missing:
            number, target = bad[0], self.target_text
            reason = "lacks" if places[number] is None else "has nothing before"
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
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
        """Returns this run's entries in the manifest."""
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
        """Whether similarity is correlation, the cosine of centred columns."""
        return self.measure == "correlation"

    def compute(self, names: Collection[str]) -> dict[str, Reduced]:
        """Makes one forward pass up to the last layer that is needed, and keeps two positions of each sentence.

        Returns:
          For each name, its arrays:
          `samples`: Q, K and V `[sentence, three_embed]` of the layer, of the `target` and the token before it
          (`non_target`).
          `group_densities`: densities of their similarities by group, and the `random` control's.
          `laminar`: `densities` `[layer, two, group, bin]`, `mean` and `variance` `[layer, qkv]`.
          With `--significance` the last two have `p` of target against non-target, by group.
        """
        if not names:
            return {}
        batch = self.model.tokenize(self.sentences, special_tokens=not self.config.causal)
        layers = range(self.config.n_layer) if "laminar" in names else [self.layer]
        shape = jax.ShapeDtypeStruct((len(self.sentences), 3 * self.embed), np.float32)
        if {"group_densities", "laminar"} & set(names):
            densities = compile_early(_densities, shape, shape, centred=self.centred)
        if "group_densities" in names:
            random_density = compile_early(_random_density, shape, self.key)
        computed: dict[str, Reduced] = {}
        results: list[Any] = []
        with console.bar(total=len(layers), desc="layers", unit="layer") as progress:
            for layer, attention in self.model.layerwise(batch, capture={"q", "k", "v"}, layers=layers):
                attention = attention.astype(np.float32)
                target, non_target = (_at(attention, self.positions - shift) for shift in (0, 1))
                if layer == self.layer:
                    computed["samples"] = {"target": np.asarray(target), "non_target": np.asarray(non_target)}
                if "laminar" in names:
                    mean, variance = _mean_and_variance(target)
                    tests = (self._p(target, non_target),) if self.significance else ()
                    results.append((densities(target, non_target), mean, variance, *tests))
                    jax.block_until_ready(results[-1])
                progress.update()
        if "group_densities" in names:
            target, non_target = computed["samples"]["target"], computed["samples"]["non_target"]
            by_group = dict(zip(("target", "non_target"), np.asarray(densities(target, non_target)), strict=True))
            by_group["random"] = np.asarray(random_density(target, self.key))
            if self.significance:
                by_group["p"] = np.asarray(self._p(target, non_target))
            computed["group_densities"] = by_group
        if results:
            stacked = (np.stack(leaves) for leaves in zip(*results, strict=True))
            names_of = ("densities", "mean", "variance", *(("p",) if self.significance else ()))
            computed["laminar"] = dict(zip(names_of, stacked, strict=True))
        return computed

    def _p(self, target: Samples, non_target: Samples) -> Float[Array, " group"]:
        """Returns p of target against non-target by group."""
        return exchange_p(target, non_target, self.key, centred=self.centred, permutations=self.permutations)

    def similarity(self, samples: Samples) -> Float[np.ndarray, "three_embed three_embed"]:
        """Returns the measure between all dimensions of the samples."""
        return np.asarray((column_correlation if self.centred else column_cosine)(samples))

    @cached_property
    def key(self) -> Key[Array, ""]:
        """Random key of the shuffled control and of the tests."""
        return jax.random.key(self.seed)

    @property
    def tested(self) -> str:
        """The description of the tests in captions, after the name of the mark."""
        return (
            f"the means of target and non-target differ, q < 0.05 of two-sided tests in which both tokens of a "
            f"sentence are exchanged or not ({self.permutations:,} times, seed {self.seed})."
        )

    @property
    def embed(self) -> int:
        """Width of Q, of K and of V."""
        return self.config.attention_width

    @property
    def left_out(self) -> str:
        """The caption's sentence on sentences that were left out."""
        return f" {len(self.skipped)} sentences without the target were left out." if self.skipped else ""


def _sentences(options: TokenSimilarityOptions) -> list[str]:
    """Returns the lines of a file, sentences given from Python, or the study's own.

    Raises:
      JaxqkvError: when there is no sentence, or one is not a text.
    """
    if options.sentences is None:
        return stimuli("token_similarity/her.txt")
    if isinstance(options.sentences, Path):
        return read_sentences(options.sentences)
    given = list(options.sentences)
    for number, each in enumerate(given):
        if not isinstance(each, str):
            raise JaxqkvError(f"sentences must be a file or texts, and sentence {number} is {each!r}")
    if sentences := [each for each in given if each.strip()]:
        return sentences
    raise JaxqkvError("sentences: no sentence in it")
