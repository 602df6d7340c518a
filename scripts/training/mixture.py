"""Training windows of tokens: text, repetitions and made sentences, drawn anew for every step."""

from typing import NamedTuple

import numpy as np

# Shares of the windows; the rest is unchanged text.
RANDOM_REPEATED, PASSAGE_REPEATED, SENTENCES = 0.06, 0.04, 0.10
# Lengths of repeated passages: the shortest in tokens, the longest as a fraction of a window. Copying is learnt from
# the shortest periods first, in which uniform attention already favours the right token.
SHORTEST_RANDOM, LONGEST_RANDOM, SHORTEST_PASSAGE, LONGEST_PASSAGE = 4, 0.5, 16, 0.4
MASKED = 0.2  # share of a window's tokens; above BERT's 0.15, since a short training gains by more predictions


class Sources(NamedTuple):
    """Sources of windows.

    Attributes:
      text: ids of all texts in a row.
      sentences: ids of made sentences in a row, each with a separator after it.
      separator: its id.
      first: lowest id of an ordinary token.
      vocab: number of ids.
    """

    text: np.ndarray
    sentences: np.ndarray
    separator: int
    first: int
    vocab: int


def windows(stream: np.ndarray, generator: np.random.Generator, count: int, length: int) -> np.ndarray:
    """Returns random windows `[count, length]` of a row of tokens."""
    starts = generator.integers(0, len(stream) - length + 1, count)
    return stream[starts[:, None] + np.arange(length)]


def sentence_windows(
    stream: np.ndarray, end: int, generator: np.random.Generator, count: int, length: int
) -> np.ndarray:
    """Returns windows of made sentences, each beginning with a whole sentence."""
    begins = np.flatnonzero(stream[: len(stream) - length] == end) + 1
    return stream[generator.choice(begins, count)[:, None] + np.arange(length)]


def repeated_tokens(generator: np.random.Generator, first: int, vocab: int, period: int, length: int) -> np.ndarray:
    """Returns random tokens `[length]` that repeat after every `period`."""
    return np.resize(generator.integers(first, vocab, period), length).astype(np.int32)


def repeat_passage(window: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns the window with one of its passages copied to a later place in it."""
    length = len(window)
    size = int(generator.integers(min(SHORTEST_PASSAGE, length // 4), int(LONGEST_PASSAGE * length)))
    first = int(generator.integers(0, length - 2 * size + 1))
    second = int(generator.integers(first + size, length - size + 1))
    window = window.copy()
    window[second : second + size] = window[first : first + size]
    return window


def draw(sources: Sources, generator: np.random.Generator, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws windows of the mixture.

    Returns:
      ids `[count, length]`, and weights of the same shape and of mean 1: how much a token counts when it is
      predicted from what comes before. Random tokens count nothing the first time they occur.
    """
    ids, weights = windows(sources.text, generator, count, length), np.ones((count, length), np.float32)
    kind = generator.random(count)
    for index in np.flatnonzero(kind < RANDOM_REPEATED + PASSAGE_REPEATED):
        if kind[index] < RANDOM_REPEATED:
            period = int(SHORTEST_RANDOM * (LONGEST_RANDOM * length / SHORTEST_RANDOM) ** generator.random())
            ids[index] = repeated_tokens(generator, sources.first, sources.vocab, period, length)
            weights[index, : period + 1] = 0
        else:
            ids[index] = repeat_passage(ids[index], generator)
    made = kind > 1 - SENTENCES
    ids[made] = sentence_windows(sources.sentences, sources.separator, generator, int(made.sum()), length)
    return ids, weights / weights.mean()


def mask_tokens(
    ids: np.ndarray, generator: np.random.Generator, ends: tuple[int, int], mask: int, first: int, vocab: int,
    masked: float = MASKED,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Returns BERT's task. Source: Devlin et al. 2018, §3.1.

    Half of the windows stand between [CLS] and [SEP]. Of the chosen tokens 80 % become [MASK], 10 %
    a random token, and 10 % stay.

    Returns:
      corrupted ids `[batch, pos]`, positions to predict `[batch, chosen]`, their true ids.
    """
    ids = ids.copy()
    framed = generator.random(len(ids)) < 0.5
    ids[framed, 0], ids[framed, -1] = ends
    order = generator.random(ids.shape)
    order[:, [0, -1]] = 2  # the ends are never chosen
    chosen = np.argsort(order, axis=1)[:, : max(1, int(masked * ids.shape[1]))].astype(np.int32)
    truth = np.take_along_axis(ids, chosen, 1)
    dice = generator.random(truth.shape)
    random = generator.integers(first, vocab, truth.shape)
    replaced = np.where(dice < 0.8, mask, np.where(dice < 0.9, random, truth)).astype(np.int32)
    np.put_along_axis(ids, chosen, replaced, 1)
    return ids, chosen, truth
