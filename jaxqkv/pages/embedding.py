"""Arrays as the view's script reads them: 16-bit levels or float32, little-endian, in base64.

A level is `low + level / 65534 · (high - low)`; level 65535 is what is no finite number.
"""

import base64
import math
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped, UInt16

from jaxqkv.checkpoints.config import Config

LEVELS, BROKEN = 65534, 65535

Bounds = float | Float[np.ndarray, " dim"]


def quantise(values: Float[np.ndarray, "*shape"], low: Bounds, high: Bounds) -> UInt16[np.ndarray, "*shape"]:
    """Returns the nearest of 65,535 levels from `low` to `high`, off by 1/131,068 of the range at most; else `BROKEN`.

    Args:
      values: to be embedded.
      low, high: ends of the levels; of all values, or of each place along the last axis.
    """
    finite = np.isfinite(values)
    range_ = np.subtract(high, low, dtype=np.float64)
    fraction = np.where(finite, values.astype(np.float64) - low, 0) / np.where(range_ == 0, 1, range_)
    return np.where(finite, np.rint(np.clip(fraction, 0, 1) * LEVELS), BROKEN).astype(np.uint16)


def embedded_pairs(values: Float[np.ndarray, " pair"], low: float, high: float) -> dict[str, Any]:
    """Returns one head's visible values."""
    return {"low": low, "high": high, "values": in_base64(quantise(values, low, high), "<u2")}


def embedded_vectors(values: Float[np.ndarray, "pos dim"]) -> dict[str, str]:
    """Returns one head's q or k; every dimension has a range of its own, for some are far larger than others."""
    finite = np.isfinite(values)
    # A dimension without a finite value has the range 0 to 0.
    low, high = (
        np.where(finite.any(axis=0), end(np.where(finite, values, fill), axis=0), 0).astype(np.float32)
        for end, fill in ((np.min, np.inf), (np.max, -np.inf))
    )
    levels = in_base64(quantise(values, low, high), "<u2")
    return {"low": in_base64(low, "<f4"), "high": in_base64(high, "<f4"), "values": levels}


def rounded_up(error: float) -> str:
    """Returns a limit in one digit that is no lower."""
    if error == 0:
        return "0"
    rounded = f"{error:.1g}"
    return rounded if float(rounded) >= error else f"{float(rounded) + 10.0 ** math.floor(math.log10(error)):.1g}"


def in_base64(values: Shaped[np.ndarray, "..."], dtype: str) -> str:
    """Returns the bytes of values of that dtype."""
    return base64.b64encode(values.astype(dtype).tobytes()).decode()


def pairs_bytes(config: Config, layers: int, tokens: int) -> int:
    """Returns what scores, pattern and norms of that many layers take in base64."""
    pairs = tokens * (tokens + 1) // 2 if config.causal else tokens**2
    return layers * config.n_head * (2 * base64_length(2 * pairs) + base64_length(4 * tokens))


def vectors_bytes(config: Config, layers: int, tokens: int) -> int:
    """Returns what q and k of that many layers take in base64."""
    ends = 2 * base64_length(4 * config.head_dim)
    return layers * config.n_head * 2 * (base64_length(2 * tokens * config.head_dim) + ends)


def base64_length(size: int) -> int:
    """Returns the characters of so many bytes."""
    return -(-size // 3) * 4
