"""`Tokenizer`: text to token ids and back, run by the `tokenizers` library."""

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from jaxqkv.errors import CheckpointError, JaxqkvError, JaxqkvWarning, first_line
from jaxqkv.runtime.files import refuse_pointer
from jaxqkv.text.batches import Batch, Sizes

if TYPE_CHECKING:
    import tokenizers


# Files that hold a vocabulary, and those beside them.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "sentencepiece.bpe.model")
TOKENIZER_FILES = (*VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Most characters of a text; a thousand tokens have a few thousand characters.
MOST_CHARACTERS = 5_000_000


# A text, or a pair of texts.
Text = str | tuple[str, str]


@runtime_checkable
class ModelSizes(Sizes, Protocol):
    """The sizes of a model that a tokenizer has to fit, and the class of its tokenizer if no file names one."""

    @property
    def tokenizer_class(self) -> str:
        """Name of a class of transformers."""


class Tokenizer:
    """A checkpoint's tokenizer, run by the `tokenizers` library."""

    def __init__(self, backend: "tokenizers.Tokenizer", where: str, vocab_size: int, truncation_side: str = "right"):
        """Takes a tokenizer of the library.

        Args:
          backend: tokenizer of the library; its padding and truncation are switched off.
          where: folder or checkpoint that it belongs to, for messages.
          vocab_size: size of the model's vocabulary; a text with larger ids is refused.
          truncation_side: end at which a text is cut, "right" or "left".
        """
        self.backend, self.where, self.vocab_size, self.truncation_side = backend, where, vocab_size, truncation_side
        self.backend.no_padding()
        self.backend.no_truncation()

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], config: ModelSizes) -> "Tokenizer":
        """Reads tokenizer.json, or else the vocabulary's own files; see `jaxqkv.text.tokenizer_files`.

        Raises:
          CheckpointError: when the files are missing, broken or not supported.

        Warns:
          JaxqkvWarning: when files contradict each other, and when the vocabulary is larger than the model's.
        """
        from jaxqkv.text.tokenizer_files import build_tokenizer  # its library takes time to import

        folder = Path(folder).expanduser()
        for name in TOKENIZER_FILES:
            refuse_pointer(folder / name)
        try:
            backend, truncation_side = build_tokenizer(folder, config.model_type, config.tokenizer_class)
        except (CheckpointError, Warning):
            raise
        except BaseException as error:
            raise _as_error(error, f"{folder}: tokenizer files cannot be read") from None
        _warn_of_size(backend, str(folder), config)
        return cls(backend, str(folder), config.vocab_size, truncation_side)

    @classmethod
    def of(cls, given: Any, config: ModelSizes) -> "Tokenizer":
        """Takes a folder, or copies an object of `tokenizers` or a fast tokenizer of `transformers`.

        The token ids are those of the object, but padding and truncation are left to `batch`. Later changes of the
        object have no effect.

        Raises:
          JaxqkvError: for other objects, for a tokenizer of `transformers` written in Python, and as `from_folder`.

        Warns:
          JaxqkvWarning: when it would cut texts that fit in the model, and when it has more tokens than the model.
        """
        if isinstance(given, Tokenizer):
            return cls(given.backend, given.where, config.vocab_size, given.truncation_side)
        if isinstance(given, str | os.PathLike):
            return cls.from_folder(given, config)
        from jaxqkv.text.tokenizer_objects import copied  # its library takes time to import

        backend, name, truncation_side = copied(given, config.n_positions)
        _warn_of_size(backend, name, config)
        return cls(backend, name, config.vocab_size, truncation_side)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all settings that decide the ids of a text."""
        decisive = [self.backend.to_str(), self.backend.encode_special_tokens]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()

    def encode(self, texts: Sequence[str], special_tokens: bool = True) -> list[list[int]]:
        """Returns token ids of each text, unpadded.

        Args:
          texts: any number.
          special_tokens: whether to add the tokens that the tokenizer puts before and after a text, such as BERT's
            [CLS] and [SEP] and RoBERTa's <s> and </s>; GPT-2's tokenizers mostly have none.

        Raises:
          JaxqkvError: for a text that is not valid Unicode, if the tokenizer fails, and for an id that the model does
            not have.
        """
        return [encoding.ids for encoding in self._encodings(texts, special_tokens)]

    def _encodings(self, texts: Sequence[Text], special_tokens: bool) -> list["tokenizers.Encoding"]:
        for number, text in enumerate(texts):
            for part in _parts(text):
                _check_unicode(part, number)
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=special_tokens)
        except BaseException as error:
            raise _as_error(error, f"{self.where}: the tokenizer fails") from None
        for encoding in encodings:
            if (largest := max(encoding.ids, default=0)) >= self.vocab_size:
                raise CheckpointError(
                    f"{self.where}: the tokenizer makes token {largest}, the model has {self.vocab_size}; "
                    "they do not belong together"
                )
        return list(encodings)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Returns each id's text, spaces included."""
        return [self.backend.decode([int(i)], skip_special_tokens=False) for i in ids]

    @property
    def ordinary_ids(self) -> Int[np.ndarray, " id"]:
        """The ids of all tokens that the model has, without special tokens, ascending."""
        special = {id for id, token in self.backend.get_added_tokens_decoder().items() if token.special}
        ids = set(self.backend.get_vocab().values()) - special
        return np.array(sorted(id for id in ids if id < self.vocab_size), np.int32)

    def single_token(self, text: str) -> int:
        """Returns the id of a text that is one token.

        Raises:
          JaxqkvError: for other texts, naming their tokens.
        """
        (ids,) = self.encode([text], special_tokens=False)
        if len(ids) != 1:
            pieces = ", ".join(repr(piece) for piece in self.tokens(ids)) or "nothing"
            raise JaxqkvError(f"{text!r} is not one token of {self.where} but {len(ids)}: {pieces}")
        return ids[0]

    def batch(
        self,
        texts: str | Sequence[Text],
        config: ModelSizes,
        *,
        padding_side: str = "right",
        pad_to_multiple_of: int = 1,
        truncate: bool = False,
        special_tokens: bool = True,
    ) -> Batch:
        """Returns texts as a padded batch.

        Args:
          texts: one text or several; each must give at least one token. A pair `(one, other)` is joined by the
            tokenizer's template, with token types where the model has them.
          config: config of the model that the batch is for.
          padding_side: "right" or "left"; it changes no result.
          pad_to_multiple_of: number to round the length of the batch up to a multiple of, at most to the model's
            positions, so that texts of many lengths need few compiled programs.
          truncate: whether to cut a text with more tokens than the model has positions, instead of refusing it: at its
            end, or at its beginning if the tokenizer's files say so (truncation_side).
          special_tokens: whether to add the tokens that the tokenizer puts before and after a text, such as BERT's
            [CLS] and [SEP] and RoBERTa's <s> and </s>.

        Raises:
          JaxqkvError: for an empty list or text, a text that is too long, and a pair that would have to be cut.

        Warns:
          JaxqkvWarning: when a text contains a token of the template itself, such as BERT's [SEP].
        """
        try:
            texts = [texts] if isinstance(texts, str) else list(texts)
        except TypeError:
            raise JaxqkvError(f"expected a text or a list of texts, not {type(texts).__name__}") from None
        if not all(_parts(text) for text in texts):
            raise JaxqkvError(
                "expected a text or a list of texts; token ids go to the model as they are, and a pair is a tuple"
            )
        if not texts:
            raise JaxqkvError("no text to tokenize: the list is empty")
        for number, text in enumerate(texts):
            if (length := sum(map(len, _parts(text)))) > MOST_CHARACTERS:
                raise JaxqkvError(
                    f"text {number} has {length:,} characters, far more than the model's {config.n_positions} "
                    "positions hold; shorten it"
                )
        if padding_side not in ("left", "right"):
            raise JaxqkvError(f"padding_side is 'left' or 'right', not {padding_side!r}")
        multiple: Any = pad_to_multiple_of
        if not isinstance(multiple, int) or multiple < 1:
            raise JaxqkvError(f"pad_to_multiple_of is a whole number from 1 up, not {pad_to_multiple_of!r}")
        numbers = [number for number, text in enumerate(texts) for _ in _parts(text)]
        bare = self.encode([part for text in texts for part in _parts(text)], special_tokens=False)
        for number, ids in zip(numbers, bare, strict=True):
            if not ids:
                raise JaxqkvError(f"text {number} is empty: it gives no token")
        encodings = self._encodings(texts, special_tokens)
        for number, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            if len(encoding) > config.n_positions and not (truncate and isinstance(text, str)):
                how = "(in the library truncate=True does)" if isinstance(text, str) else "yourself: a pair is not cut"
                raise JaxqkvError(
                    f"text {number} has {len(encoding)} tokens, more than the model's {config.n_positions} positions; "
                    f"shorten it {how}"
                )
        self._warn_of_templates_tokens(encodings)
        rows = [self._cut(encoding, config.n_positions) for encoding in encodings]
        width = -(-max(map(len, rows)) // pad_to_multiple_of) * pad_to_multiple_of
        width = min(width, max(config.n_positions, *map(len, rows)))
        padded, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
        types = np.zeros_like(padded)
        for row, tokens in enumerate(rows):
            where = slice(0, len(tokens)) if padding_side == "right" else slice(width - len(tokens), width)
            padded[row, where], mask[row, where] = tokens, True
            if config.token_types > 1 and not isinstance(texts[row], str):
                types[row, where] = encodings[row].type_ids
        return Batch(ids=padded, mask=mask, token_types=types)

    def _warn_of_templates_tokens(self, encodings: Sequence["tokenizers.Encoding"]) -> None:
        for number, encoding in enumerate(encodings):
            added = np.array(encoding.special_tokens_mask, bool)  # by the template; not what the text itself contains
            ids = np.array(encoding.ids)
            own = sorted(set(ids[added].tolist()) & set(ids[~added].tolist()))
            if own:
                names = ", ".join(self.tokens(own))
                message = (
                    f"text {number} contains {names}, which the tokenizer also puts around a text; for two sentences "
                    "give a pair (one, other)"
                )
                warnings.warn(JaxqkvWarning(message), stacklevel=4)

    def _cut(self, encoding: "tokenizers.Encoding", length: int) -> list[int]:
        """Returns at most `length` ids: the text is cut, and the template's tokens around it stay."""
        ids: list[int] = encoding.ids
        if len(ids) <= length:
            return ids
        added = np.array(encoding.special_tokens_mask, bool)  # by the template; not what the text itself contains
        before, after = int(np.argmin(added)), int(np.argmin(added[::-1]))
        text = ids[before : len(ids) - after]
        room = length - before - after
        if room < 1:
            raise JaxqkvError(
                f"{self.where}: the tokenizer adds {before + after} special tokens to a text, and the model has "
                f"{length} positions; special_tokens=False leaves them out"
            )
        text = text[:room] if self.truncation_side == "right" else text[-room:]
        return [*ids[:before], *text, *ids[len(ids) - after :]]


def _warn_of_size(backend: "tokenizers.Tokenizer", where: str, config: ModelSizes) -> None:
    tokens = backend.get_vocab_size(with_added_tokens=False)
    if tokens > config.vocab_size:
        warnings.warn(
            JaxqkvWarning(
                f"{where}: the tokenizer has {tokens} tokens, the model only {config.vocab_size}; if they do not "
                "belong together, all ids are wrong"
            ),
            stacklevel=3,
        )


def _as_error(error: BaseException, what: str) -> BaseException:
    """Returns the error to raise: `tokenizers` raises bare Exception, and panics that are not even that."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        return error
    return CheckpointError(f"{what} ({first_line(error)})")


def _parts(text: Any) -> tuple[str, ...]:
    """Returns a text, or both of a pair, as a tuple; an empty one for anything else."""
    if isinstance(text, str):
        return (text,)
    pair = isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text)
    return text if pair else ()


def _check_unicode(text: str, number: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise JaxqkvError(f"text {number} is not valid Unicode: character {error.start} is half of one") from None


def find_token(ids: Sequence[int], token: int) -> int | None:
    """Returns the index of the first `token` in `ids`, or None."""
    return ids.index(token) if token in ids else None
