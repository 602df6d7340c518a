"""Figure `types`: attention of heads in random tokens that are said twice."""

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxqkv.architectures.activations import Attention
from jaxqkv.checkpoints.checkpoint import Checkpoint
from jaxqkv.errors import JaxqkvWarning, NotDrawable, NoTokenizer
from jaxqkv.figures import style
from jaxqkv.figures.displays import Display
from jaxqkv.figures.panels import Image, Line, Lines, extremes
from jaxqkv.kernels import HeadTypes, bootstrap_interval, head_types
from jaxqkv.model.model import Model
from jaxqkv.studies.heads import STUDY
from jaxqkv.studies.heads.null import null_q, null_values
from jaxqkv.studies.heads.run import HeadsRun, reduction
from jaxqkv.studies.significance import LEVEL, star_texts
from jaxqkv.text.corpora import digest

# Texts, and the tokens of each that are said twice.
TEXTS, TOKENS = 32, 25
# Kinds of heads that fresh checkpoints are the null of, and those that are compared with a text without a repetition.
KINDS, REPEATING = ("previous", "duplicate", "induction"), ("duplicate", "induction")
# Raised when types are computed otherwise, so that those of fresh checkpoints are computed again.
VERSION = 1


class Repeated(NamedTuple):
    """Texts that are said twice, and the same with other tokens as their first half.

    Attributes:
      texts: `[text, 2n]`.
      control: their second halves after others.
      all_ids: whether special tokens may be among them, since there is no tokenizer to name them.
    """

    texts: Int[np.ndarray, "text pos"]
    control: Int[np.ndarray, "text pos"]
    all_ids: bool


def repeated_texts(run_model: Model, seed: int) -> Repeated:
    """Returns texts of different random tokens, said twice, keyed by the seed.

    Raises:
      NotDrawable: for a model of too few positions or tokens.

    Warns:
      JaxqkvWarning: of a model without a tokenizer, whose texts may have special tokens.
    """
    config = run_model.config
    try:
        ids, all_ids = run_model.tokenizer.ordinary_ids, False
    except NoTokenizer:
        ids, all_ids = np.arange(config.vocab_size, dtype=np.int32), True
        message = (
            f"{run_model.checkpoint.name} has no tokenizer that names special tokens: the random tokens are drawn from "
            f"all {config.vocab_size} ids, special ones too; --tokenizer FOLDER names them"
        )
        warnings.warn(JaxqkvWarning(message), stacklevel=2)
    n = min(TOKENS, config.n_positions // 2, len(ids) // 2)
    if n < 2:
        raise NotDrawable(f"a text that is said twice needs 4 positions and 4 tokens; {run_model.checkpoint.name} has "
                          f"{config.n_positions} and {len(ids)}")  # fmt: skip
    generator = np.random.default_rng(seed)
    drawn = np.stack([generator.choice(ids, 2 * n, replace=False) for _ in range(TEXTS)])
    said, other = drawn[:, :n], drawn[:, n:]
    return Repeated(np.concatenate([said, said], axis=1), np.concatenate([other, said], axis=1), all_ids)


def _types_of_layer(attention: Attention, mask: Bool[Array, "batch pos"]) -> HeadTypes:
    """Returns the types of one layer's heads; the pattern is not kept."""
    assert attention.pattern is not None  # of the whole layer
    found: HeadTypes = head_types(attention.pattern.astype(jnp.float32))
    return found


def types_of(model: Model, ids: Int[np.ndarray, "text pos"]) -> HeadTypes:
    """Returns the types of all heads, `[text, layer, head]`, in one pass over the layers."""
    found = model.run(ids, reduce=_types_of_layer)
    return HeadTypes(*(np.asarray(each, np.float32).swapaxes(0, 1) for each in found))


class Types(NamedTuple):
    """What a run finds out about types.

    Attributes:
      given: the texts.
      said_twice, control: of every text, `[text, layer, head]`.
      low, high: bootstrap intervals over texts of said twice − control, by kind.
      q_value: by kind; empty without a null.
    """

    given: Repeated
    said_twice: HeadTypes
    control: HeadTypes
    low: Mapping[str, Float[np.ndarray, "layer head"]]
    high: Mapping[str, Float[np.ndarray, "layer head"]]
    q_value: Mapping[str, Float[np.ndarray, "layer head"]]

    def mean(self, kind: str) -> Float[np.ndarray, "layer head"]:
        """Returns the mean over texts that are said twice."""
        values: Float[np.ndarray, "layer head"] = getattr(self.said_twice, kind).mean(axis=0)
        return values

    def control_mean(self, kind: str) -> Float[np.ndarray, "layer head"]:
        """Returns the mean over the control's texts."""
        values: Float[np.ndarray, "layer head"] = getattr(self.control, kind).mean(axis=0)
        return values

    def marked(self, kind: str) -> Bool[np.ndarray, "layer head"]:
        """Returns which heads are above fresh checkpoints and, where they are compared with it, above the control."""
        above = self.low[kind] > 0 if kind in self.low else np.ones(self.mean(kind).shape, bool)
        if kind in self.q_value:
            return above & (self.q_value[kind] < LEVEL)
        return above & (kind in self.low)


def measure_types(model: Model, seed: int, null: int) -> Types:
    """Returns the types of a model's heads, in one pass over texts and control.

    Args:
      model: of any architecture.
      seed: of texts and resamples.
      null: fresh checkpoints to compare with; 0 for none.

    Raises:
      NotDrawable: for a model of too few positions or tokens.
    """
    given = repeated_texts(model, seed)
    both = types_of(model, np.concatenate([given.texts, given.control]))
    said_twice, control = (HeadTypes(*(each[part] for each in both)) for part in (slice(TEXTS), slice(TEXTS, None)))
    low, high = {}, {}
    for kind in REPEATING:
        difference = getattr(said_twice, kind) - getattr(control, kind)
        ends = bootstrap_interval(difference, jax.random.key(seed), n_unit=TEXTS)
        low[kind], high[kind] = map(np.asarray, ends)
    q_value = {}
    if null:
        dtype = model.weights.dtype

        def statistics(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
            found = types_of(Model(checkpoint, dtype=dtype, stream=True), given.texts)
            return {kind: getattr(found, kind).mean(axis=0) for kind in KINDS}

        about = {"statistics": "types", "version": VERSION, "ids": digest(given.texts.tolist()), "dtype": str(dtype)}
        values = null_values(model.config, null, statistics, **about)
        q_value = {kind: null_q(getattr(said_twice, kind).mean(axis=0), values[kind]) for kind in KINDS}
    return Types(given, said_twice, control, low, high, q_value)


@reduction
def types(run: HeadsRun) -> Types:
    """Returns the types of all heads."""
    return measure_types(run.model, run.options.seed, run.options.null)


# Kinds, as panels call them, and their colours beside the control.
TITLES = {
    "previous": "Previous token",
    "duplicate": "Duplicate token",
    "induction": "Induction",
    "first": "First position",
    "entropy": "Entropy",
}
COLORS = {"previous": style.Q, "duplicate": style.K, "induction": style.V}


def map_of_heads(values: Float[np.ndarray, "layer head"], marked: Bool[np.ndarray, "layer head"] | None = None,
                 **image: Any) -> Image:  # fmt: skip
    """Returns values of every head as colours, a column a layer, with a star at those that are marked."""
    texts = () if marked is None else star_texts(marked)
    about: dict[str, Any] = {"xlabel": "Transformer layer", "ylabel": "Head", "origin": "lower"}
    about |= {"integer_x": True, "integer_y": True}
    return Image(values=values.T, texts=texts, **about | image)


@STUDY.define(
    "types",
    "what every head attends to in random tokens that are said twice",
    "ids [batch, pos], previous, duplicate, induction, first, entropy, control_previous, control_duplicate, "
    "control_induction, low_duplicate, high_duplicate, low_induction, high_induction [layer, head]; unless "
    "--null 0: q_value_previous, q_value_duplicate, q_value_induction [layer, head]",
)
def figure_types(run: HeadsRun, types: Types) -> Display:
    arrays: dict[str, Any] = {"ids": types.given.texts}
    arrays |= {kind: types.mean(kind) for kind in HeadTypes._fields}
    arrays |= {f"control_{kind}": types.control_mean(kind) for kind in KINDS}
    for kind in REPEATING:
        arrays |= {f"low_{kind}": types.low[kind], f"high_{kind}": types.high[kind]}
    arrays |= {f"q_value_{kind}": values for kind, values in types.q_value.items()}
    largest = extremes(*(arrays[kind] for kind in (*KINDS, "first")))[1] or 1.0
    colours: dict[str, Any] = {"vmin": 0, "vmax": largest, "colorbar": "Attention"}
    panels = [map_of_heads(arrays[kind], types.marked(kind), title=TITLES[kind], **colours) for kind in KINDS]
    longest = float(np.log(types.given.texts.shape[1]))
    ends = np.array([0, extremes(*(arrays[kind] for kind in KINDS))[1]])
    against = Lines(
        lines=[
            *(
                Line(x=arrays[f"control_{kind}"].ravel(), y=arrays[kind].ravel(), label=TITLES[kind], marker="o",
                     linestyle="", color=COLORS[kind], size=4)
                for kind in KINDS
            ),
            Line(x=ends, y=ends, linestyle="--", color="0.5"),
        ],
        title="Against the control",
        xlabel="Attention in the control",
        ylabel="Attention",
    )  # fmt: skip
    others = [
        map_of_heads(arrays["first"], title=TITLES["first"], **colours),
        map_of_heads(arrays["entropy"], vmin=0, vmax=longest, title=TITLES["entropy"], colorbar="Nats"),
        against,
    ]
    return Display(
        arrays=arrays,
        panels=[panels, others],
        title=run.label,
        caption=_caption(run, types),
        size=(14, 8),
    )


def _caption(run: HeadsRun, found: Types) -> str:
    n = found.given.texts.shape[1] // 2
    which = "tokens, special ones too" if found.given.all_ids else "tokens, none of them special"
    null = run.options.null
    test = f"q < {LEVEL} against {null} fresh checkpoints of the same config" if null else ""
    control = "where the 95 % bootstrap interval over texts of the difference from the control is above 0"
    stars = f"Stars: {test}, and in the second and third map also {control}." if null else (
        f"Stars in the second and third map: {control}."
    )  # fmt: skip
    fewer = "" if n == TOKENS else f" ({TOKENS} tokens in other models; this one has no room or tokens for more.)"
    return (
        f"Mean attention of every head of {run.name} in {TEXTS} texts of {n} different random {which}, said twice: to "
        "the token before; from the second half to the same token in the first (duplicate token), and to the token "
        "after that one (induction); to the first position (these four on one colour scale); and the entropy of the "
        "attention in nats. In the control the first halves are other random tokens. "
        f"{stars} Without a BOS token position 0 is a sink: a head with nothing to look at "
        f"attends to it.{fewer}"
    )
