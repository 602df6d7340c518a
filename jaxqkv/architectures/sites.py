"""`Editing`, which a block calls with each of its fields, and `Site`, which tells an edit where it is."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import struct

from jaxqkv.errors import JaxqkvError

# A function from a value and its site to the value to continue with, of the same shape.
EditFunction = Callable[..., Any]


@struct.dataclass
class Site:
    """The place of a value that an edit changes.

    Attributes:
      layer: the layer's number, traced, so that all layers have the same program.
      mask: `[batch, pos]`, True at real tokens.
      visible: `[batch, query, key]`, which keys a query sees.
      inputs: arrays `[batch, …]` given to the run as `inputs=`, or None.
    """

    layer: Any
    mask: Any
    visible: Any
    inputs: Any = None

    @property
    def positions(self) -> Any:
        """Index of each position among its text's real tokens, `[batch, pos]`, so that padding shifts nothing."""
        return jnp.maximum(jnp.cumsum(jnp.asarray(self.mask), axis=-1, dtype=jnp.int32) - 1, 0)


class Editing:
    """The edits of one layer: a block calls it with each field's name and value, and continues with the result.

    Args:
      functions: field → functions of a value and its site, applied one after another.
      site: site of the layer's values.
    """

    def __init__(self, functions: Mapping[str, Sequence[EditFunction]], site: Site | None = None):
        self._functions, self._site = functions, site

    def __contains__(self, field: str) -> bool:
        return field in self._functions

    def __call__(self, field: str, value: Any) -> Any:
        """Returns the edited value; the value itself if the field has no edit.

        Raises:
          JaxqkvError: for an edit that returns another shape.
        """
        for function in self._functions.get(field, ()):
            changed = jnp.asarray(function(value, self._site))
            if changed.shape != value.shape:
                raise JaxqkvError(
                    f"the edit of {field} returns {list(changed.shape)} for a value of {list(value.shape)}; an edit "
                    "must keep the shape of its value"
                )
            value = changed.astype(value.dtype)
        return value


UNEDITED = Editing({})
