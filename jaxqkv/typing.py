"""Type names that the whole package shares."""

from typing import Any

import numpy as np
from jaxtyping import Array

# An array on the device or on the host.
AnyArray = Array | np.ndarray
# The name of a dtype, NumPy's or JAX's scalar type, or the dtype itself.
DTypeLike = str | type | np.dtype[Any]
