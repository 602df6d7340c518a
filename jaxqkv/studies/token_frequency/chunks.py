"""Sequences that are run together, with what is computed from their tokens while earlier ones run."""

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
from jaxqkv.studies.token_frequency.reductions import PairInputs, binned_pairs, distinct_tokens
from jaxqkv.text.counting import Place, Row, TokenCounts
from jaxqkv.typing import AnyArray

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Sequences that are run together.

    Attributes:
      numbers: their indices in the batch.
      place: where reading continues after them.
      ids: their tokens.
      log_frequency: of these tokens; NaN for a token that was never counted.
      edges: of each sequence's bins of pairs.
      occurrences: of each sequence's distinct tokens, if requested.
      inputs: the bin of each pair, on the device where that can be; −1 for a pair in none. `PairInputs` if distinct
        tokens are asked for.
    """

    numbers: Int[np.ndarray, " sequence"]
    place: Place
    ids: Int[np.ndarray, "sequence pos"]
    log_frequency: Float[np.ndarray, "sequence pos"]
    edges: Float[np.ndarray, "sequence edge"]
    occurrences: Int[np.ndarray, "sequence token"]
    inputs: Int[AnyArray, "sequence pair"] | PairInputs


def chunks(
    rows: Iterator[Row],
    together: int,
    counts: TokenCounts | None,
    binned: bool,
    mesh: Mesh | None,
    distinct: bool = False,
) -> Iterator[Chunk]:
    """Yields chunks of so many rows.

    Args:
      rows: the sequences of this process.
      together: sequences in a chunk.
      counts: of the corpus; None leaves all frequencies unknown.
      binned: whether the pairs of each sequence are put into bins.
      mesh: of the model.
      distinct: whether the distinct tokens of each sequence are found.
    """
    while group := list(itertools.islice(rows, together)):
        ids = np.stack([row.ids for row in group])
        log_frequency = np.full(ids.shape, np.nan) if counts is None else counts.log_frequency[ids]
        edges, index = np.zeros((len(ids), 0)), np.full((len(ids), 1), -1, np.int8)
        if binned:
            edges, index = binned_pairs(log_frequency)
        token, occurrences = distinct_tokens(ids, log_frequency) if distinct else (None, np.zeros((len(ids), 0), int))
        inputs = index if token is None else PairInputs(index, token, occurrences)
        if mesh is None:
            inputs = jax.device_put(inputs)
        elif len(ids) % mesh.shape["data"] == 0:
            inputs = place_batch(inputs, mesh)
        numbers = np.array([row.number for row in group])
        yield Chunk(numbers, group[-1].place, ids, log_frequency, edges, occurrences, inputs)


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
