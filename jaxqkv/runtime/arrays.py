"""Arrays of the caller: their values at the time of a call."""

from typing import Any

import jax
import numpy as np


def snapshot(tree: Any) -> Any:
    """Returns a pytree whose arrays no one else can change: host arrays as read-only copies, JAX's own as they are.

    A run on a CPU computes from host memory in place, and may return before it has read it.

    Args:
      tree: of NumPy's arrays, JAX's, tracers, or anything that `numpy.asarray` takes.
    """
    return jax.tree.map(_owned, tree)


def _owned(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return leaf
    copy = np.array(leaf)
    copy.flags.writeable = False
    return copy
