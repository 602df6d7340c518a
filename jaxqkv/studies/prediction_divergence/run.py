"""The run of the study `prediction-divergence`: the model, the middle of a text, and one forward pass."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxqkv.errors import JaxqkvError, NotDrawable
from jaxqkv.runtime import console
from jaxqkv.runtime.devices import jit
from jaxqkv.studies.layers import OfOneLayer, pick_layer
from jaxqkv.studies.opening import load_model
from jaxqkv.studies.prediction_divergence import STUDY, PredictionDivergenceOptions
from jaxqkv.studies.prediction_divergence.divergences import LayerTests, layer_tests
from jaxqkv.studies.stimuli import alice
from jaxqkv.studies.study import Run
from jaxqkv.text.reading import read_text
from jaxqkv.typing import AnyArray

LAYER = 4


@jit
def _log_norms(attn_out: Float[AnyArray, "layer batch pos embed"]) -> Float[Array, "layer pos"]:
    return jnp.log(jnp.linalg.norm(attn_out[:, 0].astype(jnp.float32), axis=-1))


@jit
def _most_probable(logits: Float[AnyArray, "batch pos vocab"]) -> Int[Array, "pos"]:
    """Returns the token with the largest logit at each position; −1 if a logit is NaN."""
    return jnp.where(jnp.isnan(logits[0]).any(axis=-1), -1, logits[0].argmax(axis=-1))


@STUDY.computation
class PredictionDivergenceRun(OfOneLayer, Run):
    """The model, the layer that is shown, and the tokens and their next tokens."""

    def __init__(self, options: PredictionDivergenceOptions, folder: Path | None = None):
        self.model = load_model(options, STUDY)
        self.config, self.name = self.model.config, self.model.checkpoint.name
        self.layer, self.layer_note = pick_layer(options, LAYER, self.config.n_layer, self.name)
        if not (self.config.has_logits and self.config.causal):
            raise JaxqkvError(
                f"{self.name} does not predict next tokens; prediction-divergence takes GPT-2 checkpoints"
            )
        self.seed, self.permutations, self.as_published = options.seed, options.permutations, options.as_published
        self.source = "Alice's Adventures in Wonderland" if options.text_file is None else str(options.text_file)
        text = alice() if options.text_file is None else read_text(options.text_file)
        self._choose(self.model.tokenizer.encode([text], special_tokens=False)[0], options)

    def _choose(self, ids: list[int], options: PredictionDivergenceOptions) -> None:
        """Takes the tokens from the middle of the text on, and the next token of each.

        Raises:
          JaxqkvError: when the text has fewer than `--length`, or than two.
        """
        positions = self.config.n_positions
        if options.length is not None and options.length > positions:
            raise JaxqkvError(f"--length {options.length}: {self.name} has {positions} positions")
        self.start = len(ids) // 2
        there = len(ids) - self.start - 1
        wanted = options.length or positions
        least = 2 if options.length is None else options.length
        if there < least:
            raise JaxqkvError(
                f"{self.source} has {len(ids)} tokens, of which {max(there, 0)} from the middle on have a next one; "
                f"{least} or more are needed: give a longer text with --text-file"
            )
        self.note = "" if there >= wanted else f" ({self.source} has no more from its middle on.)"
        length = min(wanted, there)
        self.ids = np.array(ids[self.start : self.start + length], np.int32)
        self.next = np.array(ids[self.start + 1 : self.start + length + 1], np.int32)
        self.first = int(options.skip_first)
        self.pos = np.arange(self.first, length)

    def describe(self) -> dict[str, Any]:
        """Returns this run's entries in the manifest."""
        return {
            "checkpoint": [self.model.checkpoint.identity()],
            "layer": self.layer,
            "text": self.source,
            "tokens": [self.start, self.start + len(self.ids)],
            "skip first": bool(self.first),
            "permutations": self.permutations,
            "as published": self.as_published,
        }

    def compute(self, names: Collection[str]) -> dict[str, Any]:
        """Makes one forward pass.

        Returns:
          For each name, its arrays at all positions that count:
          `predicted`: the token with the largest logit `[pos]`, −1 if logits are NaN.
          `norms`: log norms of what attention adds `[layer, pos]`.
          `tests`: the tests of all layers; None if there are none.
        """
        if not names:
            return {}
        capture = {"logits"} if set(names) == {"predicted"} else {"logits", "attn_out"}
        with console.counting_bar(total=self.config.n_layer, desc="layers", unit="layer") as progress:
            captured = self.model.run(self.ids[None], capture=capture, progress=progress)
        self.predicted = np.asarray(_most_probable(captured.logits))[self.first :]
        computed: dict[str, Any] = {"predicted": self.predicted}
        if captured.attn_out is not None:
            computed["norms"] = np.asarray(_log_norms(captured.attn_out))[:, self.first :]
        if "tests" in names:
            computed["tests"] = self._tests(computed["norms"])
        return {name: computed[name] for name in names}

    def _tests(self, norms: Float[np.ndarray, "layer pos"]) -> LayerTests | None:
        correct = self.correct
        if not (correct.any() and (~correct).any() and np.isfinite(norms).all()):
            return None  # the figures report why
        key = jax.random.key(self.seed)
        return layer_tests(norms, correct, key, permutations=self.permutations, as_published=self.as_published)

    @property
    def correct(self) -> Bool[np.ndarray, "pos"]:
        """Positions at which the next token has the largest logit."""
        return self.predicted == self.next[self.first :]

    def need_both(self, what: str) -> None:
        """Refuses a figure that compares correct and incorrect positions if there is only one kind."""
        if broken := int((self.predicted < 0).sum()):
            raise NotDrawable(f"{what}: the logits of {broken} positions are NaN or infinite, so nothing is predicted")
        if not self.correct.any() or self.correct.all():
            kind = "no" if not self.correct.any() else "every"
            raise NotDrawable(f"{what} compares correct and incorrect predictions, and {kind} prediction is correct")

    @property
    def of_text(self) -> str:
        """The end of captions: the tokens, and how many are predicted correctly."""
        first = "the first left out" if self.first else "the first, at which attention may rest, among them"
        return (
            f" {len(self.pos):,} tokens of {self.source} from token {self.start + self.first:,} on, {first}; "
            f"{int(self.correct.sum()):,} are predicted correctly.{self.note}"
        )
