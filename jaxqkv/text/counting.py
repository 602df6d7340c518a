"""Token counts of a corpus, and the beginnings of its long documents, in one pass; the results are cached.

Counting is array arithmetic on whole batches of documents, which `tokenizers` processes on all cores.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxqkv.errors import CorpusError
from jaxqkv.runtime import console, distributed
from jaxqkv.runtime.caches import cache_folder, keep, recall
from jaxqkv.text.corpora import Corpus, digest
from jaxqkv.text.tokenizers import Tokenizer

# Characters of the documents that are tokenised together, enough for all cores.
CHARACTERS = 1 << 21
# Documents that each of several processes tokenises between exchanges.
DOCUMENTS = 64
# Most sequences of a batch that is cached; larger ones are read as they are run.
KEPT_ROWS = 1024
# Least useful length of a sequence in tokens: one token has no position but the first.
SHORTEST = 2
NEW = "--no-cache reads them anew"
# Version of the cache; raised when its form changes.
VERSION = 1


@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """How often each token occurs in the first whole documents of a corpus.

    Attributes:
      counts: counts by token id.
      documents: number of documents with at least one token.
      whole: whether the corpus ended before there were as many tokens as asked for.
    """

    counts: Int[np.ndarray, "vocab"]
    documents: int
    whole: bool

    @property
    def tokens(self) -> int:
        """Number of all counted tokens."""
        return int(self.counts.sum())

    @property
    def log_frequency(self) -> Float[np.ndarray, "vocab"]:
        """Natural logarithm of each token's share of all; NaN for tokens that were never counted."""
        counted = self.counts > 0
        share = np.where(counted, self.counts, 1) / self.counts.sum()
        return np.where(counted, np.log(share), np.nan)


@dataclasses.dataclass(frozen=True)
class Place:
    """A place to resume reading: after so many documents of this process, and rows of all processes."""

    documents: int = 0
    rows: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """One sequence of the batch.

    Attributes:
      number: number of the sequence, from 0, over all processes.
      ids: token ids.
      place: place to resume reading at, to find it again.
    """

    number: int
    ids: Int[np.ndarray, " pos"]
    place: Place


def count_and_rows(
    corpus: Corpus,
    tokenizer: Tokenizer,
    vocab: int,
    *,
    tokens: int | None = None,
    batch: int | None = None,
    length: int = 1,
    start: Place | None = None,
    cache: bool = True,
) -> tuple[TokenCounts | None, Iterator[Row]]:
    """Returns token counts, and the sequences of a batch as they are read: one pass, without special tokens.

    Counts and small batches are kept in the user's cache folder by tokenizer and corpus; a note says when they are
    taken from there. Each of several processes gets the rows that it reads.

    Args:
      corpus: the documents.
      tokenizer: tokenizer of the model.
      vocab: size of the model's vocabulary, the length of the counts.
      tokens: number of tokens after which counting stops, at the end of a document; None for no counts.
      batch: number of documents with at least `length` tokens to take, the first ones; None for none.
      length: number of tokens to take from the beginning of each.
      start: place to begin to take them, if not at the first document; there are no counts then.
      cache: whether to use the cache.

    Raises:
      CorpusError: when the corpus has no token, or, from the rows, too few documents that are long enough.
    """
    key = {"version": VERSION, "corpus": corpus.fingerprint, "tokenizer": tokenizer.fingerprint, "vocab": vocab}
    counts_key, batch_key = key | {"tokens": tokens}, key | {"batch": batch, "length": length}
    keep_batch = cache and start is None and batch is not None and batch <= KEPT_ROWS
    counts: TokenCounts | None = None
    rows: Iterator[Row] | None = None
    if cache and tokens and (kept := _recall("counts", counts_key, "counts", "documents", "whole")):
        counts = TokenCounts(kept["counts"], int(kept["documents"]), bool(kept["whole"]))
        console.note(f"{counts.tokens:,} tokens of {corpus.name} were counted before; {NEW}")
    if keep_batch and (kept := _recall("batch", batch_key, "ids")):
        rows = (Row(number, ids, Place()) for number, ids in enumerate(kept["ids"]))
        console.note(f"{batch:,} documents of {corpus.name} were tokenised before; {NEW}")
    reading = _Pass(corpus, tokenizer, length, 0 if batch is None or rows is not None else batch, start or Place())
    if tokens and counts is None:
        counts = reading.count(tokens, vocab)
        if cache:
            _keep("counts", counts_key, **dataclasses.asdict(counts))
    if rows is None:
        rows = _kept_rows(reading.rows(), batch_key) if keep_batch else reading.rows()
    return counts, rows


def _kept_rows(rows: Iterator[Row], key: dict[str, Any]) -> Iterator[Row]:
    """Yields the same rows, and keeps them in the cache once all have been taken."""
    every = []
    for row in rows:
        every.append(row.ids)
        yield row
    _keep("batch", key, ids=np.stack(every))


class _Pass:
    """One pass over a corpus; long enough documents met while counting are kept for the batch."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, length: int, batch: int, start: Place):
        self._corpus, self._length, self._batch = corpus, length, batch
        self._documents = _documents(corpus, tokenizer, start.documents)
        self._place, self._number = start, start.rows
        self._waiting: collections.deque[Row] = collections.deque()
        self._lengths: collections.Counter[int] = collections.Counter()

    def count(self, tokens: int, vocab: int) -> TokenCounts:
        """Counts whole documents until there are `tokens` tokens."""
        counts, counted, documents = np.zeros(vocab, np.int64), 0, 0
        with console.bar(total=tokens, desc="tokens", unit="token", unit_scale=True) as progress:
            for before, ids, size in self._documents:
                self._look(before, ids, size)
                documents += 1
                counted += size
                if ids is not None:
                    counts += np.bincount(ids, minlength=vocab)
                progress.update(size)
                if counted >= tokens:
                    break
        if not counted:
            raise CorpusError(f"{self._corpus.name}: has no token to count")
        if distributed.count() > 1:
            counts = distributed.total(counts)
        return TokenCounts(counts, documents, whole=counted < tokens)

    def rows(self) -> Iterator[Row]:
        """Yields the waiting rows, then reads more until the batch is complete."""
        while self._waiting:
            yield self._waiting.popleft()
        while self._number < self._batch:
            if (document := next(self._documents, None)) is None:
                raise CorpusError(
                    f"{self._corpus.name}: {_too_few(self._lengths, self._batch, self._length, self._number)}"
                )
            self._look(*document)
            while self._waiting:
                yield self._waiting.popleft()

    def _look(self, before: int, ids: Int[np.ndarray, " pos"] | None, size: int) -> None:
        """Keeps a document's first tokens for the batch, if this process has read it and it is long enough."""
        if self._number >= self._batch:
            return
        if before != self._place.documents:
            self._place = Place(before, self._number)
        self._lengths[size] += 1
        if size >= self._length:
            if ids is not None:
                self._waiting.append(Row(self._number, ids[: self._length], self._place))
            self._number += 1


def _documents(
    corpus: Corpus, tokenizer: Tokenizer, start: int = 0
) -> Iterator[tuple[int, Int[np.ndarray, " pos"] | None, int]]:
    """Yields, for each document with a token: the place to resume reading at, its ids, and their number.

    Each of several processes gets every document's size, from each process in turn, and None for the ids of another
    process's documents.
    """
    texts = _together(corpus, start)
    before = start
    while True:
        some = next(texts, [])
        own = [np.array(ids, np.int32) for ids in tokenizer.encode(some, special_tokens=False)]
        sizes = distributed.gather(np.array([len(ids) for ids in own], np.int64))
        longest = max(map(len, sizes))
        if not longest:
            return
        mine = distributed.index()
        for place in range(longest):
            for process, each in enumerate(sizes):
                if place < len(each) and each[place]:
                    yield before, own[place] if process == mine else None, int(each[place])
        before += DOCUMENTS if distributed.count() > 1 else len(some)


def _together(corpus: Corpus, start: int) -> Iterator[list[str]]:
    """Yields lists of documents with at least `CHARACTERS` in all; the first are shorter, to read little in vain.

    Several processes give equally many at a time. Together they have the order of a single process or, if each reads
    whole files of a hub data set, one document of each in turn.
    """
    texts, size, enough = [], 0, CHARACTERS // 8
    several = distributed.count() > 1
    for text in itertools.islice(corpus.share(distributed.index(), distributed.count()), start, None):
        texts.append(text)
        size += len(text)
        if len(texts) == DOCUMENTS if several else size >= enough:
            yield texts
            texts, size, enough = [], 0, CHARACTERS
    if texts:
        yield texts


def _too_few(lengths: collections.Counter[int], batch: int, length: int, found: int) -> str:
    """Returns the end of an error: how many documents are long enough, and which options would work."""
    ways = [f"--batch {found}"] if found else []
    useful = sorted(length for length in lengths.elements() if length >= SHORTEST)
    if len(useful) >= batch:
        ways.append(f"--length {useful[-batch]}")
    elif useful and not found:
        ways.append(f"--batch {len(useful)} --length {useful[0]}")
    advice = " or ".join(ways) + " would work" if ways else "give a corpus with text in it"
    return f"{found} of its {lengths.total()} documents have {length} tokens or more, and {batch} are needed; {advice}"


# --- what is kept ---


def _path(kind: str, key: dict[str, Any]) -> Path:
    return cache_folder() / "corpora" / f"{kind}-{digest(key)[:32]}.npz"


def _recall(kind: str, key: dict[str, Any], *names: str) -> dict[str, np.ndarray] | None:
    """Returns the arrays that were kept under this key; None if there are none, or the file is broken."""
    kept = recall(_path(kind, key))
    return kept if kept is not None and kept.keys() >= set(names) else None


def _keep(kind: str, key: dict[str, Any], **arrays: Any) -> None:
    """Writes arrays to the cache, whole or not at all; prints a note if it cannot be written."""
    keep(_path(kind, key), f"{kind} of tokens", arrays)
