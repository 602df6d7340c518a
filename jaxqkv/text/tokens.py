"""Text to token ids: the checkpoint's tokenizer, padding, and the mask that keeps pads out."""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from jaxqkv.runtime import showing
from jaxqkv.architectures.activations import AnyArray
from jaxqkv.checkpoints.checkpoint import TOKENIZER_FILES, Checkpoint
from jaxqkv.checkpoints.config import BertConfig, Config
from jaxqkv.errors import CheckpointError, JaxqkvError, NoTokenizer, first_line
from jaxqkv.runtime.files import refuse_pointer

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

    def __init__(self, backend: "tokenizers.Tokenizer", where: str):
        self.backend, self.where = backend, where
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
        """From tokenizer.json; else from vocab.json and merges.txt (GPT-2) or vocab.txt (BERT).

        Raises:
          CheckpointError: when the files are missing, broken, or of a larger vocabulary than the model's.
        """
        from tokenizers import Tokenizer as Backend

        folder = Path(folder).expanduser()
        for name in TOKENIZER_FILES:
            refuse_pointer(folder / name)
        vocab = folder / ("vocab.txt" if isinstance(config, BertConfig) else "vocab.json")
        try:
            if (folder / "tokenizer.json").exists():
                backend = Backend.from_file(str(folder / "tokenizer.json"))
            elif not vocab.exists():
                raise CheckpointError(f"{folder}: no tokenizer.json and no {vocab.name}")
            elif isinstance(config, BertConfig):
                backend = _wordpiece(vocab)
            else:
                backend = _byte_level_bpe(vocab)
        except CheckpointError:
            raise
        except BaseException as error:
            raise _as_error(error, f"{folder}: tokenizer files cannot be read") from None
        tokens = max(backend.get_vocab().values(), default=-1) + 1
        if tokens > config.vocab_size:
            raise CheckpointError(
                f"{folder}: the tokenizer has {tokens} tokens, the model only {config.vocab_size}; "
                "they do not belong together"
            )
        return cls(backend, str(folder))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides which ids a text gets."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def encode(self, texts: Sequence[str], special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text, unpadded. BERT's `special_tokens` are [CLS] and [SEP]; GPT-2 adds none.

        Raises:
          JaxqkvError: for a text that is not valid Unicode, and where the tokenizer fails.
        """
        for number, text in enumerate(texts):
            _check_unicode(text, number)
        try:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=special_tokens)
        except BaseException as error:
            raise _as_error(error, f"{self.where}: the tokenizer fails") from None
        return [encoding.ids for encoding in encodings]

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
          truncate: cut a text at the model's positions instead of refusing it.
          special_tokens: BERT's [CLS] and [SEP].

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
        rows = self.encode(texts) if special_tokens else bare
        for number, ids in enumerate(rows):
            if len(ids) > config.n_positions and not truncate:
                raise JaxqkvError(
                    f"text {number} has {len(ids)} tokens, more than the model's {config.n_positions} positions; "
                    "shorten it (in the library truncate=True does)"
                )
        closed = len(rows[0]) > len(bare[0])
        rows = [_cut(ids, config.n_positions, keep_last=closed) for ids in rows]
        width = max(map(len, rows))
        padded, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
        for row, tokens in enumerate(rows):
            if max(tokens) >= config.vocab_size:
                raise CheckpointError(
                    f"{self.where}: the tokenizer makes token {max(tokens)}, the model has {config.vocab_size}; "
                    "they do not belong together"
                )
            where = slice(0, len(tokens)) if padding_side == "right" else slice(width - len(tokens), width)
            padded[row, where], mask[row, where] = tokens, True
        return Batch(ids=padded, mask=mask, token_types=np.zeros_like(padded))


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


def _cut(ids: list[int], length: int, keep_last: bool) -> list[int]:
    """The first `length` ids; a closing special token stays the last."""
    if len(ids) <= length:
        return ids
    return [*ids[: length - 1], ids[-1]] if keep_last else ids[:length]


def _byte_level_bpe(vocab: Path) -> Any:
    """GPT-2's tokenizer from vocab.json and merges.txt."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    merges = vocab.with_name("merges.txt")
    if not merges.exists():
        raise CheckpointError(f"{merges}: no such file; vocab.json needs it")
    backend = Backend(models.BPE.from_file(str(vocab), str(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if backend.token_to_id("<|endoftext|>") is not None:
        backend.add_special_tokens(["<|endoftext|>"])
    return backend


def _wordpiece(vocab: Path) -> Any:
    """BERT's tokenizer from vocab.txt; cased if tokenizer_config.json says so."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    settings = vocab.with_name("tokenizer_config.json")
    lowercase = (
        json.loads(settings.read_text(encoding="utf-8")).get("do_lower_case", True) if settings.exists() else True
    )
    backend = Backend(models.WordPiece.from_file(str(vocab), unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    specials = {token: backend.token_to_id(token) for token in ("[CLS]", "[SEP]", "[UNK]", "[PAD]", "[MASK]")}
    missing = [token for token, number in specials.items() if number is None]
    if missing:
        raise CheckpointError(f"{vocab}: lacks {', '.join(missing)}")
    backend.add_special_tokens(list(specials))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, specials[token]) for token in ("[CLS]", "[SEP]")],
    )
    return backend
