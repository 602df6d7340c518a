"""Sizes in bytes, as people write them."""

import math
import numbers
import re
from typing import Any

from jaxqkv.errors import JaxqkvError


def size_in_bytes(text: str) -> int:
    """Parses a size with a unit, such as 2GB or 500MiB, or a number of bytes.

    Raises:
      ValueError: for other texts, and for less than a byte.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i)?B?", text.strip(), re.IGNORECASE)
    size = 0
    if match:
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
    if size < 1:
        raise ValueError(f"{text} is not a size such as 2GB or 500MB")
    return size


def memory_limit(memory: Any) -> int | None:
    """Returns a limit on memory in bytes, given a number or a text such as "2GB"; None means no limit.

    Raises:
      JaxqkvError: for anything else, and for less than a byte.
    """
    if memory is None:
        return None
    if isinstance(memory, str):
        try:
            return size_in_bytes(memory)
        except ValueError as error:
            raise JaxqkvError(f"memory: {error}") from None
    number = isinstance(memory, numbers.Real) and not isinstance(memory, bool)
    if not number or not math.isfinite(memory) or memory < 1:
        raise JaxqkvError(f"memory is a number of bytes from 1 up, or a size such as '2GB', not {memory!r}")
    return int(memory)
