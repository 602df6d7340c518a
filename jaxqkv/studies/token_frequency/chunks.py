"""Sequences that are run together, and all that is computed from their tokens alone, made while others run."""

import dataclasses
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from jaxqkv.runtime.devices import place_batch
from jaxqkv.studies.token_frequency.reductions import binned_pairs
from jaxqkv.text.counting import Place, Row, TokenCounts
from jaxqkv.typing import AnyArray

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Sequences that are run together.

    Attributes:
      numbers: which ones of the batch.
      place: from where reading finds what comes after them.
      ids: their tokens.
      log_frequency: of those; NaN for a token that was never counted.
      edges: of each sequence's bins of pairs.
      index: the bin of each pair, on the device where that can be; −1 for a pair in none.
    """

    numbers: Int[np.ndarray, " sequence"]
    place: Place
    ids: Int[np.ndarray, "sequence pos"]
    log_frequency: Float[np.ndarray, "sequence pos"]
    edges: Float[np.ndarray, "sequence edge"]
    index: Int[AnyArray, "sequence pair"]


def chunks(
    rows: Iterator[Row], together: int, counts: TokenCounts | None, binned: bool, mesh: Mesh | None
) -> Iterator[Chunk]:
    """Yields so many rows together.

    Args:
      rows: the sequences of this process.
      together: how many make a chunk.
      counts: of the corpus; without them no frequency is known.
      binned: whether the pairs of each sequence are put into bins.
      mesh: of the model.
    """
    while group := list(itertools.islice(rows, together)):
        ids = np.stack([row.ids for row in group])
        log_frequency = np.full(ids.shape, np.nan) if counts is None else counts.log_frequency[ids]
        edges, index = np.zeros((len(ids), 0)), np.full((len(ids), 1), -1, np.int8)
        if binned:
            edges, index = binned_pairs(log_frequency)
        if mesh is None:
            index = jax.device_put(index)
        elif len(ids) % mesh.shape["data"] == 0:
            index = place_batch(index, mesh)
        numbers = np.array([row.number for row in group])
        yield Chunk(numbers, group[-1].place, ids, log_frequency, edges, index)


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yields the same items; while one is used, a thread makes the next."""
    reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
    try:
        coming = reader.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = reader.submit(next, items, None)
            yield item
    finally:  # without waiting: what is being read may wait for another process
        reader.shutdown(wait=False, cancel_futures=True)
