"""Reads and writes safetensors files of results, whole in memory."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from jaxqkv.errors import JaxqkvError, first_line
from jaxqkv.runtime.files import replacing

# Names of dtypes in safetensors → in NumPy.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}


def write_tensors(path: Path, arrays: Mapping[str, Shaped[np.ndarray, "..."]], metadata: Mapping[str, str]) -> None:
    """Writes arrays and metadata, whole or not at all.

    Raises:
      JaxqkvError: when the file cannot be written.
    """
    from safetensors.numpy import save

    content = save({name: np.ascontiguousarray(values) for name, values in arrays.items()}, dict(metadata))
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise JaxqkvError(f"{path}: cannot be written ({error.strerror or error})") from None


def read_tensors(path: Path) -> tuple[dict[str, Shaped[np.ndarray, "..."]], dict[str, str]]:
    """Returns the arrays of a file, and its metadata.

    Raises:
      JaxqkvError: when it is not a complete safetensors file, or has other dtypes.
    """
    import ml_dtypes  # noqa: F401  (gives numpy the name bfloat16)
    from safetensors import SafetensorError, deserialize, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        found = deserialize(path.read_bytes())
    except (SafetensorError, OSError) as error:
        raise JaxqkvError(f"{path}: not a whole safetensors file ({first_line(error)})") from None
    arrays = {}
    for name, about in found:
        if about["dtype"] not in DTYPES:
            raise JaxqkvError(f"{path}: {name} is {about['dtype']}, expected one of {', '.join(DTYPES)}")
        arrays[name] = np.frombuffer(about["data"], DTYPES[about["dtype"]]).reshape(about["shape"])
    return arrays, metadata
