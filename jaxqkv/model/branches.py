"""The branches of a sweep: copies of the run, each edited at one head, or at one position of a head."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Int

from jaxqkv.architectures.base import Architecture
from jaxqkv.architectures.sites import Site
from jaxqkv.edits import Edit
from jaxqkv.edits.regions import HEAD_FIELDS, is_traced
from jaxqkv.errors import JaxqkvError, nearest
from jaxqkv.model import editing
from jaxqkv.runtime.arrays import snapshot
from jaxqkv.text.batches import Batch

# A function from heads, pairs (layer, head), to an edit of them, such as a constructor of `jaxqkv.edits`.
EditOfHeads = Callable[..., Any]


@struct.dataclass
class Branches:
    """The edits of all branches, of one structure, as one pytree.

    Attributes:
      own: leaves that differ between branches, `[branch, …]`; None in the place of shared ones.
      shared: leaves that all branches share, such as a donor; None in the place of the others.
      structure: tree structure of the edit.
      field: field that is edited.
      size: numbers of sequences and of positions in the batch.
    """

    own: tuple[Any, ...]
    shared: tuple[Any, ...]
    structure: Any = struct.field(pytree_node=False)
    field: str = struct.field(pytree_node=False)
    size: tuple[int, int] = struct.field(pytree_node=False)

    def chosen(self, numbers: Int[np.ndarray, " branch"]) -> "Branches":
        """Returns some of the branches, by number."""
        return self.map_own(lambda leaf: leaf[numbers])

    def map_own(self, function: Callable[[Any], Any]) -> "Branches":
        """Returns the branches with a function applied to their own arrays `[branch, …]`."""
        return dataclasses.replace(self, own=tuple(None if leaf is None else function(leaf) for leaf in self.own))

    def map(self, function: Callable[[Any], Any], count: int) -> Any:
        """Returns the results of a function of each branch's edit, stacked; vectorised."""

        def one(number: Any, own: tuple[Any, ...]) -> Any:
            leaves = [mine if theirs is None else theirs for mine, theirs in zip(own, self.shared, strict=True)]
            return function(jax.tree.unflatten(self.structure, leaves))

        return jax.vmap(one)(jnp.arange(count), self.own)

    def map_one_by_one(self, function: Callable[[Any], Any], count: int) -> Any:
        """Returns the same as `map`, computed one branch at a time, for large values."""

        def one(number_and_own: tuple[Any, tuple[Any, ...]]) -> Any:
            own = number_and_own[1]
            leaves = [mine if theirs is None else theirs for mine, theirs in zip(own, self.shared, strict=True)]
            return function(jax.tree.unflatten(self.structure, leaves))

        return jax.lax.map(one, (jnp.arange(count), self.own))

    def at(self, edit: Any, config: Architecture, layer: Any, start: Any, sequences: int) -> dict[str, tuple[Any, ...]]:
        """Returns a branch's edit in a layer, traced, for `sequences` of the batch from `start` on."""
        if not isinstance(edit, Edit):
            return {self.field: (edit,)}
        placed = edit.placed(self.field, config, self.size).at(layer)

        def cut(array: Any) -> Any:
            return jax.lax.dynamic_slice_in_dim(jnp.asarray(array), start, sequences)

        return {self.field: (placed.map_texts(cut),)}

    def changed(self, edit: Any, value: Any, config: Architecture, site: Site, start: Any) -> Any:
        """Returns a layer's value as a branch's edit changes it."""
        (function,) = self.at(edit, config, site.layer, start, len(value))[self.field]
        return function(value, site).astype(value.dtype)


def branches(
    edit: EditOfHeads,
    field: str,
    layers: Sequence[int],
    batch: Batch,
    config: Architecture,
    by_position: bool,
) -> Branches:
    """Returns a branch for every head of some layers, or every position of every head; the last varies fastest.

    Raises:
      JaxqkvError: for a field without heads, and an edit that is invalid or differs in kind between heads.
    """
    if field not in HEAD_FIELDS:
        raise JaxqkvError(f"a sweep edits heads, and {field} has none; {nearest(field, HEAD_FIELDS)}")
    if isinstance(edit, Edit):
        raise JaxqkvError(
            "a sweep makes an edit for each head: give the constructor, as edits.zero, not an edit, as edits.zero()"
        )
    made: list[Any] = []
    mask = None if is_traced(batch.mask) else np.asarray(batch.mask)
    for layer in layers:
        for head in range(config.n_head):
            own = edit([(layer, head)])
            if not isinstance(own, Edit) and (by_position or jax.tree_util.all_leaves([own])):
                raise JaxqkvError(
                    "a sweep's `edit` takes heads and returns one of jaxqkv.edits"
                    + (", whose positions it sets" if by_position else ", or a jax.tree_util.Partial")
                    + f", not {type(own).__name__}"
                )
            own = snapshot(own)
            if isinstance(own, Edit):
                own.placed(field, config, batch.ids.shape, mask)  # refuses wrong edits before anything is run
            else:
                editing.place({field: own}, batch, config, ())
            made += _of_positions(own, batch.ids.shape[1]) if by_position else [own]
    structure: Any = jax.tree.structure(made[0])
    if any(jax.tree.structure(each) != structure for each in made):
        raise JaxqkvError("a sweep's `edit` returns edits of different kinds for different heads; make them alike")
    columns = list(zip(*(jax.tree.leaves(each) for each in made), strict=True))
    alike = [_are_one(column) for column in columns]
    own_leaves = tuple(None if same else _stacked(column) for same, column in zip(alike, columns, strict=True))
    shared = tuple(column[0] if same else None for same, column in zip(alike, columns, strict=True))
    return Branches(own_leaves, shared, structure, field, tuple(batch.ids.shape))


def _of_positions(edit: Edit, pos: int) -> list[Edit]:
    if edit.where.positions is not None:
        raise JaxqkvError("a sweep by position sets the positions of its edits; leave them out of `edit`")
    where = edit.where
    return [
        dataclasses.replace(edit, where=dataclasses.replace(where, positions=np.array([each], np.int32)))
        for each in range(pos)
    ]


def _are_one(leaves: Sequence[Any]) -> bool:
    """Tells whether all leaves are the same array, or NumPy arrays with the same values."""
    first = leaves[0]
    if all(leaf is first for leaf in leaves):
        return True
    if not all(isinstance(leaf, np.ndarray) for leaf in leaves) or first.size > 1 << 10:
        return False
    return all(np.array_equal(leaf, first) for leaf in leaves)


def _stacked(leaves: Sequence[Any]) -> Any:
    if len({jnp.shape(leaf) for leaf in leaves}) > 1:
        raise JaxqkvError("a sweep's `edit` returns arrays of different shapes for different heads; make them alike")
    return np.stack(leaves) if isinstance(leaves[0], np.ndarray) else jnp.stack(leaves)
