"""The run of the study `category-selectivity`: the model, the words, and one forward pass."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxqkv.architectures.activations import Attention
from jaxqkv.architectures.attention import merge_heads
from jaxqkv.kernels import column_cosine, pearson
from jaxqkv.runtime import console
from jaxqkv.studies.category_selectivity import STUDY, CategorySelectivityOptions
from jaxqkv.studies.category_selectivity.words import read_words
from jaxqkv.studies.layers import OfOneLayer, pick_layer
from jaxqkv.studies.opening import load_model
from jaxqkv.studies.study import Run
from jaxqkv.typing import AnyArray

LAYER = 6
CONTEXT = "The next word is "
# Pairs of Q, K and V, in the order of every axis `pair`.
PAIRS = {"QK": (0, 1), "QV": (0, 2), "KV": (1, 2)}
# Position at which the original's part 2 takes its activations.
PUBLISHED_POSITION = 1

# Arrays of the layer that is shown, or of all layers, by name.
Reduced = Mapping[str, np.ndarray]


def word_statistics(
    attention: Attention, mask: Bool[AnyArray, "word pos"], positions: Int[AnyArray, "word two"]
) -> dict[str, Float[Array, "..."]]:
    """Reduces one layer to the arrays that figures take.

    Args:
      attention: q, k and v of the layer.
      mask: True at real tokens.
      positions: position of each word, and position for figures 2a and 2b.

    Returns:
      `similarity` `[qkv, word, word]`: cosines between words; `activations` `[qkv, word, embed]` at the second
      position; `r` `[pair]`: their correlations.
    """

    def pick(column: int) -> Float[Array, "qkv word embed"]:
        place = positions[:, column, None, None]
        three = [x for x in (attention.q, attention.k, attention.v) if x is not None]
        return jnp.stack([jnp.take_along_axis(merge_heads(x), place, axis=1)[:, 0] for x in three]).astype(jnp.float32)

    similarity = jax.vmap(lambda x: column_cosine(x.T))(pick(0))
    activations = pick(1)
    r = jnp.stack([pearson(activations[a], activations[b]) for a, b in PAIRS.values()])
    return {"similarity": similarity, "activations": activations, "r": r}


@STUDY.computation
class CategorySelectivityRun(OfOneLayer, Run):
    """The model, the layer that is shown, and the words."""

    def __init__(self, options: CategorySelectivityOptions, folder: Path | None = None):
        self.model = load_model(options, STUDY)
        self.config, self.name = self.model.config, self.model.checkpoint.name
        self.layer, self.layer_note = pick_layer(options, LAYER, self.config.n_layer, self.name)
        self.seed, self.permutations, self.as_published = options.seed, options.permutations, options.as_published
        self.words = read_words(options.words)
        self.source = None if options.words is None else str(options.words)
        self.texts = [CONTEXT + word for word in self.words.words]
        self._locate()

    def _locate(self) -> None:
        """Finds the last token of each word, and the words with several tokens."""
        tokenizer, special = self.model.tokenizer, not self.config.causal
        bare = tokenizer.encode(self.texts, special_tokens=False)
        whole = tokenizer.encode(self.texts, special_tokens=special)
        before = [next(i for i in range(len(w)) if w[i : i + len(b)] == b) for b, w in zip(bare, whole, strict=True)]
        last = np.array([start + len(ids) - 1 for start, ids in zip(before, bare, strict=True)], np.int32)
        (context,) = tokenizer.encode([CONTEXT.rstrip()], special_tokens=False)
        pieces = [word for word, ids in zip(self.words.words, bare, strict=True) if len(ids) > len(context) + 1]
        self.pieces = f" Words of several tokens, whose last one is used: {', '.join(pieces)}." if pieces else ""
        elsewhere = np.full_like(last, PUBLISHED_POSITION) if self.as_published else last
        self.positions = np.stack([last, elsewhere], axis=1)

    def describe(self) -> dict[str, Any]:
        """Returns this run's entries in the manifest."""
        words = dict(zip(self.words.words, (self.words.categories[i] for i in self.words.label), strict=True))
        return {
            "checkpoint": [self.model.checkpoint.identity()],
            "layer": self.layer,
            "context": CONTEXT,
            "words": words,
            "permutations": self.permutations,
            "as published": self.as_published,
        }

    def compute(self, names: Collection[str]) -> dict[str, Reduced]:
        """Makes one forward pass up to the last layer that is needed.

        Returns:
          For each name, the arrays of `word_statistics`: `shown` for one layer; `layers` for all, with a layer axis and
          without activations.
        """
        if not names:
            return {}
        batch = self.model.tokenize(self.texts, special_tokens=not self.config.causal)
        layers = range(self.config.n_layer) if "layers" in names else [self.layer]
        with console.counting_bar(total=layers[-1] + 1, desc="layers", unit="layer") as progress:
            kept = self.model.run(
                batch, reduce=word_statistics, inputs=self.positions, layers=list(layers), progress=progress
            )
        arrays = {name: np.asarray(values) for name, values in kept.items()}
        place = list(layers).index(self.layer)
        computed: dict[str, Reduced] = {"shown": {name: values[place] for name, values in arrays.items()}}
        computed["layers"] = {name: arrays[name] for name in ("similarity", "r")}
        return {name: computed[name] for name in names}

    @property
    def of_words(self) -> str:
        """The end of captions: the words and categories."""
        return f" {len(self.words.words)} words of {len(self.words.categories)} categories.{self.pieces}"

    @property
    def at_position(self) -> str:
        """The note on the position in the captions of figures 2a and 2b."""
        return " (as published: of the second token, the same in every text)" if self.as_published else ""
