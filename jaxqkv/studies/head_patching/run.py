"""The run of the study `head-patching`: the texts, and sweeps that shuffle each head or take it from the donor."""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxqkv import edits, metrics
from jaxqkv.architectures.activations import Activations
from jaxqkv.errors import JaxqkvError, NotDrawable
from jaxqkv.studies.head_patching import STUDY, HeadPatchingOptions
from jaxqkv.studies.layers import OfOneLayer, pick_layer
from jaxqkv.studies.opening import is_demo, load_model
from jaxqkv.studies.pairs import Pair, answer_tokens, chosen_pair
from jaxqkv.studies.study import Run
from jaxqkv.text.batches import Batch
from jaxqkv.text.reading import read_text

LAYER = 4
# Number of resamples of pairs, and the ends of the intervals in percent.
RESAMPLES, INTERVAL = 1000, (2.5, 97.5)


# Reductions that need next-token logits.
OF_LOGITS = ("scores", "shuffled", "patched", "positions")


class Scores(NamedTuple):
    """Log probabilities of the next token after the first pair, `[vocab]`, and IOI scores of all pairs, `[pair]`."""

    clean: np.ndarray
    donor: np.ndarray
    score_clean: np.ndarray
    score_donor: np.ndarray


@STUDY.computation
class HeadPatchingRun(OfOneLayer, Run):
    """The model and the pairs of texts."""

    def __init__(self, options: HeadPatchingOptions, folder: Path | None = None):
        self.options = options
        self.model = load_model(options, STUDY)
        self.config = self.model.config
        self.name = self.model.checkpoint.name
        self.layer, self.layer_note = pick_layer(options, LAYER, self.config.n_layer, self.name)
        self.pairs = _pairs(options, is_demo(self.model.checkpoint, STUDY))
        self.answers = np.array([answer_tokens(self.model.tokenizer, pair.answers) for pair in self.pairs])
        self.clean, self.donor = (
            self.model.tokenize([pair[side] for pair in self.pairs], special_tokens=not self.config.causal)
            for side in (0, 1)
        )
        self._check_lengths()

    def _check_lengths(self) -> None:
        counts = [np.asarray(batch.mask).sum(axis=1) for batch in (self.clean, self.donor)]
        for index, (one, two) in enumerate(zip(*counts, strict=True)):
            if one != two:
                pieces = (" ".join(map(repr, self.tokens(batch, index))) for batch in (self.clean, self.donor))
                raise JaxqkvError(
                    f"clean and donor must have the same number of tokens, not {one} and {two}: {'; '.join(pieces)}"
                )

    def describe(self) -> dict[str, Any]:
        """Returns this run's entries in the manifest."""
        pairs = [{"clean": pair.clean, "donor": pair.donor, "answers": list(pair.answers)} for pair in self.pairs]
        return {"checkpoint": [self.model.checkpoint.identity()], "layer": self.layer, "pairs": pairs}

    def compute(self, names: Collection[str]) -> Mapping[str, Any]:
        """Returns the reductions by name; those that need logits are None for a model without them."""
        wanted = [name for name in names if self.config.has_logits or name not in OF_LOGITS]
        return dict.fromkeys(names) | {name: getattr(self, f"_{name}")() for name in wanted}

    @property
    def metric(self) -> metrics.Metric:
        """The IOI score: logit of the first answer minus that of the second."""
        return metrics.logit_difference(self.answers[:, 0], self.answers[:, 1])

    @cached_property
    def score_clean(self) -> Float[np.ndarray, " pair"]:
        """IOI scores of the clean texts."""
        return np.asarray(self.model.measure(self.clean, self.metric, per_text=True))

    @cached_property
    def score_donor(self) -> Float[np.ndarray, " pair"]:
        """IOI scores of the donors."""
        return np.asarray(self.model.measure(self.donor, self.metric, per_text=True))

    @cached_property
    def _donor_z(self) -> Activations:
        found: Activations = self.model.run(self.donor, capture={"z"})
        return found

    def _scores(self) -> Scores:
        both = (self.model.measure(batch, jax.nn.log_softmax, per_text=True)[0] for batch in (self.clean, self.donor))
        clean, donor = map(np.asarray, both)
        return Scores(clean, donor, self.score_clean, self.score_donor)

    def _shuffled(self) -> tuple[Float[np.ndarray, "layer head"], Float[np.ndarray, "layer head"]]:
        """Returns the mean change of the score with each head's z shuffled, and the norm of z."""
        deltas = []
        for repeat in range(self.options.repeats):
            key = jax.random.key(self.options.seed + repeat)
            found = self.model.sweep(self.clean, lambda heads, key=key: edits.permute(key, heads), self.metric)
            deltas.append(np.asarray(found) - self.score_clean.mean())
        z = np.asarray(self.model.run(self.clean, capture={"z"}).z, np.float32)
        real = np.asarray(self.clean.mask)[None, :, None, :, None]
        norm = np.sqrt(np.where(real, z**2, 0).sum(axis=(3, 4))).mean(axis=1)
        return np.mean(deltas, axis=0), norm

    def _z(self) -> Float[np.ndarray, "layer pos head head_dim"]:
        """Returns z of the first donor."""
        mask = np.asarray(self.donor.mask)[0]
        assert self._donor_z.z is not None  # it is captured
        return np.asarray(self._donor_z.z, np.float32)[:, 0].swapaxes(1, 2)[:, mask]

    def _patched(self) -> Float[np.ndarray, "pair layer head"]:
        """Returns the change of the score with each head's z taken from the donor."""
        found = self.model.sweep(self.clean, self._from_donor, self.metric, per_text=True)
        return np.asarray(found) - self.score_clean[:, None, None]

    def _positions(self) -> Float[np.ndarray, "layer head pos"]:
        """Returns the change of the score for each position alone, the mean over pairs that have a token there."""
        found = self.model.sweep(self.clean, self._from_donor, self.metric, per_text=True, by_position=True)
        change = np.asarray(found) - self.score_clean[:, None, None, None]
        real = np.asarray(self.clean.mask)[:, None, None]
        return np.where(real, change, 0).sum(axis=0) / real.sum(axis=0)

    def _from_donor(self, heads: Any) -> edits.Edit:
        return edits.replace(self._donor_z, heads)

    def intervals(self, values: Float[np.ndarray, "pair layer head"]) -> Float[np.ndarray, "two layer head"]:
        """Returns bootstrap intervals of the mean over pairs."""
        generator = np.random.default_rng(self.options.seed)
        count = len(values)
        drawn = generator.multinomial(count, np.full(count, 1 / count), RESAMPLES) / count
        return np.percentile(np.einsum("rp,plh->rlh", drawn, values), INTERVAL, axis=0)

    def places(self) -> Int[np.ndarray, " two"]:
        """Returns the first two positions of the first answer in the first donor.

        Raises:
          NotDrawable: if there are fewer than two.
        """
        ids = np.asarray(self.donor.ids)[0][np.asarray(self.donor.mask)[0]]
        found = np.flatnonzero(ids == self.answers[0, 0])
        if len(found) < 2:
            times = {0: "not at all", 1: "once"}[len(found)]
            raise NotDrawable(f"the donor must have the token {self.pairs[0].answers[0]!r} twice, and has it {times}")
        return found[:2]

    def tokens(self, batch: Batch, index: int) -> Sequence[str]:
        """Returns the tokens of a text of a batch."""
        ids = np.asarray(batch.ids)[index][np.asarray(batch.mask)[index]]
        return self.model.tokenizer.tokens(ids.tolist())

    @property
    def of_pairs(self) -> str:
        """The end of the caption of a figure that shows all pairs."""
        if len(self.pairs) == 1:
            return " One pair of sentences proves little; --pairs averages over many."
        return f" Mean over {len(self.pairs)} pairs of sentences."


def _pairs(options: HeadPatchingOptions, demo: bool) -> list[Pair]:
    """Returns the pairs that the options give, or the study's own.

    Raises:
      JaxqkvError: for a file whose lines are not pairs, and unless there are two answers.
    """
    if options.pairs is not None:
        if options.clean is not None or options.donor is not None or options.answers:
            raise JaxqkvError("--pairs excludes --clean, --donor and --answers")
        pairs = []
        for number, line in enumerate(read_text(options.pairs).splitlines(), 1):
            columns = line.split("\t")
            if len(columns) == 4 and all(columns):
                pairs.append(Pair(columns[0], columns[1], (columns[2], columns[3])))
            elif line.strip():
                raise JaxqkvError(
                    f"{options.pairs}: line {number} has {len(columns)} columns; clean text, donor, first and second "
                    "answer are expected, between tabs"
                )
        if not pairs:
            raise JaxqkvError(f"{options.pairs}: no pair of texts in it")
        return pairs
    return [chosen_pair(options, demo)]
