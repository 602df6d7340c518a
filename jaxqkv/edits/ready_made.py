"""The ready-made edits: how each changes a value.

An edit is a pytree. Its arrays (heads, positions, donor, key, strength) are traced: you can jit, differentiate and vmap
over them, and changing them compiles nothing anew.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxqkv.architectures.activations import Activations
from jaxqkv.architectures.sites import Site
from jaxqkv.checkpoints.config import Config
from jaxqkv.edits import randomness
from jaxqkv.edits.regions import HEAD_FIELDS, KEY_FIELDS, Region, Where, check_positions, is_traced
from jaxqkv.errors import JaxqkvError

_Edit = TypeVar("_Edit", bound="Edit")


@struct.dataclass
class Edit:
    """A change of part of a field; called with a layer's value and its site.

    Attributes:
      where: the part, as given; a `Region` once the edit is placed in a run.
      renormalise: whether rows of an edited pattern are divided by their sums.
    """

    where: Any = Where()
    renormalise: bool = struct.field(pytree_node=False, default=False)

    def placed(self: _Edit, field: str, config: Config, shape: Sequence[int], mask: Any = None) -> _Edit:
        """Returns the edit placed in a field of a model and a batch, with arrays for all layers and texts.

        Args:
          field: name of the field.
          config: config of the model.
          shape: numbers of texts and of positions.
          mask: True at real tokens; None if it is traced.

        Raises:
          JaxqkvError: for a part that does not exist, and arrays of a wrong shape.
        """
        if self.renormalise and field != "pattern":
            raise JaxqkvError(f"the edit of {field} has renormalise=True, which is only for the pattern")
        return dataclasses.replace(self, where=self.where.resolve(field, config, shape))

    def at(self: _Edit, layer: Any) -> _Edit:
        """Returns a placed edit with its arrays of one layer, whose number may be traced."""
        return dataclasses.replace(
            self, where=dataclasses.replace(self.where, selected=of_layer(self.where.selected, layer))
        )

    def map_texts(self: _Edit, function: Callable[[Any], Any]) -> _Edit:
        """Returns a placed edit of one layer with a function applied to its arrays `[batch, …]`."""
        region = self.where
        keys = None if region.keys is None else function(region.keys)
        return dataclasses.replace(
            self, where=dataclasses.replace(region, positions=function(region.positions), keys=keys)
        )

    def __call__(self, value: Any, site: Site) -> Any:
        """Returns the value with its part changed."""
        region: Region = self.where
        mask = region.mask(site)
        changed = jnp.where(mask, self.changed(value, site, mask).astype(value.dtype), value)
        if not self.renormalise:
            return changed
        total = changed.sum(-1, keepdims=True)
        scaled = changed / jnp.where(total == 0, jnp.ones_like(total), total)
        return jnp.where(region.rows(), scaled, changed)

    def changed(self, value: Any, site: Site, mask: Any) -> Any:
        """Returns the new value inside the mask; in this class the value itself."""
        return value


@struct.dataclass
class Scale(Edit):
    """An edit that multiplies by a number, or by a number for each head."""

    strength: Any = 1.0

    def placed(self, field: str, config: Config, shape: Sequence[int], mask: Any = None) -> "Scale":
        """Returns the edit for a field of a model; see `Edit.placed`."""
        placed = super().placed(field, config, shape, mask)
        return dataclasses.replace(placed, strength=_of_every_head(self.strength, field, config))

    def at(self, layer: Any) -> "Scale":
        """Returns the arrays of one layer."""
        return dataclasses.replace(super().at(layer), strength=of_layer(self.strength, layer))

    def changed(self, value: Any, site: Site, mask: Any) -> Any:
        """Returns the value times the strength."""
        return value * by_head(self.strength, value)


@struct.dataclass
class Mean(Edit):
    """An edit that replaces every position by a mean: the text's own, or a reference."""

    reference: Any = None

    def placed(self, field: str, config: Config, shape: Sequence[int], mask: Any = None) -> "Mean":
        """Returns the edit for a field of a model; see `Edit.placed`."""
        placed = super().placed(field, config, shape, mask)
        if self.reference is not None:
            if field in KEY_FIELDS:
                raise JaxqkvError(f"the edit of {field} cannot have a reference, as keys differ by text; leave it out")
            _check_shape(self.reference, "a reference", field, _axes(field, config))
        return placed

    def at(self, layer: Any) -> "Mean":
        """Returns the arrays of one layer."""
        reference = None if self.reference is None else of_layer(self.reference, layer)
        return dataclasses.replace(super().at(layer), reference=reference)

    def changed(self, value: Any, site: Site, mask: Any) -> Any:
        """Returns the mean over real positions; for scores and pattern over the keys that each query sees."""
        if self.reference is not None:
            one = jnp.asarray(self.reference)
            return jnp.broadcast_to(one[None, :, None] if one.ndim == 2 else one[None, None], value.shape)
        if self.where.field in KEY_FIELDS:
            counted, axis = jnp.asarray(site.visible)[:, None], -1
        else:
            counted, axis = jnp.asarray(site.mask).reshape(len(value), *[1] * (value.ndim - 3), -1, 1), -2
        count = jnp.maximum(counted.sum(axis, keepdims=True), 1).astype(value.dtype)
        mean = jnp.where(counted, value, jnp.zeros_like(value)).sum(axis, keepdims=True) / count
        return jnp.broadcast_to(mean, value.shape)


@struct.dataclass
class Replace(Edit):
    """An edit that replaces values by those of another run.

    Attributes:
      donor: `Activations`, or an array with all layers; an array once the edit is placed.
      source: position in the donor for each position; None for the same.
      index: index of each layer along the donor's layer axis, once the edit is placed.
    """

    donor: Any = None
    source: Any = None
    index: Any = None

    def placed(self, field: str, config: Config, shape: Sequence[int], mask: Any = None) -> "Replace":
        """Returns the edit for a field of a model; see `Edit.placed`."""
        placed = super().placed(field, config, shape, mask)
        values, layers = _donated(self.donor, field, config)
        _check_donor(values, field, config, shape)
        region = placed.where
        present = np.isin(np.arange(config.n_layer), layers)
        if self.where.is_named and not is_traced(region.selected):
            wanted = np.flatnonzero(np.asarray(region.selected).any(1) & ~present)
            if len(wanted):
                raise JaxqkvError(f"the edit of {field} takes layer {wanted[0]} from a donor that does not have it")
        region = dataclasses.replace(region, selected=region.selected & present[:, None])
        source = self._sources(field, shape, values.shape[-2])
        _check_pads(self.donor, region, source, mask, field)
        index = np.zeros(config.n_layer, np.int32)
        index[list(layers)] = np.arange(len(layers))
        return dataclasses.replace(placed, where=region, donor=values, source=source, index=index)

    def _sources(self, field: str, shape: Sequence[int], available: int) -> Any:
        """Returns the position in the donor for every position, `[batch, pos]`."""
        batch, pos = shape
        if self.source is None:
            if self.where.positions is None and available != pos:
                raise JaxqkvError(
                    f"the edit of {field} takes {pos} positions from a donor of {available}; name `positions`, and "
                    "`source`, where each is in the donor"
                )
            return np.broadcast_to(np.minimum(np.arange(pos), available - 1).astype(np.int32), (batch, pos))
        positions, source = self.where.positions, self.source
        if positions is None or positions.dtype == bool or positions.shape[-1] != source.shape[-1]:
            raise JaxqkvError(f"the edit of {field} has `source`, so it needs as many `positions`, as numbers")
        check_positions(source, f"the edit of {field}", "source", available)
        several = jnp if is_traced(positions, source) else np
        pairs = [several.broadcast_to(each if each.ndim == 2 else each[None], (batch, each.shape[-1]))
                 for each in (positions, source)]  # fmt: skip
        found = pairs[0][..., None] == several.arange(pos)[None, None]  # [batch, n, pos]
        return (found * pairs[1][..., None]).max(1).astype(np.int32)

    def at(self, layer: Any) -> "Replace":
        """Returns the arrays of one layer."""
        index = of_layer(self.index, layer)
        return dataclasses.replace(super().at(layer), donor=of_layer(self.donor, index), index=None)

    def map_texts(self, function: Callable[[Any], Any]) -> "Replace":
        """Returns the edit with a function applied to its arrays `[batch, …]`."""
        batch = len(self.source)
        donor = self.donor if len(self.donor) == batch else jnp.broadcast_to(self.donor, (batch, *self.donor.shape[1:]))
        return dataclasses.replace(super().map_texts(function), donor=function(donor), source=function(self.source))

    def changed(self, value: Any, site: Site, mask: Any) -> Any:
        """Returns the donor's values, from their source positions."""
        donor = jnp.asarray(self.donor)
        source = jnp.asarray(self.source).reshape(len(value), *[1] * (value.ndim - 3), -1, 1)
        taken = jnp.take_along_axis(donor, source, axis=-2, mode="clip")
        return jnp.broadcast_to(taken, value.shape)


@struct.dataclass
class Permute(Edit):
    """An edit that shuffles the values of its part, in each head and text separately."""

    key: Any = None

    def changed(self, value: Any, site: Site, mask: Any) -> Any:
        """Returns the values shuffled over positions and dimensions together; scores and pattern within each row."""
        inside = jnp.broadcast_to(mask, value.shape)
        bits = randomness.by_place(randomness.bits, self.key, site, value, self.where.field in KEY_FIELDS)
        if self.where.field in KEY_FIELDS:
            return randomness.shuffled(value, inside, bits)
        flat = [each.reshape(*each.shape[:-2], -1) for each in (value, inside, bits)]
        return randomness.shuffled(*flat).reshape(value.shape)


@struct.dataclass
class Noise(Edit):
    """An edit that adds normal noise."""

    key: Any = None
    strength: Any = 1.0

    def placed(self, field: str, config: Config, shape: Sequence[int], mask: Any = None) -> "Noise":
        """Returns the edit for a field of a model; see `Edit.placed`."""
        placed = super().placed(field, config, shape, mask)
        return dataclasses.replace(placed, strength=_of_every_head(self.strength, field, config))

    def at(self, layer: Any) -> "Noise":
        """Returns the arrays of one layer."""
        return dataclasses.replace(super().at(layer), strength=of_layer(self.strength, layer))

    def changed(self, value: Any, site: Site, mask: Any) -> Any:
        """Returns the value plus noise of that standard deviation."""
        noise = randomness.by_place(randomness.normal, self.key, site, value, self.where.field in KEY_FIELDS)
        return value + noise * by_head(self.strength, value)


def of_layer(values: Any, layer: Any) -> Any:
    """Returns a layer's part of arrays `[layer, …]`; a NumPy array stays one unless the number is traced."""
    if isinstance(values, np.ndarray) and not is_traced(layer):
        return values[layer]
    return jax.lax.dynamic_index_in_dim(jnp.asarray(values), layer, keepdims=False)


def by_head(values: Any, value: Any) -> Any:
    """Returns numbers `[head]` in a shape that broadcasts against a layer's value."""
    values = jnp.asarray(values).astype(value.dtype)
    return values[None, :, None, None] if value.ndim == 4 else values[:, None, None]


def _axes(field: str, config: Config) -> dict[str, int]:
    """Returns a field's axes and sizes over all layers, without those of the batch."""
    if field in HEAD_FIELDS:
        return {"layer": config.n_layer, "head": config.n_head, "head_dim": config.head_dim}
    return {"layer": config.n_layer, "embed": config.n_embd}


def _check_shape(array: Any, what: str, field: str, axes: dict[str, int]) -> None:
    if jnp.shape(array) != tuple(axes.values()):
        expected = ", ".join(f"{name}={size}" for name, size in axes.items())
        raise JaxqkvError(f"the edit of {field} has {what} {list(jnp.shape(array))}, and the field is [{expected}]")


def _of_every_head(strength: Any, field: str, config: Config) -> Any:
    """Returns a strength as `[layer, head]`, with one head for a field that has none."""
    sizes = (config.n_layer, config.n_head if field in HEAD_FIELDS else 1)
    array: Any = strength if isinstance(strength, jax.Array) else np.asarray(strength)
    if array.ndim == 1 and sizes[1] == 1:
        array = array[:, None]
    if array.shape not in ((), sizes):
        axes = f"[layer={sizes[0]}, head={sizes[1]}]" if field in HEAD_FIELDS else f"[layer={sizes[0]}]"
        raise JaxqkvError(f"the edit of {field} has a strength {list(array.shape)}; it is a number, or {axes}")
    several = jnp if isinstance(array, jax.Array) else np
    return several.full(sizes, array, jax.dtypes.canonicalize_dtype(float))


def _donated(donor: Any, field: str, config: Config) -> tuple[Any, tuple[int, ...]]:
    """Returns a donor's values of a field, and the numbers of their layers."""
    if not isinstance(donor, Activations):
        return (donor if isinstance(donor, jax.Array) else np.asarray(donor)), tuple(range(config.n_layer))
    if getattr(donor, field) is None:
        raise JaxqkvError(f"the edit of {field} has a donor that did not capture it: run with capture={{{field!r}}}")
    if bad := [layer for layer in donor.layers if layer >= config.n_layer]:
        raise JaxqkvError(f"the edit of {field} has a donor with layer {bad[0]}; the model has {config.n_layer} layers")
    return getattr(donor, field), donor.layers


def _check_donor(values: Any, field: str, config: Config, shape: Sequence[int]) -> None:
    """Refuses a donor of another model, or with another number of texts."""
    batch, pos = shape
    if field in HEAD_FIELDS:
        expected: list[Any] = ["layer", batch, config.n_head, "pos", pos if field in KEY_FIELDS else config.head_dim]
    else:
        expected = ["layer", batch, "pos", config.n_embd]
    found = list(jnp.shape(values))
    if len(found) != len(expected) or any(
        isinstance(size, int) and size != there and not (axis == 1 and there == 1)
        for axis, (size, there) in enumerate(zip(expected, found, strict=False))
    ):
        wanted = ", ".join(map(str, expected))
        raise JaxqkvError(f"the edit of {field} has a donor {found}; this model and batch need [{wanted}]")


def _check_pads(donor: Any, region: Region, source: Any, mask: Any, field: str) -> None:
    """Refuses to put a donor's pad in the place of a real token."""
    if not isinstance(donor, Activations) or mask is None or is_traced(donor.mask, region, source, mask):
        return
    theirs = np.broadcast_to(np.asarray(donor.mask), (len(source), donor.mask.shape[-1]))
    real = np.take_along_axis(theirs, np.asarray(source), axis=1)
    bad = np.argwhere(np.asarray(region.positions) & np.asarray(mask) & ~real)
    if len(bad):
        text, position = bad[0]
        raise JaxqkvError(
            f"the edit of {field} takes position {position} of text {text} from a pad of the donor; name the "
            "`positions` that both have, and their `source`"
        )
