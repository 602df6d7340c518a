"""The run of the study `heads`: the checkpoint and its texts. Each figure's file computes what it takes of them."""

from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from jaxqkv.errors import CheckpointError, JaxqkvError, NotDrawable, NoTokenizer
from jaxqkv.figures.panels import plain
from jaxqkv.studies.heads import STUDY, HeadsOptions
from jaxqkv.studies.opening import is_demo, load_model, wide_weights
from jaxqkv.studies.pairs import Pair, answer_tokens, chosen_pair
from jaxqkv.studies.stimuli import stimuli
from jaxqkv.studies.study import Run
from jaxqkv.text.batches import Batch

Value = TypeVar("Value")
# What figures take, by name: functions of the run.
REDUCTIONS: dict[str, Callable[["HeadsRun"], Any]] = {}


def reduction(function: Callable[["HeadsRun"], Value]) -> Callable[["HeadsRun"], Value]:
    """Makes the decorated function a reduction: figures that have a parameter of its name are given its result.

    It is called once for all figures. Those are not drawn if it raises `NotDrawable`.
    """
    REDUCTIONS[function.__name__] = function
    return function


@STUDY.computation
class HeadsRun(Run):
    """The checkpoint, and the texts that figures run.

    Attributes:
      options: of the study.
      model: reads weights and tokenizer when it is run.
      weights: the checkpoint's, in float32.
      config: its sizes.
      name: of the checkpoint.
    """

    def __init__(self, options: HeadsOptions, folder: Path | None = None):
        self.options = options
        self.model = load_model(options, STUDY)
        self.weights = wide_weights(self.model)
        self.config = self.model.config
        self.name = self.model.checkpoint.name
        if options.layer is not None and not 0 <= options.layer < self.config.n_layer:
            raise JaxqkvError(f"--layer {options.layer}: the layers of {self.name} are 0 to {self.config.n_layer - 1}")
        self.pair: Pair = chosen_pair(options, is_demo(self.model.checkpoint, STUDY))

    def describe(self) -> dict[str, Any]:
        """Returns what the manifest says of this run."""
        texts = {"text": self.text, "clean": self.pair.clean, "donor": self.pair.donor}
        about = {"answers": list(self.pair.answers), "null": self.options.null, "raw": self.options.raw}
        return {"checkpoint": [self.model.checkpoint.identity()], **texts, **about}

    def compute(self, names: Collection[str]) -> Mapping[str, Any]:
        """Returns the reductions by name; the error in the place of one that cannot be computed."""
        computed: dict[str, Any] = {}
        for name in sorted(names):
            try:
                computed[name] = REDUCTIONS[name](self)
            except (NotDrawable, NoTokenizer) as error:
                computed[name] = NotDrawable(str(error))
        return computed

    @property
    def label(self) -> str:
        """The checkpoint, for a title."""
        return plain(self.name)

    @property
    def text(self) -> str:
        """The text that is run where a figure says no other."""
        return stimuli("attention_scores/purple.txt")[0] if self.options.text is None else self.options.text

    @cached_property
    def batch(self) -> Batch:
        """The study's text as ids; for a model that sees both ways, with the tokenizer's special tokens.

        Raises:
          NotDrawable: if the study's own text does not fit the model.
        """
        return self._fitting(self.options.text is not None, lambda: self.tokenize(self.text), "--text")

    @cached_property
    def pair_batch(self) -> Batch:
        """The clean text and the donor as ids.

        Raises:
          NotDrawable: if the study's own do not fit the model.
        """
        given = self.options.clean is not None or self.options.donor is not None
        return self._fitting(given, lambda: self.tokenize(self.pair.clean, self.pair.donor), "--clean and --donor")

    @cached_property
    def answers(self) -> tuple[int, int]:
        """The tokens of the two answers.

        Raises:
          NotDrawable: if the study's own are not one token each.
        """
        given = bool(self.options.answers)
        return self._fitting(given, lambda: answer_tokens(self.model.tokenizer, self.pair.answers), "--answers")

    def tokenize(self, *texts: str) -> Batch:
        """Returns texts as a batch; for a model that sees both ways, with the tokenizer's special tokens."""
        return self.model.tokenize(texts, special_tokens=not self.config.causal)

    @staticmethod
    def _fitting(given: bool, make: Callable[[], Value], options: str) -> Value:
        """Returns `make()` of a stimulus, `given` by options or the study's own.

        Raises:
          JaxqkvError: about a stimulus that is given, naming the options; it ends the run.
          NotDrawable, NoTokenizer: about the study's own, which leave figures out.
        """
        try:
            return make()
        except NoTokenizer as error:
            if given:
                raise CheckpointError(f"{options}: {error}") from None
            raise
        except CheckpointError:
            raise
        except JaxqkvError as error:
            if given:
                raise JaxqkvError(f"{options}: {error}") from None
            raise NotDrawable(f"{error}; choose {options}") from None
