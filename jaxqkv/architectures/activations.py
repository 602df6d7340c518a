"""The shapes of everything inside attention, and the structs that hold it.

    layer     selected layers           batch   sequences
    head      attention heads           pos     token positions
    query     positions that attend     key     positions that are attended to
    head_dim  width of a head           embed   width of the residual stream
    vocab     token ids                 inner   head · head_dim: embed, unless the files name another head_dim

    q, k, v          batch head pos head_dim   after the projections and their biases
    scores           batch head query key      QKᵀ/√head_dim, before any mask
    pattern          batch head query key      softmax of the scores over the keys that may be seen
    z                batch head pos head_dim   pattern · v
    attn_out         batch pos embed           z through W_O and its bias, before the residual
    resid_pre        batch pos embed           input of the block
    mlp_out          batch pos embed           output of the MLP, before the residual
    resid_post       batch pos embed           output of the block

Once for the whole model:

    hidden           batch pos embed           output of the last block; GPT-2's after the final norm
    logits           batch pos vocab           before the softmax over next tokens

Values at padded positions, where the mask is False, are finite and mean nothing. The pattern's rows and columns there
are 0.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxqkv.architectures.arithmetic import Arithmetic
from jaxqkv.errors import JaxqkvError, nearest
from jaxqkv.runtime import showing
from jaxqkv.runtime.arrays import is_concrete
from jaxqkv.runtime.devices import setting
from jaxqkv.runtime.tensor_files import read_tensors, write_tensors
from jaxqkv.typing import AnyArray, DTypeLike

if TYPE_CHECKING:
    import xarray

FIELDS = ("q", "k", "v", "scores", "pattern", "z", "attn_out", "resid_pre", "mlp_out", "resid_post")
# Outputs of the whole model, which can be captured in the same pass as the fields of layers.
OUTPUTS = ("hidden", "logits")
# Key of the layers' numbers in the metadata of a saved file.
LAYERS = "jaxqkv.architectures.layers"


@struct.dataclass
class Attention(showing.Arrays):
    """Intermediates of one layer; a field that was not asked for is None.

    `layer` is the layer's number, traced, for a reducer.
    """

    __repr__ = showing.Arrays.__repr__  # so that `dataclass` does not replace it

    q: Float[Array, "batch head pos head_dim"] | None = None
    k: Float[Array, "batch head pos head_dim"] | None = None
    v: Float[Array, "batch head pos head_dim"] | None = None
    scores: Float[Array, "batch head query key"] | None = None
    pattern: Float[Array, "batch head query key"] | None = None
    z: Float[Array, "batch head pos head_dim"] | None = None
    attn_out: Float[Array, "batch pos embed"] | None = None
    resid_pre: Float[Array, "batch pos embed"] | None = None
    mlp_out: Float[Array, "batch pos embed"] | None = None
    resid_post: Float[Array, "batch pos embed"] | None = None
    layer: Int[Array, ""] | None = None

    def select(self, names: Iterable[str]) -> "Attention":
        """Returns the struct with only the fields in `names`; the others are None."""
        return Attention(**{name: getattr(self, name) for name in names})

    def astype(self, dtype: DTypeLike) -> "Attention":
        """Returns the same struct in another dtype, but for the layer's number."""
        others = jax.tree.map(lambda x: x.astype(dtype), dataclasses.replace(self, layer=None))
        return dataclasses.replace(others, layer=self.layer)


@struct.dataclass
class Activations(showing.Arrays, Arithmetic):
    """Intermediates of the selected layers: `Attention`'s fields with a leading layer axis.

    `mask` is True at real tokens; `layers` has the layer's number for each index of the first axis. `hidden` and
    `logits` belong to the whole model and have no layer axis.

    `a - b`, `a * 2`, `abs(a)`, `a.map(f)` and the like compute with every captured field, and leave mask and layers
    alone. (`jax.tree.map` would subtract the masks too, which fails.)
    """

    __repr__ = showing.Arrays.__repr__  # so that `dataclass` does not replace it

    mask: Bool[AnyArray, "batch pos"]
    q: Float[Array, "layer batch head pos head_dim"] | None = None
    k: Float[Array, "layer batch head pos head_dim"] | None = None
    v: Float[Array, "layer batch head pos head_dim"] | None = None
    scores: Float[Array, "layer batch head query key"] | None = None
    pattern: Float[Array, "layer batch head query key"] | None = None
    z: Float[Array, "layer batch head pos head_dim"] | None = None
    attn_out: Float[Array, "layer batch pos embed"] | None = None
    resid_pre: Float[Array, "layer batch pos embed"] | None = None
    mlp_out: Float[Array, "layer batch pos embed"] | None = None
    resid_post: Float[Array, "layer batch pos embed"] | None = None
    hidden: Float[Array, "batch pos embed"] | None = None
    logits: Float[Array, "batch pos vocab"] | None = None
    layers: tuple[int, ...] = struct.field(pytree_node=False, default=())

    def __getitem__(self, name: str) -> Shaped[Array, "..."]:
        """Returns a field by name.

        Raises:
          JaxqkvError: for a field that was not captured, or does not exist.
        """
        names = (*FIELDS, *OUTPUTS)
        if name not in names:
            raise JaxqkvError(f"no field {name!r}; {nearest(str(name), names)}")
        values = getattr(self, name)
        if values is None:
            raise JaxqkvError(f"{name} was not captured; name it when running the model: capture={{{name!r}}}")
        return values

    def layer(self, number: int) -> Attention:
        """Returns what was captured in one layer, given its number in the model.

        Raises:
          JaxqkvError: for a layer that was not selected.
        """
        if number not in self.layers:
            raise JaxqkvError(f"no layer {number} here; there is {showing.ranges(self.layers) or 'none'}")
        index = self.layers.index(number)
        fields = {name: getattr(self, name) for name in FIELDS}
        return Attention(**{name: None if values is None else values[index] for name, values in fields.items()})

    def map(self, function: Callable[..., Any], *others: "Activations") -> "Activations":
        """Returns the activations with `function` applied to every captured field; mask and layers stay as they are.

        Args:
          function: takes a field and the same field of each of the others; returns an array of its shape.
          others: activations with the same fields, layers and masks. (Masks that JAX traces are not compared.)

        Raises:
          JaxqkvError: for others that differ, naming what differs.
        """
        for other in others:
            _check_alike(self, other)
        values = {name: function(*(getattr(each, name) for each in (self, *others))) for name in self._captured}
        return dataclasses.replace(self, **values)

    def to_xarray(self) -> "xarray.Dataset":
        """Returns the captured fields as an xarray dataset, copied into the host's memory.

        Dimensions are named as the axes. The layers' numbers are the coordinate `layer`, so that `.sel(layer=5)` is
        layer 5; the mask is a coordinate over batch and pos. Fields of bfloat16, which xarray's means leave out, become
        float32 with the same values.

        Raises:
          JaxqkvError: if xarray is not installed.
        """
        try:
            import xarray
        except ImportError:
            raise JaxqkvError("xarray is not installed; install it: pip install xarray") from None
        axes = {field.name: showing.axis_names(field.type) for field in dataclasses.fields(self)}
        arrays = {name: np.array(getattr(self, name)) for name in self._captured}
        wide = {name: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x for name, x in arrays.items()}
        coordinates: dict[str, Any] = {"mask": (axes["mask"], np.array(self.mask))}
        if self.layers:
            coordinates["layer"] = list(self.layers)
        return xarray.Dataset({name: (axes[name], values) for name, values in wide.items()}, coordinates)

    @property
    def _captured(self) -> list[str]:
        return [name for name in (*FIELDS, *OUTPUTS) if getattr(self, name) is not None]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves everything as a safetensors file for `load_activations`, whole or not at all.

        Raises:
          JaxqkvError: when the file cannot be written.
        """
        present = {name: getattr(self, name) for name in ("mask", *FIELDS, *OUTPUTS)}
        arrays = {name: np.asarray(values) for name, values in present.items() if values is not None}
        write_tensors(Path(path), arrays, {LAYERS: json.dumps(self.layers)})

    @property
    def _about(self) -> str:
        if not self.layers:
            return ""
        return f" of {showing.plural(len(self.layers), 'layer')} {showing.ranges(self.layers)}"


def _check_alike(one: Activations, other: Activations) -> None:
    """Refuses activations whose layers, fields or masks differ from the first's.

    Raises:
      JaxqkvError: naming what differs.
    """
    if one.layers != other.layers:
        numbers = " and ".join(showing.ranges(each.layers) or "none" for each in (one, other))
        raise JaxqkvError(f"activations of different layers: {numbers}; capture the same, in the same order")
    if alone := sorted({*one._captured} ^ {*other._captured}):
        raise JaxqkvError(f"{alone[0]} was captured on one side only; capture the same fields on both")
    if one.mask.shape != other.mask.shape:
        shapes = " and ".join(str(list(each.mask.shape)) for each in (one, other))
        raise JaxqkvError(f"activations of different batches: their masks are {shapes}")
    if one.mask is not other.mask and is_concrete(one.mask) and is_concrete(other.mask):
        differing = np.argwhere(np.asarray(one.mask) != np.asarray(other.mask))
        if len(differing):
            batch, pos = differing[0]
            raise JaxqkvError(
                f"the masks differ: position {pos} of sequence {batch} is padded on one side only; pad both alike"
            )


def load_activations(path: str | os.PathLike[str]) -> Activations:
    """Reads a file that `Activations.save` wrote, with its dtypes and layers.

    Raises:
      JaxqkvError: for other files, and for float64 without `jax_enable_x64`.
    """
    arrays, metadata = read_tensors(Path(path))
    names = ("mask", *FIELDS, *OUTPUTS)
    if LAYERS not in metadata or "mask" not in arrays or not set(arrays) <= set(names):
        raise JaxqkvError(f"{path}: not saved by `Activations.save`")
    wide = [name for name, values in arrays.items() if values.dtype == np.float64]
    if wide and not setting("jax_enable_x64"):
        raise JaxqkvError(f"{path}: {wide[0]} is float64; switch it on: jax.config.update('jax_enable_x64', True)")
    values = {name: jnp.asarray(values) for name, values in arrays.items()}
    return Activations(**values, layers=tuple(json.loads(metadata[LAYERS])))
