"""The edits of a run: checked against model and batch, then cut to one layer and one microbatch at a time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import struct

from jaxqkv.architectures.activations import FIELDS
from jaxqkv.architectures.base import Architecture
from jaxqkv.architectures.sites import EditFunction, Site
from jaxqkv.edits import Edit
from jaxqkv.edits.regions import is_traced
from jaxqkv.errors import JaxqkvError, nearest
from jaxqkv.model.reducers import Bound
from jaxqkv.runtime.arrays import snapshot
from jaxqkv.text.batches import Batch

# Field → an edit, or several that are applied one after another.
Edits = Mapping[str, EditFunction | Sequence[EditFunction]]
# Field → edits as pytrees, as a block takes them.
Placed = dict[str, tuple[Any, ...]]


@struct.dataclass
class Function:
    """A plain function as a pytree without arrays; the values that it sees are part of the compiled program."""

    bound: Bound = struct.field(pytree_node=False)

    def __call__(self, value: Any, site: Site) -> Any:
        """Returns the function's result."""
        return self.bound(value, site)


def place(edit: Any, batch: Batch, config: Architecture, layers: Sequence[int]) -> Placed | None:
    """Returns the edits of a run as pytrees with arrays for all layers and texts; None if there are none.

    Args:
      edit: `Edits` or None, as the user gave it.
      batch: the checked batch.
      config: config of the model.
      layers: layers that are returned; none if all are run.

    Raises:
      JaxqkvError: for fields, heads, layers and positions that do not exist, layers that are not run, and arrays of
        a wrong shape.
    """
    if edit is None:
        return None
    if not isinstance(edit, Mapping):
        raise JaxqkvError(f'`edit` must map fields to edits, as edit={{"z": edits.zero()}}, not be a {_kind(edit)}')
    if unknown := [name for name in edit if name not in FIELDS]:
        raise JaxqkvError(f"cannot edit {unknown[0]}; {nearest(str(unknown[0]), FIELDS)}")
    mask = None if is_traced(batch.mask) else np.asarray(batch.mask)
    placed: Placed = {}
    for field in (name for name in FIELDS if name in edit):
        given: Any = edit[field]
        several = given if isinstance(given, list | tuple) else [given]
        placed[field] = tuple(_placed(each, field, batch, mask, config, layers) for each in several)
    return {field: several for field, several in placed.items() if several} or None


def _placed(edit: Any, field: str, batch: Batch, mask: Any, config: Architecture, layers: Sequence[int]) -> Any:
    if isinstance(edit, Edit):
        own: Edit = snapshot(edit)
        placed = own.placed(field, config, batch.ids.shape, mask)
        if layers and own.where.is_named and not is_traced(placed.where.selected):
            late = np.flatnonzero(np.asarray(placed.where.selected).any(1))
            if len(late) and late[-1] > max(layers):
                raise JaxqkvError(
                    f"the edit of {field} names layer {late[-1]}, and the run stops at layer {max(layers)}, the last "
                    "one selected; select a later one, or leave it out"
                )
        return placed
    if not callable(edit):
        raise JaxqkvError(
            f"the edit of {field} is a function of a value and its site, or one of jaxqkv.edits, not {_kind(edit)}"
        )
    # A pytree, such as jax.tree_util.Partial, has arrays of its own, which are traced.
    return snapshot(edit) if not jax.tree_util.all_leaves([edit]) else Function(Bound(edit, "the edit"))


def _kind(given: Any) -> str:
    return type(given).__name__


def structure(placed: Placed | None) -> Any:
    """Returns the part of the edits that a program is compiled for, besides shapes; None without edits."""
    return None if placed is None else jax.tree.structure(placed)


def of_layer(placed: Placed | None, layer: Any) -> Placed | None:
    """Returns the edits' arrays of one layer, whose number may be traced."""
    return _each(placed, lambda edit: edit.at(layer))


def of_texts(placed: Placed | None, function: Callable[[Any], Any]) -> Placed | None:
    """Returns one layer's edits with a function applied to their arrays `[batch, …]`."""
    return _each(placed, lambda edit: edit.map_texts(function))


def _each(placed: Placed | None, change: Callable[[Edit], Edit]) -> Placed | None:
    if placed is None:
        return None
    return {
        field: tuple(change(each) if isinstance(each, Edit) else each for each in several)
        for field, several in placed.items()
    }
