"""Text to token ids: the checkpoint's tokenizer, padding, and the mask that keeps pads out."""

import functools
import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from jaxqkv.checkpoints.checkpoint import TOKENIZER_FILES, Checkpoint
from jaxqkv.checkpoints.config import Config
from jaxqkv.errors import CheckpointError, JaxqkvError, JaxqkvWarning, NoTokenizer, first_line
from jaxqkv.runtime import showing
from jaxqkv.runtime.files import refuse_pointer
from jaxqkv.typing import AnyArray

if TYPE_CHECKING:
    import tokenizers


# Of a text of one batch: a thousand tokens have a few thousand.
MOST_CHARACTERS = 5_000_000


@struct.dataclass
class Batch(showing.Arrays):
    """Token ids of several texts.

    Attributes:
      ids: int32; 0 at pads, where any id would do.
      mask: True at real tokens; pads may stand on either side.
      token_types: BERT's segments; 0 unless there are two.
    """

    __repr__ = showing.Arrays.__repr__  # which `dataclass` then does not replace

    ids: Int[AnyArray, "batch pos"]
    mask: Bool[AnyArray, "batch pos"]
    token_types: Int[AnyArray, "batch pos"]

    @property
    def positions(self) -> Int[Array, "batch pos"]:
        """Index of each token among its sequence's real tokens, so that padding shifts nothing."""
        return jnp.maximum(jnp.cumsum(self.mask, axis=-1, dtype=self.ids.dtype) - 1, 0)


# What the model's functions take: a batch, or integer ids [batch, pos] without padding.
BatchLike = Batch | jax.typing.ArrayLike | Sequence[Sequence[int]]


def as_batch(batch: BatchLike, config: Config) -> Batch:
    """A `Batch` as it is, or unpadded ids `[batch, pos]` as one; checked against the config's sizes.

    Raises:
      JaxqkvError: on ids that are not whole numbers `[batch, pos]` or not in the vocabulary, on a mask or token
        types that do not go with them, and on more tokens than the model has positions.
    """
    if not isinstance(batch, Batch):
        try:
            ids = batch if isinstance(batch, jax.Array) else np.asarray(batch)
        except ValueError:
            raise JaxqkvError("expected ids [batch, pos] with rows of one length; `tokenize` pads texts") from None
        _check_ids(ids, config)
        ids = ids.astype(np.int32)
        batch = Batch(ids=ids, mask=np.ones(ids.shape, bool), token_types=np.zeros(ids.shape, np.int32))
    else:
        _check_ids(batch.ids, config)
        for name, part in (("mask", batch.mask), ("token_types", batch.token_types)):
            if part.shape != batch.ids.shape:
                raise JaxqkvError(f"{name} {list(part.shape)} does not go with ids {list(batch.ids.shape)}")
        if batch.mask.dtype != bool:
            raise JaxqkvError(f"mask is boolean, True at real tokens, not {batch.mask.dtype}")
        _check_token_types(batch.token_types, config)
    if batch.ids.shape[-1] > config.n_positions:
        raise JaxqkvError(f"{batch.ids.shape[-1]} tokens are more than the model's {config.n_positions} positions")
    return batch


def _check_ids(ids: AnyArray, config: Config) -> None:
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or 0 in ids.shape:
        hint = "; `tokenize` makes them of texts" if ids.dtype.kind in "UO" else ""
        raise JaxqkvError(f"expected integer ids [batch, pos], got {ids.dtype} {list(ids.shape)}{hint}")
    if not isinstance(ids, jax.core.Tracer) and (ids.min() < 0 or ids.max() >= config.vocab_size):
        raise JaxqkvError(
            f"token ids reach from {ids.min()} to {ids.max()}; the model's are 0 to {config.vocab_size - 1}"
        )


def _check_token_types(token_types: AnyArray, config: Config) -> None:
    if not np.issubdtype(token_types.dtype, np.integer):
        raise JaxqkvError(f"expected integer token_types [batch, pos], got {token_types.dtype}")
    if isinstance(token_types, jax.core.Tracer):
        return
    smallest, largest = token_types.min(), token_types.max()
    if smallest < 0 or largest >= config.token_types:
        theirs = f"0 to {config.token_types - 1}" if config.token_types > 1 else f"0 alone ({config.model_type})"
        raise JaxqkvError(f"token_types reach from {smallest} to {largest}; the model's are {theirs}")


class Tokenizer:
    """A checkpoint's tokenizer, run by the `tokenizers` library."""

    def __init__(self, backend: "tokenizers.Tokenizer", where: str, vocab_size: int, truncation_side: str = "right"):
        """Takes a tokenizer of the library.

        Args:
          backend: which is changed: it neither pads nor truncates.
          where: its folder or checkpoint, for messages.
          vocab_size: of the model; a text that gives larger ids is refused.
          truncation_side: the end at which a text is cut, "right" or "left".
        """
        self.backend, self.where, self.vocab_size, self.truncation_side = backend, where, vocab_size, truncation_side
        self.backend.no_padding()
        self.backend.no_truncation()

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Tokenizer":
        """The tokenizer that lies beside the checkpoint's weights.

        Raises:
          CheckpointError: when there is none, or it cannot be read.
        """
        folder = checkpoint.tokenizer_source()
        if folder is None:
            raise NoTokenizer(
                f"{checkpoint.spec}: has no tokenizer.json, vocab.json with merges.txt, or vocab.txt; give a folder "
                "that has (--tokenizer FOLDER, in the library tokenizer=)"
            )
        tokenizer = cls.from_folder(folder, checkpoint.config)
        tokenizer.where = checkpoint.spec
        return tokenizer

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str], config: Config) -> "Tokenizer":
        """From tokenizer.json, else from the vocabulary's own files; see `jaxqkv.text.tokenizer_files`.

        Raises:
          CheckpointError: when the files are missing, broken or not supported.

        Warns:
          JaxqkvWarning: when they contradict each other, and when the vocabulary is larger than the model's.
        """
        from jaxqkv.text.tokenizer_files import build_tokenizer  # its library takes time to import

        folder = Path(folder).expanduser()
        for name in TOKENIZER_FILES:
            refuse_pointer(folder / name)
        try:
            backend, truncation_side = build_tokenizer(folder, config.model_type)
        except (CheckpointError, Warning):
            raise
        except BaseException as error:
            raise _as_error(error, f"{folder}: tokenizer files cannot be read") from None
        tokens = backend.get_vocab_size(with_added_tokens=False)
        if tokens > config.vocab_size:
            warnings.warn(
                JaxqkvWarning(
                    f"{folder}: the tokenizer has {tokens} tokens, the model only {config.vocab_size}; if they do not "
                    "belong together, all ids are wrong"
                ),
                stacklevel=2,
            )
        return cls(backend, str(folder), config.vocab_size, truncation_side)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides which ids a text gets."""
        decisive = [self.backend.to_str(), self.backend.encode_special_tokens]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()

    def encode(self, texts: Sequence[str], special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text, unpadded. BERT's `special_tokens` are [CLS] and [SEP]; GPT-2 mostly adds none.

        Raises:
          JaxqkvError: for a text that is not valid Unicode, where the tokenizer fails, and for an id that the
            model does not have.
        """
        return [encoding.ids for encoding in self._encodings(texts, special_tokens)]

    def _encodings(self, texts: Sequence[str], special_tokens: bool) -> list["tokenizers.Encoding"]:
        for number, text in enumerate(texts):
            _check_unicode(text, number)
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
        """Each id's text, spaces and all, fit to be printed."""
        return [self.backend.decode([int(i)], skip_special_tokens=False) for i in ids]

    def single_token(self, text: str) -> int:
        """The id of a text that is one token.

        Raises:
          JaxqkvError: for one that is not, with its pieces.
        """
        (ids,) = self.encode([text], special_tokens=False)
        if len(ids) != 1:
            pieces = ", ".join(repr(piece) for piece in self.tokens(ids)) or "nothing"
            raise JaxqkvError(f"{text!r} is not one token of {self.where} but {len(ids)}: {pieces}")
        return ids[0]

    def batch(
        self,
        texts: str | Sequence[str],
        config: Config,
        *,
        padding_side: str = "right",
        truncate: bool = False,
        special_tokens: bool = True,
    ) -> Batch:
        """Texts as a padded batch.

        Args:
          texts: one text or several; each must give at least one token.
          config: of the model that the batch is for.
          padding_side: "right" or "left"; it changes no result.
          truncate: cut a text that has more tokens than the model positions, instead of refusing it: at its end,
            or at its beginning where the tokenizer's files say so (truncation_side).
          special_tokens: those that the tokenizer puts before and after a text, such as BERT's [CLS] and [SEP].

        Raises:
          JaxqkvError: for an empty list or text (by number), and one that is too long (both lengths).
        """
        try:
            texts = [texts] if isinstance(texts, str) else list(texts)
        except TypeError:
            raise JaxqkvError(f"expected a text or a list of texts, not {type(texts).__name__}") from None
        if not all(isinstance(text, str) for text in texts):
            raise JaxqkvError("expected a text or a list of texts; token ids go to the model as they are")
        if not texts:
            raise JaxqkvError("no text to tokenize: the list is empty")
        for number, text in enumerate(texts):
            if len(text) > MOST_CHARACTERS:
                raise JaxqkvError(
                    f"text {number} has {len(text):,} characters, far more than the model's {config.n_positions} "
                    "positions hold; shorten it"
                )
        if padding_side not in ("left", "right"):
            raise JaxqkvError(f"padding_side is 'left' or 'right', not {padding_side!r}")
        bare = self.encode(texts, special_tokens=False)
        for number, ids in enumerate(bare):
            if not ids:
                raise JaxqkvError(f"text {number} is empty: it gives no token")
        encodings = self._encodings(texts, special_tokens)
        for number, encoding in enumerate(encodings):
            if len(encoding) > config.n_positions and not truncate:
                raise JaxqkvError(
                    f"text {number} has {len(encoding)} tokens, more than the model's {config.n_positions} positions; "
                    "shorten it (in the library truncate=True does)"
                )
        rows = [self._cut(encoding, config.n_positions) for encoding in encodings]
        width = max(map(len, rows))
        padded, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
        for row, tokens in enumerate(rows):
            where = slice(0, len(tokens)) if padding_side == "right" else slice(width - len(tokens), width)
            padded[row, where], mask[row, where] = tokens, True
        return Batch(ids=padded, mask=mask, token_types=np.zeros_like(padded))

    def _cut(self, encoding: "tokenizers.Encoding", length: int) -> list[int]:
        """At most `length` ids: what the template puts before and after the text stays, and the text is cut."""
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


def _as_error(error: BaseException, what: str) -> BaseException:
    """What to raise: `tokenizers` raises bare Exception, and panics as something that is not even that."""
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        return error
    return CheckpointError(f"{what} ({first_line(error)})")


def _check_unicode(text: str, number: int) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise JaxqkvError(f"text {number} is not valid Unicode: character {error.start} is half of one") from None


def find_token(ids: Sequence[int], token: int) -> int | None:
    """Index of the first `token` in `ids`, or None."""
    return ids.index(token) if token in ids else None
