"""Reads words and their categories."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxqkv.errors import JaxqkvError
from jaxqkv.studies.stimuli import stimuli
from jaxqkv.text.reading import read_sentences


class Words(NamedTuple):
    """Words, sorted by category.

    Attributes:
      words: words, category by category.
      categories: names of the categories, in the order of the file.
      label: number of each word's category.
    """

    words: list[str]
    categories: list[str]
    label: Int[np.ndarray, "word"]

    @property
    def ends(self) -> list[float]:
        """Places between the last word of a category and the first of the next."""
        return [float(place) + 0.5 for place in np.flatnonzero(np.diff(self.label))]

    def masks(self) -> dict[str, Bool[np.ndarray, "word word"]]:
        """Returns masks of pairs: same category, above the diagonal, both (within), and only the latter (across)."""
        same = self.label[:, None] == self.label[None]
        upper = np.triu(np.ones_like(same), 1)
        return {"same": same, "upper": upper, "within": same & upper, "across": ~same & upper}


def read_words(path: Path | None) -> Words:
    """Reads lines of a category and a word; the study's own unless a file is given.

    Raises:
      JaxqkvError: for a category without a word, a repeated word, a single category, and categories of one word each.
    """
    lines = stimuli("category_selectivity/words.txt") if path is None else read_sentences(path)
    return of_lines(lines, str(path))


def of_lines(lines: Sequence[str], where: str) -> Words:
    """Returns the words in lines of a category and a word; `where` is the file, for errors."""
    by_category: dict[str, list[str]] = {}
    for number, line in enumerate(lines, start=1):
        category, _, word = line.strip().partition(" ")
        if not word.strip():
            raise JaxqkvError(f"{where}, line {number}: {category!r} has no word; a line is a category and a word")
        by_category.setdefault(category, []).append(word.strip())
    words = [word for each in by_category.values() for word in each]
    twice = sorted({word for word in words if words.count(word) > 1})
    if twice:
        raise JaxqkvError(f"{where}: {twice[0]!r} is there {words.count(twice[0])} times; list each word once")
    if len(by_category) < 2:
        raise JaxqkvError(f"{where}: all words are of the category {next(iter(by_category))!r}; two or more are needed")
    if len(words) == len(by_category):
        raise JaxqkvError(f"{where}: every category has a single word; at least one needs two, to compare within it")
    label = np.repeat(np.arange(len(by_category)), [len(each) for each in by_category.values()])
    return Words(words, list(by_category), label.astype(np.int32))
