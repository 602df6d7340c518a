"""`jaxqkv view`: one interactive page with the attention of every head to one text.

Scores and patterns are embedded as in `embedding.py`, a head's visible pairs query by query. A weight's range is 0 to
1, a score's that of its head. Pairs that a causal mask hides are left out. For the third way of looking, ‖α v W_O‖, the
page has ‖v W_O‖ of every key, which it multiplies with the weights; for products by dimension it has q and k, where
there is room. Layers are run and written one after another.
"""

import unicodedata
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxqkv.architectures.activations import Attention
from jaxqkv.architectures.attention import visible_keys
from jaxqkv.architectures.base import Architecture
from jaxqkv.checkpoints.config import Config
from jaxqkv.errors import JaxqkvError, JaxqkvWarning
from jaxqkv.figures.panels import extremes
from jaxqkv.kernels import weighted_attention
from jaxqkv.model.model import Model
from jaxqkv.model.request import checked_layers
from jaxqkv.pages.embedding import (
    LEVELS,
    embedded_pairs,
    embedded_vectors,
    in_base64,
    pairs_bytes,
    rounded_up,
    vectors_bytes,
)
from jaxqkv.pages.html import fill, json_block, part, write_page
from jaxqkv.runtime import console
from jaxqkv.runtime.showing import counted, plural
from jaxqkv.text.batches import Batch
from jaxqkv.text.tokenizers import Tokenizer

# Of a page's values; browsers open it in a second or two.
LIMIT_BYTES = 64_000_000
# Pieces of one character that are looked for, where a tokenizer has cut it into bytes.
MOST_PIECES = 8
# The page's script, in this order, with `attention.js` at its end.
SCRIPTS = ("attention-values", "attention-grid", "attention-head", "attention-products", "attention-picture")

_SIGNS = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}
_JOINERS = "\u200c\u200d"
_FOOTER = """<footer>
<p>In a token <code>·</code> is a space, <code>↵</code> a line break, <code>⇥</code> a tab; characters that do not
show are named, as <code>U+200B</code>, and 1/4 after a character is the first of four tokens that it is cut into.</p>
<p>Weights and scores are embedded as 16-bit numbers: weights are within 0.000008 of those that the model computed
(float32), scores within 1/131,068 of their head's range, here at most {{error}}. A norm ‖α v W_O‖ is the weight times
‖v W_O‖ of the key, which is float32.{{vectors}}</p>
<p id="made">Made by jaxqkv {{version}}: <code>{{command}}</code></p>
</footer>
"""
_VECTORS = (
    " q and k are within 1/131,068 of the range of their dimension in that head; beside a sum of their products is how "
    "far from the score it can be."
)
_UNNAMED = (
    "No head of {} attends so much to one kind of token as to be named; order by a type to see those that come nearest."
)
_LOST = """<p class="note"><i class="broken"></i>{{lost}} NaN or infinite: what is no finite number, and the
weights and norms that depend on it, have this colour and read NaN.</p>
"""


class HeadKind(NamedTuple):
    """How much every head is of one kind.

    Attributes:
      name: in a word.
      about: what such a head does.
      value: by layer and head.
      control: the same without what such a head looks for; heads are then ordered by how much more the value is.
    """

    name: str
    about: str
    value: Float[np.ndarray, "layer head"]
    control: Float[np.ndarray, "layer head"] | None = None


class TypedHeads(NamedTuple):
    """Kinds of heads, in the order in which the page offers them.

    Attributes:
      about: what was measured, and when a head is named; a sentence or two.
      kinds: that heads are ordered by.
      names: of every head, `[layer][head]`, empty where it has none.
    """

    about: str
    kinds: Sequence[HeadKind]
    names: Sequence[Sequence[str]]


def write_view(
    path: Path,
    model: Model,
    text: str,
    layers: Collection[int] | None = None,
    command: str = "",
    types: Callable[[Model], TypedHeads] | None = None,
) -> str:
    """Writes the page, whole or not at all.

    Args:
      path: of the page.
      model: GPT-2 or BERT, with a tokenizer.
      text: what is attended to; BERT's special tokens are added.
      layers: to show; all of them unless given.
      command: that the page says it was made by.
      types: finds the types of all heads, by which the page names and orders them; called if the text fits.

    Returns:
      What was drawn, in a line.

    Raises:
      JaxqkvError: for a text that is empty or too long for the model or the page, and layers that do not exist.
    """
    chosen = checked_layers(None if layers is None else sorted(set(layers)), model.config.n_layer)
    batch = tokenized(model, text, len(chosen))
    name = model.checkpoint.name
    body = _body(model, text, batch, chosen, command, None if types is None else types(model))
    write_page(path, "attention", f"Attention of {shown_text(name)}", body, SCRIPTS)
    return f"{name}: {counted(batch.ids.shape[1], 'token')}, {_layers_of_heads(model.config, len(chosen))}"


def _layers_of_heads(config: Config, layers: int) -> str:
    """Returns how many layers and heads are meant."""
    return f"{counted(layers, 'layer')} of {counted(config.n_head, 'head')}"


def tokenized(model: Model, text: str, layers: int) -> Batch:
    """Returns the text as a batch of one, if model and page have room for it."""
    config = model.config
    try:
        text.encode()
    except UnicodeEncodeError:
        raise JaxqkvError("the text is not valid UTF-8") from None
    (ids,) = model.tokenizer.encode([text])
    if len(ids) > config.n_positions:
        raise JaxqkvError(
            f"the text has {counted(len(ids), 'token')}, more than the {counted(config.n_positions, 'position')} of "
            f"{model.checkpoint.name}; shorten it"
        )
    size = pairs_bytes(config, layers, len(ids))
    if size > LIMIT_BYTES:
        raise JaxqkvError(
            f"{counted(len(ids), 'token')} in {_layers_of_heads(config, layers)}: {size / 1e6:,.0f} MB of values, and "
            f"a page holds {LIMIT_BYTES / 1e6:.0f} MB; {_what_fits(config, layers, len(ids), pairs_bytes)}"
        )
    return model.tokenize([text])


def _bytes_with_vectors(config: Config, layers: int, tokens: int) -> int:
    """Returns what everything takes in base64."""
    return pairs_bytes(config, layers, tokens) + vectors_bytes(config, layers, tokens)


def _what_fits(config: Config, layers: int, tokens: int, size: Callable[[Config, int, int], int]) -> str:
    """Returns how many tokens, and how many layers of these tokens, a page has room for."""
    room = next(n for n in range(tokens, -1, -1) if size(config, layers, n) <= LIMIT_BYTES)
    fewer = LIMIT_BYTES // size(config, 1, tokens)
    choose = f", or choose {counted(fewer, 'layer')} or fewer with --layers" if fewer else ""
    return f"shorten the text to {counted(room, 'token')}{choose}"


def _left_out(config: Config, layers: int, tokens: int) -> str:
    """Returns why q and k are not in the page; nothing if they are. What is left out is warned of."""
    if _bytes_with_vectors(config, layers, tokens) <= LIMIT_BYTES:
        return ""
    needed, others = (size(config, layers, tokens) / 1e6 for size in (vectors_bytes, pairs_bytes))
    why = (
        f"the page has no products q_i·k_i by dimension: q and k, {needed:,.0f} MB, do not fit beside the other "
        f"{others:,.0f} MB in a page of {LIMIT_BYTES / 1e6:.0f} MB; "
        f"{_what_fits(config, layers, tokens, _bytes_with_vectors)}"
    )
    warnings.warn(why, JaxqkvWarning, stacklevel=2)
    return f"{why[0].upper()}{why[1:]}."


def _body(
    model: Model, text: str, batch: Batch, layers: Sequence[int], command: str, types: TypedHeads | None
) -> Iterator[str]:
    """Yields the page's pieces; a layer is let go once it is written."""
    from jaxqkv import __version__

    config, tokens = model.config, shown_tokens(model.tokenizer, batch.ids[0].tolist())
    left_out = _left_out(config, len(layers), len(tokens))
    yield _top(model, text, len(tokens), layers)
    page = {"name": shown_text(model.checkpoint.name), "tokens": tokens, "layers": list(layers), "heads": config.n_head}
    page |= {"headDim": config.head_dim, "causal": config.causal, "leftOut": left_out}
    page["types"] = None if types is None else _types_of(types, layers)
    yield json_block("page", page)
    seen = np.asarray(visible_keys(batch.mask, config.causal))[0]
    error, lost, lost_norms = 0.0, 0, 0
    capture = {"scores", "pattern", "v"} | (set() if left_out else {"q", "k"})
    run = model.layerwise(batch, capture=capture, layers=list(layers))
    for layer, attention in console.bar(run, total=len(layers), desc="layers", unit="layer"):
        scores, pattern = (np.asarray(x[0], np.float32) for x in (attention.scores, attention.pattern))
        norms = value_norms(model, layer, attention)
        lost += int((~np.isfinite(scores[:, seen])).sum())
        lost_norms += int((~np.isfinite(norms)).sum())
        heads = [embedded_pairs(head, *extremes(head)) for head in scores[:, seen]]
        error = max(error, *((head["high"] - head["low"]) / (2 * LEVELS) for head in heads))
        weights = [embedded_pairs(head, 0.0, 1.0) for head in pattern[:, seen]]
        of_keys = [in_base64(head, "<f4") for head in norms]
        yield json_block(f"layer-{layer}", {"scores": heads, "pattern": weights, "norms": of_keys})
        if not left_out:
            yield json_block(f"vectors-{layer}", _vectors(config, layer, attention))
    if lost or lost_norms:
        named = [counted(lost, "score")] if lost else []
        named += [f"{counted(lost_norms, 'norm')} ‖v W_O‖"] if lost_norms else []
        verb = "is" if lost + lost_norms == 1 else "are"
        yield fill(_LOST, lost=f"{' and '.join(named)} {verb}")
    about = {"vectors": "" if left_out else _VECTORS, "version": __version__, "command": shown_text(command)}
    yield fill(_FOOTER, error=rounded_up(error), **about)


def _top(model: Model, text: str, tokens: int, layers: Sequence[int]) -> str:
    """Returns what is above the values."""
    config = model.config
    which = f"{', '.join(map(str, layers))} (of {config.n_layer})"
    if len(layers) == config.n_layer > 1:
        which = f"0 to {config.n_layer - 1} (all {config.n_layer})"
    sees = "each attends to itself and those before it" if config.causal else "each attends to all of them"
    return fill(
        part("attention.html"),
        name=shown_text(model.checkpoint.name),
        checkpoint=shown_text(_identity(model)),
        layers_term=plural(len(layers), "layer"),
        layers=which,
        heads_term=plural(config.n_head, "head"),
        heads=config.n_head,
        text=shown_text(text),
        tokens_term=plural(tokens, "token"),
        tokens=f"{tokens}; {sees}",
    )


def value_norms(model: Model, layer: int, attention: Attention) -> Float[np.ndarray, "head key"]:
    """Returns ‖v W_O‖ of every key: what a query of weight 1 takes from it."""
    assert attention.v is not None  # which is captured
    n_head, pos, _ = attention.v[0].shape
    ones = np.ones((n_head, 1, pos), np.float32)
    return np.asarray(weighted_attention(ones, attention.v[0], model.weights.W_O(layer, by_head=True)))[:, 0]


def _vectors(config: Architecture, layer: int, attention: Attention) -> dict[str, Any]:
    """Returns one layer's q and k, and what QKᵀ is multiplied by."""
    scale = float(config.attention_scale(np.int32(layer), np.float32))
    assert attention.q is not None  # which is captured, as k is
    assert attention.k is not None
    q, k = ([embedded_vectors(head) for head in np.asarray(x[0], np.float32)] for x in (attention.q, attention.k))
    return {"scale": scale, "q": q, "k": k}


def _types_of(types: TypedHeads, layers: Sequence[int]) -> dict[str, Any]:
    """Returns the types of these layers' heads; null is no number."""

    def rows(values: Float[np.ndarray, "layer head"] | None) -> list[list[float | None]] | None:
        if values is None:
            return None
        return [[float(each) if np.isfinite(each) else None for each in values[layer]] for layer in layers]

    kinds = [
        {"name": kind.name, "about": kind.about, "values": rows(kind.value), "control": rows(kind.control)}
        for kind in types.kinds
    ]
    names = [list(types.names[layer]) for layer in layers]
    unnamed = "" if any(map(any, names)) else _UNNAMED.format(_which(layers, len(types.names)))
    return {"about": types.about, "unnamed": unnamed, "kinds": kinds, "names": names}


def _which(layers: Sequence[int], n_layer: int) -> str:
    """Returns what these layers are called in a sentence."""
    if len(layers) == n_layer:
        return "this model"
    return "this layer" if len(layers) == 1 else "these layers"


def _identity(model: Model) -> str:
    """Returns the checkpoint's name, and which one of that name it is."""
    identity = model.checkpoint.identity()
    details = [identity["source"], *(f"{key} {identity[key]}" for key in ("revision", "seed") if key in identity)]
    return f"{model.checkpoint.name} ({', '.join(details)})"


def shown_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Returns each token's text with nothing invisible in it; tokens that are pieces of a character say which."""
    pieces = tokenizer.tokens(ids)
    shown: list[str] = []
    while len(shown) < len(ids):
        start = len(shown)
        count, whole = 1, pieces[start]
        if "\ufffd" in whole:
            count, whole = _whole_character(tokenizer, ids[start : start + MOST_PIECES], whole)
        numbers = [""] if count == 1 else [f" {number + 1}/{count}" for number in range(count)]
        shown += [visible(whole) + number for number in numbers]
    return shown


def _whole_character(tokenizer: Tokenizer, ids: Sequence[int], alone: str) -> tuple[int, str]:
    """Returns how many tokens make whole characters, and these; else the first token alone."""
    for count in range(2, len(ids) + 1):
        whole = tokenizer.backend.decode(list(ids[:count]), skip_special_tokens=False)
        if "\ufffd" not in whole:
            return count, whole
    return 1, alone


def visible(text: str) -> str:
    """Returns a token's text in which white space, control and format characters and lone accents are seen."""
    joined = len(text) > 1  # a joiner inside an emoji or a word is part of how that looks
    named = "".join(char if joined and char in _JOINERS else _SIGNS.get(char) or _named(char) for char in text)
    return f"◌{named}" if named and unicodedata.category(named[0]).startswith("M") else named


def shown_text(text: str) -> str:
    """Returns a text of several words and lines in which control and format characters are named."""
    return "".join(char if char.isprintable() or char in "\n\t" else _named(char) for char in text)


def _named(char: str) -> str:
    """Returns the character, or its number where it shows nothing or changes how others are shown."""
    hidden = unicodedata.category(char) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs") and char != " "
    return f"U+{ord(char):04X}" if hidden and char not in _SIGNS else char
