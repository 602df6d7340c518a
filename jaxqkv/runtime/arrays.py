"""Converts the caller's arrays to NumPy, and copies them at the time of a call."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from jaxqkv.errors import JaxqkvError, first_line


def snapshot(tree: Any) -> Any:
    """Returns a pytree whose arrays no one else can change: host arrays as read-only copies, JAX's own as they are.

    A run on a CPU computes from host memory in place, and may return before it has read all of it.

    Args:
      tree: a pytree of NumPy arrays, JAX arrays, tracers, or anything that `to_numpy` takes.
    """
    return jax.tree.map(_owned, tree)


def _owned(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    copy = np.array(to_numpy(leaf, "an array"))
    copy.flags.writeable = False
    return copy


def to_numpy(values: Any, name: str, error: type[JaxqkvError] = JaxqkvError) -> Shaped[np.ndarray, "..."]:
    """Returns values as a NumPy array, which may share memory with them.

    Args:
      values: lists of numbers, or an array of any library with `__array__` or `__dlpack__`; PyTorch's from any device
        and in any dtype, without gradients.
      name: name of the values in errors.
      error: class of the error to raise.

    Raises:
      JaxqkvError: or the given class, for values that cannot be read as an array.
    """
    try:
        if hasattr(values, "detach") and hasattr(values, "cpu"):  # PyTorch's, which need not be installed
            values = values.detach().cpu()
            if str(values.dtype).endswith(".bfloat16"):
                import ml_dtypes

                return values.float().numpy().astype(ml_dtypes.bfloat16)  # exact
        if not hasattr(values, "__array__") and hasattr(values, "__dlpack__"):
            return np.from_dlpack(values)
        return np.asarray(values)
    except Exception as reason:  # of any kind, depending on the library
        raise error(f"{name} cannot be read as an array ({first_line(reason)})") from None


def is_concrete(values: Any) -> bool:
    """Tells whether values are known numbers, not traced by JAX."""
    return not isinstance(values, jax.core.Tracer | jax.ShapeDtypeStruct)
