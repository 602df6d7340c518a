"""The run of the study `head-silencing`: a clean run, one with a head silenced, and sweeps that silence every head."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxqkv import edits, metrics
from jaxqkv.errors import JaxqkvError, NotDrawable
from jaxqkv.kernels import column_cosine
from jaxqkv.model.model import Model
from jaxqkv.runtime.devices import jit
from jaxqkv.studies.head_silencing import STUDY, HeadSilencingOptions
from jaxqkv.studies.layers import OfOneLayer, nearest_index, pick_layer
from jaxqkv.studies.opening import is_demo, load_model
from jaxqkv.studies.stimuli import stimuli
from jaxqkv.studies.study import Run
from jaxqkv.text.batches import Batch

LAYER, HEAD = 4, 1
# Figure 4c's model, layer, and text and tokens; and text and tokens for the bundled checkpoint.
FACT_MODEL, FACT_LAYER = "gpt2", 5
FACT = ("Berlin is the capital of", " Germany", " France")
DEMO_FACT = ("I went to the house and I saw", " her", " him")


@jit
def position_cosines(stream: Float[Array, "pos embed"]) -> Float[Array, "pair"]:
    """Returns the cosines of all pairs of positions but the first, in the order of the upper triangle."""
    cosines = column_cosine(stream[1:].T)
    return cosines[jnp.triu_indices(len(cosines), 1)]


class Sweep(NamedTuple):
    """Log probabilities (nats) of the next token when each head is silenced alone, `[layer, head]`.

    Attributes:
      target: log probability of the target.
      largest: log probability of the most probable token.
      token: the most probable token.
    """

    target: np.ndarray
    largest: np.ndarray
    token: np.ndarray


@STUDY.computation
class HeadSilencingRun(OfOneLayer, Run):
    """The model, the text, and the head that is silenced."""

    def __init__(self, options: HeadSilencingOptions, folder: Path | None = None):
        self.options = options
        self.model = load_model(options, STUDY)
        self.config = self.model.config
        self.name = self.model.checkpoint.name
        self.layer, self.layer_note = pick_layer(options, LAYER, self.config.n_layer, self.name)
        self.head = min(HEAD, self.config.n_head - 1) if options.head is None else options.head
        if self.head >= self.config.n_head:
            raise JaxqkvError(f"--head {self.head}: the heads of {self.name} are 0 to {self.config.n_head - 1}")
        self.text = stimuli("head_silencing/music.txt")[0] if options.text is None else options.text
        self._target = None if options.target is None else self.model.tokenizer.single_token(options.target)

    def describe(self) -> dict[str, Any]:
        """Returns this run's entries in the manifest."""
        about = {"layer": self.layer, "head": self.head, "edit": self.options.edit, "text": self.text}
        return {"checkpoint": [self.model.checkpoint.identity()], **about}

    @cached_property
    def batch(self) -> Batch:
        """The text as ids, with the tokenizer's special tokens unless the model is causal."""
        return self.model.tokenize(self.text, special_tokens=not self.config.causal)

    def silence(self, heads: Sequence[tuple[int, int]]) -> edits.Edit:
        """Returns the edit of some heads' z that the options choose."""
        if self.options.edit == "permute":
            return edits.permute(self.options.seed, heads)
        return {"zero": edits.zero, "mean": edits.mean}[self.options.edit](heads)

    def compute(self, names: Collection[str]) -> Mapping[str, Any]:
        """Returns the reductions by name; those that need logits are None for a model without them."""
        computed: dict[str, Any] = dict.fromkeys(names)
        if "cosines" in names:
            computed["cosines"] = tuple(self._cosines(edited) for edited in (False, True))
        if self.config.has_logits:
            for name in set(names) & {"runs", "sweep", "gradient", "fact"}:
                computed[name] = getattr(self, f"_{name}")()
        return computed

    def _cosines(self, edited: bool) -> Float[np.ndarray, "layer pair"]:
        """Returns the cosines between positions of the hidden states after each block."""
        self.need_tokens(3)
        edit = {"z": self.silence([(self.layer, self.head)])} if edited else None
        rows = self.model.layerwise(self.batch, capture={"resid_post"}, edit=edit)
        streams: Any = (attention.resid_post for _, attention in rows)
        return np.stack([position_cosines(stream[0].astype(np.float32)) for stream in streams])

    def _runs(self) -> tuple[Float[np.ndarray, " vocab"], Float[np.ndarray, " vocab"]]:
        """Returns log probabilities of the next token, clean and silenced."""
        silent = self.model.measure(self.batch, _log_probabilities, {"z": self.silence([(self.layer, self.head)])})
        return self.clean, silent

    def _sweep(self) -> Sweep:
        return sweep_of(self.model, self.batch, self.silence, self.target)

    def _gradient(self) -> Float[np.ndarray, "layer head"]:
        """Returns the first-order change of the target's log probability."""
        metric = metrics.log_probability(self.target)
        found = self.model.sweep(self.batch, self.silence, metric, method="gradient")
        return np.asarray(found) - self.clean[self.target]

    def _fact(self) -> Any:
        """Returns figure 4c's model, layer, text, words, changes and tokens; or the reason why it is not drawn."""
        given = self.options
        own = given.model or given.demo
        model = self.model if own else load_model(dataclasses.replace(given, model=(FACT_MODEL,)), STUDY)
        default = DEMO_FACT if is_demo(model.checkpoint, STUDY) else FACT
        wanted = (given.fact, given.answer, given.against)
        if given.fact == "":
            raise JaxqkvError("--fact is empty; give a text, or leave it out for the study's own")
        text, answer, against = (own if each is None else each for each, own in zip(wanted, default, strict=True))
        try:
            tokens = [model.tokenizer.single_token(word) for word in (answer, against)]
        except JaxqkvError as error:
            message = f"figure 4c: {error}; choose --fact, --answer and --against"
            if any(each is not None for each in wanted):
                raise JaxqkvError(message) from None
            return NotDrawable(message)
        layer = nearest_index(FACT_LAYER, model.config.n_layer, 12) if given.layer is None else given.layer
        batch = model.tokenize(text)
        clean = np.asarray(model.measure(batch, _log_probabilities))
        several = {name: metrics.log_probability(token) for name, token in zip("ab", tokens, strict=True)}
        several["token"] = metrics.of_logits(_most_probable)
        found = model.sweep(batch, self.silence, several, layers=[layer], per_text=True)
        changes = [np.asarray(found[name])[0, 0] - clean[token] for name, token in zip("ab", tokens, strict=True)]
        return model, layer, text, (answer, against), changes, np.asarray(found["token"])[0, 0]

    @cached_property
    def clean(self) -> Float[np.ndarray, " vocab"]:
        """Log probabilities of the clean run's next token."""
        return np.asarray(self.model.measure(self.batch, _log_probabilities))

    @property
    def target(self) -> int:
        """The target: the token whose probability is shown."""
        return int(self.clean.argmax()) if self._target is None else self._target

    def need_tokens(self, count: int) -> None:
        """Refuses figures that need a longer text."""
        if self.batch.ids.shape[1] < count:
            raise NotDrawable(
                f"pairs of positions need a text of {count} tokens or more, not {self.batch.ids.shape[1]}"
            )

    def word(self, token: Any) -> str:
        """Returns a token's text in quotes, for captions."""
        return repr(self.model.tokenizer.tokens([int(token)])[0])

    @property
    def silenced(self) -> str:
        """The edit of a silenced head in words, for captions."""
        how = {"zero": "at 0", "mean": "at its mean over positions", "permute": "shuffled"}[self.options.edit]
        return f"z {how}"


def sweep_of(model: Model, batch: Batch, silence: Any, target: int) -> Sweep:
    """Sweeps over every head of a model."""
    several = {
        "target": metrics.log_probability(target),
        "largest": metrics.largest(),
        "token": metrics.of_logits(_most_probable),
    }
    found = model.sweep(batch, silence, several, per_text=True)
    return Sweep(**{name: np.asarray(found[name])[0] for name in Sweep._fields})


def _log_probabilities(logits: Any) -> Any:
    return jax.nn.log_softmax(logits)


def _most_probable(logits: Any) -> Any:
    return logits.argmax(-1)
