"""The results kept of sequences that have run: sums over all, and arrays by sequence; saved and restored.

The sums do not grow with the batch. Arrays by sequence do, and are kept only if a figure asks for them.
"""

import dataclasses
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from jaxqkv.errors import JaxqkvError
from jaxqkv.runtime import distributed
from jaxqkv.runtime.files import replacing
from jaxqkv.studies.token_frequency.reductions import TOKEN_PAIRS
from jaxqkv.text.counting import Place, TokenCounts

# Names of arrays: by token or layer, summed over sequences; and smallest values.
LEFT_OUT, ENDS, MOMENTS, BINS, TOKENS, LOWEST = "left out", "ends", "moments", "bins", "tokens", "lowest"
# Errors from reading a file that is no saved state, or an incomplete one.
UNREADABLE = (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)


class BinMoments(NamedTuple):
    """Centres of bins of pairs, and the scores' means and standard deviations in them; of sequences, or of layers."""

    centres: Float[np.ndarray, "row bin"]
    mean: Float[np.ndarray, "row bin"]
    std: Float[np.ndarray, "row bin"]


class Pool:
    """Sums over sequences, and arrays with a row for each; TOKEN_PAIRS has one for each pair of its distinct tokens.

    Attributes:
      place: where reading continues after them.
      numbers: of this process's sequences among all.
      sums: LEFT_OUT, tokens without a frequency; ENDS `[2, pos]`, the ids of the first and last
        sequence; MOMENTS `[layer, 6]` and BINS `[layer, 4, bin]`, see `add_moments` and `add_bins`; TOKENS
        `[1 + layer, vocab]`, see `add_tokens`.
      lowest: `[layer, 4]`, the smallest x, −x, y and −y of MOMENTS, which tell what is constant.
    """

    def __init__(
        self, layers: int, bins: int, length: int, each: Mapping[str, tuple[tuple[int, ...], type]], vocab: int = 0
    ):
        self.place = Place()
        self.numbers = np.zeros(0, np.int64)
        self.sums = {
            LEFT_OUT: np.zeros((), np.int64),
            ENDS: np.zeros((2, length), np.int64),
            MOMENTS: np.zeros((layers, 6)),
            BINS: np.zeros((layers, 4, bins)),
            TOKENS: np.zeros((1 + layers, vocab)),
        }
        self.lowest = np.full((layers, 4), np.inf)
        self._each: dict[str, list[np.ndarray]] = {
            name: [np.zeros((0, *shape), dtype)] for name, (shape, dtype) in each.items()
        }

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns an array kept by sequence, `[sequence, …]`."""
        parts = self._each[name]
        if len(parts) > 1:
            parts[:] = [np.concatenate(parts)]
        return parts[0]

    def add(
        self, numbers: Int[np.ndarray, " sequence"], place: Place, ids: Int[np.ndarray, "sequence pos"], batch: int,
        each: Mapping[str, Shaped[np.ndarray, "sequence ..."]],
    ) -> None:  # fmt: skip
        """Adds the kept arrays of further sequences of a batch of so many."""
        self.numbers = np.concatenate([self.numbers, numbers])
        self.place = place
        for end, number in enumerate((0, batch - 1)):
            self.sums[ENDS][end] += ids[numbers == number].sum(axis=0)
        for name, parts in self._each.items():
            parts.append(np.asarray(each[name]))

    def add_moments(self, x: Float[np.ndarray, "sequence pos"], y: Float[np.ndarray, "layer sequence pos"]) -> None:
        """Adds n, Σx, Σy, Σx², Σxy and Σy² of each layer, over the pairs whose x is known."""
        known = ~np.isnan(x)
        x, y = x[known], y.astype(np.float64)[:, known]
        for layer, values in enumerate(y):
            self.sums[MOMENTS][layer] += [len(x), x.sum(), values.sum(), x @ x, x @ values, values @ values]
        if len(x):
            extremes = [np.broadcast_to(each, len(y)) for each in (x.min(), -x.max())] + [y.min(axis=1), -y.max(axis=1)]
            self.lowest = np.minimum(self.lowest, np.stack(extremes, axis=1))

    def add_tokens(
        self,
        ids: Int[np.ndarray, "sequence pos"],
        x: Float[np.ndarray, "sequence pos"],
        y: Float[np.ndarray, "layer sequence pos"],
    ) -> None:
        """Adds how often each token occurs, and Σy of each layer by token, over the pairs whose x is known."""
        known = ~np.isnan(x)
        vocab = self.sums[TOKENS].shape[1]
        self.sums[TOKENS][0] += np.bincount(ids[known], minlength=vocab)
        for layer, values in enumerate(y, start=1):
            self.sums[TOKENS][layer] += np.bincount(ids[known], values[known].astype(np.float64), minlength=vocab)

    def add_bins(
        self,
        centres: Float[np.ndarray, "sequence bin"],
        mean: Float[np.ndarray, "layer sequence bin"],
        std: Float[np.ndarray, "layer sequence bin"],
    ) -> None:
        """Adds how many sequences have something in each bin, and their sums of centres, means and deviations."""
        known = ~np.isnan(mean)
        for place, values in enumerate((np.ones_like(centres), centres, mean, std)):
            self.sums[BINS][:, place] += np.where(known, values, 0).sum(axis=1, dtype=np.float64)

    def correlations(self) -> Float[np.ndarray, " layer"]:
        """Returns Pearson's r of x and y in each layer; NaN where either is constant."""
        n, x, y, xx, xy, yy = self.sums[MOMENTS].T
        with np.errstate(invalid="ignore", divide="ignore"):
            r = np.clip((xy - x * y / n) / np.sqrt((xx - x * x / n) * (yy - y * y / n)), -1, 1)
        # Float32's rounding error does not count as spread, as in `kernels.pearson`.
        ends = np.abs(self.lowest).reshape(-1, 2, 2)
        spread = -self.lowest.reshape(-1, 2, 2).sum(axis=2)
        constant = spread <= np.finfo(np.float32).eps * ends.max(axis=2)
        return np.where(constant.any(axis=1), np.nan, r)

    def binned(self) -> BinMoments:
        """Returns centres, means and standard deviations, averaged over the sequences with something in the bin."""
        count, *totals = np.moveaxis(self.sums[BINS], 1, 0)
        return BinMoments(*(np.where(count > 0, total / np.maximum(count, 1), np.nan) for total in totals))

    def joined(self) -> "Pool":
        """Returns the pool of all processes, sequences in order; TOKEN_PAIRS are left out and stay in their process."""
        pool = Pool.__new__(Pool)
        pool.place, pool.numbers = self.place, distributed.in_order(self.numbers, self.numbers)
        pool.sums = {name: distributed.total(values[None])[0] for name, values in self.sums.items()}
        pool.lowest = np.min(distributed.gather(self.lowest), axis=0)
        pool._each = {
            name: [distributed.in_order(self[name], self.numbers)] for name in self._each if name != TOKEN_PAIRS
        }
        return pool

    # --- on disk ---

    def save(self, path: Path, key: Mapping[str, Any], counts: TokenCounts | None) -> None:
        """Saves everything, with the counts and the key of the run; the file appears whole or not at all."""
        arrays = {f"sum {name}": values for name, values in self.sums.items()} | {LOWEST: self.lowest}
        arrays |= {f"each {name}": self[name] for name in self._each}
        arrays |= {"numbers": self.numbers, "place": np.array(dataclasses.astuple(self.place))}
        if counts is not None:
            arrays |= {f"count {name}": np.asarray(value) for name, value in dataclasses.asdict(counts).items()}
        try:
            with replacing(path) as file:
                np.savez(file, key=np.array(json.dumps(key)), **arrays)
        except OSError as error:
            raise JaxqkvError(f"{path}: the run's state cannot be written ({error.strerror})") from None

    def restore(self, path: Path, key: Mapping[str, Any]) -> TokenCounts | None:
        """Restores everything from a file of `save`, and returns its counts.

        Raises:
          JaxqkvError: if the file belongs to another run or to none.
        """
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            other = json.loads(str(arrays["key"]))
            changed = [name for name in key if other.get(name) != key[name]]
            if changed:
                raise JaxqkvError(
                    f"{path}: the saved state is of another run (another {', '.join(changed)}); "
                    "leave --resume out to begin anew"
                )
            self.sums = {name: arrays[f"sum {name}"] for name in self.sums}
            self._each = {name: [arrays[f"each {name}"]] for name in self._each}
            self.lowest, self.numbers = arrays[LOWEST], arrays["numbers"]
            self.place = Place(*arrays["place"].tolist())
            if "count counts" not in arrays:
                return None
            return TokenCounts(arrays["count counts"], int(arrays["count documents"]), bool(arrays["count whole"]))
        except UNREADABLE as error:
            raise JaxqkvError(f"{path}: not a saved state ({error}); leave --resume out to begin anew") from None


def saved_key(path: Path) -> dict[str, Any] | None:
    """Returns the key of the run that a file of `Pool.save` belongs to; None if there is no file."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            key: dict[str, Any] = json.loads(str(file["key"]))
            return key
    except UNREADABLE:
        return None
