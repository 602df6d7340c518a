"""Token counts of a corpus, and a batch of its long documents: one pass, whose results are kept.

Counting is array arithmetic on whole batches of documents, which `tokenizers` takes on all cores.
"""

import dataclasses
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from jaxqkv import distributed
from jaxqkv.corpus import Corpus, digest
from jaxqkv.devices import cache_folder
from jaxqkv.errors import CorpusError
from jaxqkv.files import replacing
from jaxqkv.tokens import Tokenizer

# Documents go to the tokenizer together until they have this many characters, enough for all cores.
CHARACTERS = 1 << 21
# Documents that each of several processes tokenises between two meetings.
DOCUMENTS = 64
# A sequence of one token has no position but the first.
SHORTEST = 2
# Raised when what is kept changes its form.
VERSION = 1


@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """How often each token occurs in the first whole documents of a corpus.

    Attributes:
      counts: by token id.
      documents: how many were counted; those that give no token are not among them.
      whole: the corpus ended before there were as many tokens as asked for.
    """

    counts: Int[np.ndarray, "vocab"]
    documents: int
    whole: bool

    @property
    def tokens(self) -> int:
        """All that were counted."""
        return int(self.counts.sum())

    @property
    def log_frequency(self) -> Float[np.ndarray, "vocab"]:
        """Natural logarithm of each token's share of all; NaN for what was never counted."""
        counted = self.counts > 0
        share = np.where(counted, self.counts, 1) / self.counts.sum()
        return np.where(counted, np.log(share), np.nan)


def count_and_batch(
    corpus: Corpus,
    tokenizer: Tokenizer,
    vocab: int,
    *,
    tokens: int | None = None,
    batch: int | None = None,
    length: int = 1,
    cache: bool = True,
) -> tuple[TokenCounts | None, Int[np.ndarray, "batch pos"] | None]:
    """Token counts, a batch of ids, or both in one pass; without special tokens.

    Both are kept in the user's cache folder by tokenizer and corpus, and taken from there the next
    time, which is said.

    Args:
      corpus: documents.
      tokenizer: of the model.
      vocab: the model's vocabulary, the length of the counts.
      tokens: count whole documents until there are this many tokens; None for no counts.
      batch: take the first documents with at least `length` tokens, this many; None for none.
      length: tokens to take of each, from its beginning.
      cache: False to neither look nor keep.

    Raises:
      CorpusError: when the corpus has no token, or too few documents that are long enough.
    """
    key = {"version": VERSION, "corpus": corpus.fingerprint, "tokenizer": tokenizer.fingerprint, "vocab": vocab}
    counts_key, batch_key = key | {"tokens": tokens}, key | {"batch": batch, "length": length}
    counts = ids = None
    if cache and tokens and (kept := _recall("counts", counts_key, "counts", "documents", "whole")):
        counts = TokenCounts(kept["counts"], int(kept["documents"]), bool(kept["whole"]))
        _say_kept(f"{counts.tokens:,} tokens of {corpus.name} were counted before")
    if cache and batch and (kept := _recall("batch", batch_key, "ids")):
        ids = kept["ids"]
        _say_kept(f"{batch:,} documents of {corpus.name} were tokenised before")
    wanted = (tokens if counts is None else None, batch if ids is None else None)
    if any(wanted):
        new_counts, rows, lengths = _read(corpus, tokenizer, vocab, *wanted, length)
        if new_counts:
            counts = new_counts
            if cache:
                _keep("counts", counts_key, **dataclasses.asdict(counts))
        if wanted[1]:
            if len(rows) < batch:
                raise CorpusError(f"{corpus.name}: {_too_few(lengths, batch, length, len(rows))}")
            ids = np.stack(rows)
            if cache:
                _keep("batch", batch_key, ids=ids)
    return counts, ids


def _read(
    corpus: Corpus, tokenizer: Tokenizer, vocab: int, tokens: int | None, batch: int | None, length: int
) -> tuple[TokenCounts | None, list[Int[np.ndarray, " pos"]], list[int]]:
    """One pass, to the document that completes what is asked for: counts, rows, and the lengths looked at."""
    counts, counted, documents = np.zeros(vocab, np.int64), 0, 0
    rows: list[np.ndarray] = []
    lengths: list[int] = []
    counting, batching = bool(tokens), bool(batch)
    with tqdm(total=tokens, desc="tokens", unit="token", unit_scale=True, delay=1, disable=None) as progress:
        for ids, size in _documents(corpus, tokenizer):
            if counting:
                documents += 1
                counted += size
                if ids is not None:
                    counts += np.bincount(ids, minlength=vocab)
                counting = counted < tokens
            if batching:
                lengths.append(size)
                if size >= length:
                    rows.append(np.zeros(length, np.int32) if ids is None else ids[:length])
                batching = len(rows) < batch
            progress.update(size)
            if not counting and not batching:
                break
    if tokens and not counted:
        raise CorpusError(f"{corpus.name}: has no token to count")
    if distributed.count() > 1:  # a row is zeros but where its document was read
        counts = distributed.total(counts)
        rows = list(distributed.total(np.array(rows, np.int32).reshape(-1, length)))
    return TokenCounts(counts, documents, whole=counting) if tokens else None, rows, lengths


def _documents(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[tuple[Int[np.ndarray, " pos"] | None, int]]:
    """Ids of each document with a token, and how many; None for those of another process's, one of each in turn."""
    texts = _together(corpus)
    while True:
        own = [np.array(ids, np.int32) for ids in tokenizer.encode(next(texts, []), special_tokens=False)]
        sizes = distributed.gather(np.array([len(ids) for ids in own], np.int64))
        longest = max(map(len, sizes))
        if not longest:
            return
        mine = distributed.index()
        for place in range(longest):
            for process, each in enumerate(sizes):
                if place < len(each) and each[place]:
                    yield own[place] if process == mine else None, int(each[place])


def _together(corpus: Corpus) -> Iterator[list[str]]:
    """Documents in lists of at least `CHARACTERS`; the first are shorter, so that little is read in vain.

    Of several processes each gives equally many at a time: the order of all is that of one process,
    or, where each reads whole files of a hub data set, one document of each in turn.
    """
    texts, size, enough = [], 0, CHARACTERS // 8
    several = distributed.count() > 1
    for text in corpus.share(distributed.index(), distributed.count()):
        texts.append(text)
        size += len(text)
        if len(texts) == DOCUMENTS if several else size >= enough:
            yield texts
            texts, size, enough = [], 0, CHARACTERS
    if texts:
        yield texts


def _too_few(lengths: list[int], batch: int, length: int, found: int) -> str:
    """How many long documents there are, and what would work with them."""
    ways = [f"--batch {found}"] if found else []
    useful = sorted(length for length in lengths if length >= SHORTEST)
    if len(useful) >= batch:
        ways.append(f"--length {useful[-batch]}")
    elif useful and not found:
        ways.append(f"--batch {len(useful)} --length {useful[0]}")
    advice = " or ".join(ways) + " would work" if ways else "give a corpus with text in it"
    return f"{found} of its {len(lengths)} documents have {length} tokens or more, and {batch} are needed; {advice}"


# --- what is kept ---


def _path(kind: str, key: dict[str, Any]) -> Path:
    return cache_folder() / "corpora" / f"{kind}-{digest(key)[:32]}.npz"


def _recall(kind: str, key: dict[str, Any], *names: str) -> dict[str, np.ndarray] | None:
    """Arrays that were kept under this key; None if there are none, or not whole ones."""
    path = _path(kind, key)
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error):
        return None


def _say_kept(what: str) -> None:
    print(f"jaxqkv: {what}; --no-cache reads them anew", file=sys.stderr)


def _keep(kind: str, key: dict[str, Any], **arrays: Any) -> None:
    """Writes arrays, whole or not at all; a cache that cannot be written is said, and left alone."""
    path = _path(kind, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.savez_compressed(file, **arrays)
    except OSError as error:
        print(f"jaxqkv: the {kind} of tokens are not kept: {path.parent}: {error.strerror}", file=sys.stderr)
