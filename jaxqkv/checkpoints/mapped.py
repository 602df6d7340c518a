"""`MappedFile`: a safetensors file mapped into memory, so that a tensor takes memory only while it is used."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxqkv.errors import CheckpointError, first_line
from jaxqkv.runtime.files import refuse_endless, refuse_pointer

# Most bytes of a safetensors header or an index; the largest have a few million.
MOST_HEADER_BYTES = 30_000_000
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16"}


class MappedFile:
    """A safetensors file, mapped into memory. The library checks the header; NumPy maps the data.

    Raises:
      CheckpointError: when it is not a complete safetensors file.
    """

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self.path = path
        refuse_pointer(path)
        try:
            refuse_endless(path)
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > MOST_HEADER_BYTES:
                    raise ValueError(f"header of {length:,} bytes")
                with safe_open(path, framework="np"):
                    pass  # lengths, offsets and overlaps are checked here
                self.header: dict[str, Any] = json.loads(file.read(length))
            self.header.pop("__metadata__", None)
            if not all(isinstance(entry, dict) for entry in self.header.values()):
                raise ValueError("a tensor is not described by an object")
            self.start = 8 + length
            self.bytes = np.memmap(path, np.uint8, mode="r")
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({first_line(error)}); copy or download it again"
            ) from None

    def tensor(self, key: str) -> Shaped[np.ndarray, "..."]:
        """Returns one tensor as a view of the file, in the dtype that it is stored in."""
        import ml_dtypes  # noqa: F401  (gives numpy the name bfloat16)

        entry = self.header[key]
        if entry["dtype"] not in FLOATS:
            raise CheckpointError(f"{self.path}: {key} is {entry['dtype']}, expected one of {', '.join(FLOATS)}")
        begin, end = (self.start + offset for offset in entry["data_offsets"])
        try:
            return self.bytes[begin:end].view(FLOATS[entry["dtype"]]).reshape(entry["shape"])
        except ValueError as error:  # an empty tensor may claim an impossible shape
            raise CheckpointError(f"{self.path}: {key} {entry['shape']} cannot be read ({error})") from None
