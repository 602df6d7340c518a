"""The run of the study `adjustment-magnitudes`: the model, the texts, and one forward pass."""

import itertools
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxqkv.architectures.activations import Attention
from jaxqkv.errors import CorpusError
from jaxqkv.figures.panels import plain
from jaxqkv.runtime import console
from jaxqkv.runtime.showing import counted
from jaxqkv.studies.adjustment_magnitudes import STUDY, AdjustmentMagnitudesOptions
from jaxqkv.studies.layers import pick_layer
from jaxqkv.studies.opening import load_model
from jaxqkv.studies.stimuli import stimuli
from jaxqkv.studies.study import Run
from jaxqkv.text.batches import Batch
from jaxqkv.text.corpora import open_corpus
from jaxqkv.typing import AnyArray

CORPUS = "cornell-movie-review-data/rotten_tomatoes::test"
# Memory for the temporaries of a block.
MEMORY = "2GB"


def norms(attention: Attention, mask: Bool[AnyArray, "batch pos"]) -> Float[Array, "batch pos"]:
    """Returns the Euclidean norm of what attention adds at each position; 0 at pads."""
    assert attention.attn_out is not None  # every block sets it
    return jnp.where(mask, jnp.linalg.norm(attention.attn_out.astype(jnp.float32), axis=-1), 0)


@STUDY.computation
class AdjustmentMagnitudesRun(Run):
    """The model and the texts."""

    def __init__(self, options: AdjustmentMagnitudesOptions, folder: Path | None = None):
        self.model = load_model(options, STUDY)
        self.name = self.model.checkpoint.name
        self.label = plain(self.name)
        self.notes: list[str] = []
        self.cut_note = self.fitted_note = ""
        pick_layer(options, 0, self.model.config.n_layer, self.name)
        if options.layer is not None:
            self.notes.append("every figure shows all layers; --layer changes nothing")
        self.texts = self._texts(options)
        longest = int(self.lengths.max())
        self.fitted = min(options.positions, longest - 1)
        if self.fitted < options.positions:
            short = f"no text reaches position {options.positions}: the longest has {longest} tokens"
            self.notes.append(f"figure 4 ends at position {self.fitted}, since {short}")
            self.fitted_note = f" ({short.capitalize()}.)"

    def _texts(self, options: AdjustmentMagnitudesOptions) -> list[str]:
        """Returns the first non-blank texts of the corpus, and describes the corpus in `about`.

        Raises:
          CorpusError: when there is none, or the corpus cannot be reached.
        """
        documents: Iterable[str]
        if options.demo and not options.corpus:
            documents = stimuli("token_similarity/her.txt")
            self.about = {"corpus": "token_similarity/her.txt", "source": "package"}
        else:
            how = {"documents": options.documents, "text_column": options.text_column}
            documents = corpus = open_corpus(options.corpus or CORPUS, **how)
            self.about = corpus.about
        texts = list(itertools.islice((text for text in documents if text.strip()), options.batch))
        if not texts:
            raise CorpusError(f"{self.about['corpus']}: no text in it; give files with text in them")
        if len(texts) < options.batch and options.corpus:
            found = counted(len(texts), "text")
            self.notes.append(f"{self.about['corpus']} has {found}, fewer than {options.batch}, and all are run")
        return texts

    @cached_property
    def batch(self) -> Batch:
        """The texts as ids without special tokens, padded on the right; texts too long for the model are cut."""
        tokenizer, positions = self.model.tokenizer, self.model.config.n_positions
        cut = sum(len(ids) > positions for ids in tokenizer.encode(self.texts, special_tokens=False))
        if cut:
            self.notes.append(f"cut to the model's {positions} positions: {cut} of {counted(len(self.texts), 'text')}")
            self.cut_note = f" ({self.notes[-1].capitalize()}.)"
        return self.model.tokenize(self.texts, special_tokens=False, truncate=True)

    @property
    def lengths(self) -> Int[np.ndarray, " batch"]:
        """Number of tokens of each text."""
        return np.asarray(self.batch.mask).sum(axis=1)

    def describe(self) -> dict[str, Any]:
        """Returns this run's entries in the manifest."""
        return {
            "checkpoint": [self.model.checkpoint.identity()],
            "corpus": self.about,
            "texts": len(self.texts),
            "notes": self.notes,
        }

    def compute(self, names: Collection[str]) -> dict[str, Float[np.ndarray, "layer batch pos"]]:
        """Makes one forward pass, and keeps the norms of each layer.

        Returns:
          `norms` `[layer, batch, pos]`, if any name is given: Euclidean norms of what attention adds, 0 at pads.
        """
        if not names:
            return {}
        with console.counting_bar(total=self.model.config.n_layer, desc="layers", unit="layer") as progress:
            kept = self.model.run(self.batch, reduce=norms, memory=MEMORY, progress=progress)
        return {"norms": np.asarray(kept)}

    @property
    def of_texts(self) -> str:
        """The end of captions: the texts and their lengths."""
        lengths = self.lengths
        return f" {len(lengths)} texts of {lengths.min()} to {lengths.max()} tokens.{self.cut_note}"
