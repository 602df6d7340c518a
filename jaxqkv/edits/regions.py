"""The part of a field that an edit changes: heads, layers and positions, resolved to masks of a fixed size.

Masks are arrays, so that changing a head, layer or position compiles nothing anew.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxqkv.architectures.activations import FIELDS
from jaxqkv.architectures.sites import Site
from jaxqkv.checkpoints.config import Config
from jaxqkv.errors import JaxqkvError, listed

# Fields with an axis of heads, and those of them with queries and keys.
HEAD_FIELDS = FIELDS[: FIELDS.index("attn_out")]
KEY_FIELDS = ("scores", "pattern")
WITHOUT_HEADS = tuple(name for name in FIELDS if name not in HEAD_FIELDS)


@struct.dataclass
class Where:
    """The part of a field that an edit changes, as it was given; None means all.

    Attributes:
      heads: pairs (layer, head), or a mask `[layer, head]`.
      layers: numbers, or a mask `[layer]`; instead of heads.
      positions: indices along the batch's axis of positions, `[n]` for all texts or `[batch, n]` for each; or a mask
        `[pos]` or `[batch, pos]`. For scores and pattern they are queries.
      keys: the same for the keys of scores and pattern.
    """

    heads: Any = None
    layers: Any = None
    positions: Any = None
    keys: Any = None

    @classmethod
    def of(cls, heads: Any, layers: Any, positions: Any, keys: Any) -> "Where":
        """Returns the arguments as arrays.

        Raises:
          JaxqkvError: for heads and layers together, and for anything but numbers and masks.
        """
        if heads is not None and layers is not None:
            raise JaxqkvError("give `heads` or `layers` of an edit, not both: heads are pairs (layer, head)")
        pairs = _whole(heads, "heads")
        if pairs is not None:
            if pairs.dtype != bool and pairs.shape in ((0,), (2,)):
                pairs = pairs.reshape(-1, 2)
            if pairs.ndim != 2 or (pairs.dtype != bool and pairs.shape[1] != 2):
                raise JaxqkvError(
                    f"heads are pairs (layer, head) or a boolean mask [layer, head], not {pairs.dtype} "
                    f"{list(pairs.shape)}"
                )
        return cls(pairs, flat(layers, "layers", 1), flat(positions, "positions", 2), flat(keys, "keys", 2))

    def resolve(self, field: str, config: Config, shape: Sequence[int]) -> "Region":
        """Returns the masks for a field of a model and a batch `[batch, pos]`.

        Raises:
          JaxqkvError: for heads, layers and positions that do not exist, and for heads or keys if the field has none.
        """
        has_heads, has_keys = field in HEAD_FIELDS, field in KEY_FIELDS
        if self.heads is not None and not has_heads:
            raise JaxqkvError(f"the edit of {field} names heads, and {field} has none; name `layers`")
        if self.keys is not None and not has_keys:
            raise JaxqkvError(f"the edit of {field} names keys, which only {' and '.join(KEY_FIELDS)} have")
        sizes = (config.n_layer, config.n_head if has_heads else 1)
        selected = _layers(self.layers, field, sizes) if self.heads is None else _heads(self.heads, field, sizes)
        return Region(
            field=field,
            selected=selected,
            positions=_positions(self.positions, field, "position", shape),
            keys=_positions(self.keys, field, "key", shape) if has_keys else None,
        )

    @property
    def is_named(self) -> bool:
        """Whether layers are named, so that a missing one is an error."""
        return self.heads is not None or self.layers is not None


@struct.dataclass
class Region:
    """The part of a field that an edit changes, as masks.

    Attributes:
      field: name of the field.
      selected: `[layer, head]`, with one head for a field that has none; for one layer `[head]`.
      positions: `[batch, pos]`.
      keys: `[batch, pos]` for scores and pattern, else None.
    """

    field: str = struct.field(pytree_node=False)
    selected: Any
    positions: Any
    keys: Any = None

    def mask(self, site: Site) -> Any:
        """Returns a mask for a layer's value; axes along which it is constant have size 1.

        Pads are never in it, nor are keys that a query does not see.
        """
        rows = jnp.asarray(self.positions) & jnp.asarray(site.mask)
        selected = jnp.asarray(self.selected)
        if self.field in WITHOUT_HEADS:
            return (rows & selected[0])[:, :, None]
        rows = selected[None, :, None] & rows[:, None, :]
        if self.keys is None:
            return rows[..., None]
        return rows[..., None] & (jnp.asarray(self.keys)[:, None, :] & jnp.asarray(site.visible))[:, None]

    def rows(self) -> Any:
        """Returns a mask of the rows of scores or pattern, `[batch, head, query, 1]`."""
        return jnp.asarray(self.selected)[None, :, None, None] & jnp.asarray(self.positions)[:, None, :, None]


def is_traced(*values: Any) -> bool:
    """Tells whether values are traced by JAX, so that they cannot be checked."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def _whole(given: Any, name: str) -> Any:
    """Returns whole numbers or booleans as an array; None is None."""
    if given is None:
        return None
    if isinstance(given, jax.Array):
        array: Any = given
    else:
        if isinstance(given, set | frozenset):
            given = sorted(given)
        try:
            array = np.array(given if hasattr(given, "__array__") or np.isscalar(given) else list(given))
        except (TypeError, ValueError):
            raise JaxqkvError(f"{name} of an edit are whole numbers or a mask, not {given!r}") from None
        array = array.astype(np.int32) if array.size == 0 and array.dtype != bool else array
    if array.dtype != bool and not jnp.issubdtype(array.dtype, jnp.integer):
        raise JaxqkvError(f"{name} of an edit are whole numbers or a mask, not {given!r}")
    return array if array.dtype == bool else array.astype(np.int32)


def flat(given: Any, name: str, most: int) -> Any:
    """Returns numbers or a mask as an array with 1 to `most` axes.

    Raises:
      JaxqkvError: for anything else.
    """
    array = _whole(given, name)
    if array is not None and array.ndim > most:
        raise JaxqkvError(f"{name} of an edit have at most {most} axes, not the shape {list(array.shape)}")
    return array.reshape(1) if array is not None and array.ndim == 0 else array


def _heads(heads: Any, field: str, sizes: tuple[int, int]) -> Any:
    if heads.dtype == bool:
        if heads.shape != sizes:
            raise JaxqkvError(
                f"the edit of {field} has a mask of heads {list(heads.shape)}; the model's is [layer={sizes[0]}, "
                f"head={sizes[1]}]"
            )
        return heads
    if is_traced(heads):
        return jnp.zeros(sizes, bool).at[heads[:, 0], heads[:, 1]].set(True)
    pairs = np.asarray(heads)
    if bad := [f"({layer}, {head})" for layer, head in pairs if not (0 <= layer < sizes[0] and 0 <= head < sizes[1])]:
        raise JaxqkvError(
            f"the edit of {field} names (layer, head) {listed(bad)}; layers are 0 to {sizes[0] - 1}, heads 0 to "
            f"{sizes[1] - 1}"
        )
    mask = np.zeros(sizes, bool)
    mask[tuple(pairs.T)] = True
    return mask


def _layers(layers: Any, field: str, sizes: tuple[int, int]) -> Any:
    n_layer = sizes[0]
    if layers is None:
        return np.ones(sizes, bool)
    if layers.dtype == bool:
        if layers.shape != (n_layer,):
            raise JaxqkvError(
                f"the edit of {field} has a mask of layers {list(layers.shape)}; the model has {n_layer} layers"
            )
        marked = layers
    elif is_traced(layers):
        marked = jnp.zeros(n_layer, bool).at[layers].set(True)
    else:
        if bad := [str(layer) for layer in np.asarray(layers) if not 0 <= layer < n_layer]:
            raise JaxqkvError(f"the edit of {field} names layer {listed(bad)}; the model's are 0 to {n_layer - 1}")
        marked = np.isin(np.arange(n_layer), layers)
    several = np if isinstance(marked, np.ndarray) else jnp
    return several.broadcast_to(marked[:, None], sizes)


def _positions(given: Any, field: str, kind: str, shape: Sequence[int]) -> Any:
    """Returns a mask `[batch, pos]`, given numbers or a mask."""
    batch, pos = shape
    if given is None:
        return np.ones((batch, pos), bool)
    if given.ndim == 2 and len(given) != batch:
        raise JaxqkvError(
            f"the edit of {field} has {kind}s of {len(given)} texts, {list(given.shape)}, and the batch has {batch}"
        )
    if given.dtype == bool:
        if given.shape[-1] != pos:
            raise JaxqkvError(f"the edit of {field} has a mask of {given.shape[-1]} {kind}s, and the batch has {pos}")
        mask = given
    elif is_traced(given):
        mask = jax.nn.one_hot(given, pos, dtype=bool).any(-2)
    else:
        check_positions(given, f"the edit of {field}", kind, pos)
        mask = (np.asarray(given)[..., None] == np.arange(pos)).any(-2)
    several = np if isinstance(mask, np.ndarray) else jnp
    return several.broadcast_to(mask if mask.ndim == 2 else mask[None], (batch, pos))


def check_positions(given: Any, what: str, kind: str, pos: int) -> None:
    """Refuses positions that do not exist.

    Raises:
      JaxqkvError: naming them.
    """
    if is_traced(given):
        return
    if bad := [str(each) for each in np.unique(np.asarray(given)) if not 0 <= each < pos]:
        raise JaxqkvError(
            f"{what} names {kind} {listed(bad)}; there are 0 to {pos - 1} (of a last token, say `batch.last[:, None]`)"
        )
