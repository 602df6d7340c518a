"""`jaxqkv view`: one interactive page with the attention of every head to one text.

Scores and patterns are embedded as 16-bit levels: `low + level / 65534 · (high - low)`, little-endian, in
base64, a head's visible pairs query by query; level 65535 is what is no finite number. A weight's range is 0 to 1,
a score's that of its head. Pairs that a causal mask hides are left out. Layers are run and written one after another.
"""

import base64
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt16

from jaxqkv.architectures.attention import visible_keys
from jaxqkv.checkpoints.config import Config
from jaxqkv.errors import JaxqkvError
from jaxqkv.figures.panels import extremes
from jaxqkv.model.model import Model
from jaxqkv.pages.html import fill, json_block, part, write_page
from jaxqkv.runtime import console
from jaxqkv.text.batches import Batch
from jaxqkv.text.tokenizers import Tokenizer

LEVELS, BROKEN = 65534, 65535
# Of a page's values; browsers open it in a second or two.
LIMIT_BYTES = 64_000_000
# Pieces of one character that are looked for, where a tokenizer has cut it into bytes.
MOST_PIECES = 8

_SIGNS = {" ": "·", "\n": "↵", "\r": "␍", "\t": "⇥"}
_JOINERS = "\u200c\u200d"
_FOOTER = """<footer>
<p>In a token <code>·</code> is a space, <code>↵</code> a line break, <code>⇥</code> a tab; characters that do not
show are named, as <code>U+200B</code>, and 1/4 after a character is the first of four tokens that it is cut into.</p>
<p>Weights and scores are embedded as 16-bit numbers: weights are within 0.000008 of those that the model computed
(float32), scores within 1/131,068 of their head's range, here at most {{error}}.</p>
<p>Made by jaxqkv {{version}}: <code>{{command}}</code></p>
</footer>
"""


_LOST = """<p class="hatched"><i class="broken"></i>{{lost}} scores are NaN or infinite: they, and the weights that
depend on them, have this colour and read NaN.</p>
"""


def write_view(path: Path, model: Model, text: str, layers: Collection[int] | None = None, command: str = "") -> str:
    """Writes the page, whole or not at all.

    Args:
      path: of the page.
      model: GPT-2 or BERT, with a tokenizer.
      text: what is attended to; BERT's special tokens are added.
      layers: to show; all of them unless given.
      command: that the page says it was made by.

    Returns:
      What was drawn, in a line.

    Raises:
      JaxqkvError: for a text that is empty or too long for the model or the page, and layers that do not exist.
    """
    chosen = range(model.config.n_layer) if layers is None else sorted(set(layers))
    batch = tokenized(model, text, len(chosen))
    name, tokens = model.checkpoint.name, batch.ids.shape[1]
    body = _body(model, text, batch, chosen, command)
    write_page(path, "attention", f"Attention of {name}", body)
    layers_text = f"{len(chosen)} layer{'s' * (len(chosen) != 1)}"
    return f"{name}: {tokens} token{'s' * (tokens != 1)}, {layers_text} of {model.config.n_head} heads"


def tokenized(model: Model, text: str, layers: int) -> Batch:
    """The text as a batch of one, if model and page have room for it."""
    config = model.config
    try:
        text.encode()
    except UnicodeEncodeError:
        raise JaxqkvError("the text is not valid UTF-8") from None
    (ids,) = model.tokenizer.encode([text])
    if len(ids) > config.n_positions:
        raise JaxqkvError(
            f"the text has {len(ids):,} tokens, more than the {config.n_positions:,} positions of "
            f"{model.checkpoint.name}; shorten it"
        )
    size = page_bytes(config, layers, len(ids))
    if size > LIMIT_BYTES:
        tokens = next(n for n in range(len(ids), -1, -1) if page_bytes(config, layers, n) <= LIMIT_BYTES)
        fewer = LIMIT_BYTES // page_bytes(config, 1, len(ids))
        choose = f", or choose {fewer} layer{'s' * (fewer != 1)} or fewer with --layers" if fewer else ""
        raise JaxqkvError(
            f"{len(ids):,} tokens in {layers} layers of {config.n_head} heads are {size / 1e6:,.0f} MB of values, and "
            f"a page holds {LIMIT_BYTES / 1e6:.0f} MB; shorten the text to {tokens:,} tokens{choose}"
        )
    return model.tokenize([text])


def page_bytes(config: Config, layers: int, tokens: int) -> int:
    """What scores and pattern of that many layers take in base64."""
    pairs = tokens * (tokens + 1) // 2 if config.causal else tokens**2
    return layers * config.n_head * 2 * base64_length(2 * pairs)


def base64_length(size: int) -> int:
    """Characters of so many bytes."""
    return -(-size // 3) * 4


def _body(model: Model, text: str, batch: Batch, layers: Sequence[int], command: str) -> Iterator[str]:
    """The page's pieces; a layer is one, and let go once it is written."""
    from jaxqkv import __version__

    config, tokens = model.config, shown_tokens(model.tokenizer, batch.ids[0].tolist())
    which = f"{', '.join(map(str, layers))} (of {config.n_layer})"
    if len(layers) == config.n_layer > 1:
        which = f"0 to {config.n_layer - 1} (all {config.n_layer})"
    sees = "each attends to itself and those before it" if config.causal else "each attends to all of them"
    yield fill(
        part("attention.html"),
        name=model.checkpoint.name,
        checkpoint=_identity(model),
        layers=which,
        heads=config.n_head,
        text="".join(char if char.isprintable() or char in "\n\t" else _named(char) for char in text),
        tokens=f"{len(tokens)}; {sees}",
    )
    page = {"tokens": tokens, "layers": list(layers), "heads": config.n_head, "causal": config.causal}
    yield json_block("page", page)
    seen = np.asarray(visible_keys(batch.mask, config.causal))[0]
    error, lost = 0.0, 0
    run = model.layerwise(batch, capture={"scores", "pattern"}, layers=list(layers))
    for layer, attention in console.bar(run, total=len(layers), desc="layers", unit="layer"):
        scores, pattern = (np.asarray(x[0], np.float32) for x in (attention.scores, attention.pattern))
        lost += int((~np.isfinite(scores[:, seen])).sum())
        heads = [_embedded(head, *extremes(head)) for head in scores[:, seen]]
        error = max(error, *((head["high"] - head["low"]) / (2 * LEVELS) for head in heads))
        weights = [_embedded(head, 0.0, 1.0) for head in pattern[:, seen]]
        yield json_block(f"layer-{layer}", {"scores": heads, "pattern": weights})
    if lost:
        yield fill(_LOST, lost=f"{lost:,}")
    yield fill(_FOOTER, error=f"{error:.1g}", version=__version__, command=command)


def _identity(model: Model) -> str:
    """The checkpoint, and which one of that name."""
    identity = model.checkpoint.identity()
    details = [identity["source"], *(f"{key} {identity[key]}" for key in ("revision", "seed") if key in identity)]
    return f"{model.checkpoint.name} ({', '.join(details)})"


def _embedded(values: Float[np.ndarray, " pair"], low: float, high: float) -> dict[str, Any]:
    """One head's visible values, as the page's script reads them."""
    levels = quantise(values, low, high)
    return {"low": low, "high": high, "values": base64.b64encode(levels.astype("<u2").tobytes()).decode()}


def quantise(values: Float[np.ndarray, " pair"], low: float, high: float) -> UInt16[np.ndarray, " pair"]:
    """The nearest of 65,535 levels from `low` to `high`, off by 1/131,068 of the range at most; else `BROKEN`."""
    finite = np.isfinite(values)
    fraction = np.where(finite, values.astype(np.float64) - low, 0) / (high - low or 1)
    return np.where(finite, np.rint(np.clip(fraction, 0, 1) * LEVELS), BROKEN).astype(np.uint16)


def shown_tokens(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token's text with nothing invisible in it; tokens that are pieces of a character say which."""
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
    """How many tokens it takes until bytes are characters, and which; else the first alone."""
    for count in range(2, len(ids) + 1):
        whole = tokenizer.backend.decode(list(ids[:count]), skip_special_tokens=False)
        if "\ufffd" not in whole:
            return count, whole
    return 1, alone


def visible(text: str) -> str:
    """A token's text in which white space, control and format characters and lone accents are seen."""
    joined = len(text) > 1  # a joiner inside an emoji or a word is part of how that looks
    named = "".join(char if joined and char in _JOINERS else _SIGNS.get(char) or _named(char) for char in text)
    return f"◌{named}" if named and unicodedata.category(named[0]).startswith("M") else named


def _named(char: str) -> str:
    """The character, or its number where it shows nothing or changes how others are shown."""
    hidden = unicodedata.category(char) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs") and char != " "
    return f"U+{ord(char):04X}" if hidden and char not in _SIGNS else char
