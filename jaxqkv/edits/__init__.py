"""Ready-made edits of a run: `edit={"z": edits.zero(heads=[(4, 1)])}`.

Each is a pytree whose arrays are traced: another head, position, strength, donor or key needs no other program, and
you can jit, differentiate and vmap over them. What each takes besides its own arguments:

    heads         pairs (layer, head), or a mask [layer, head]; all unless given
    layers        instead of heads: numbers, or a mask [layer]
    positions     numbers along the batch's axis of positions: for all texts [n], or of each its own [batch, n]; or a
                  mask [pos] or [batch, pos]. Of scores and pattern they are the queries
    keys          the same for the keys of scores and pattern
    renormalise   divide the rows of an edited pattern by their sums; they are left as they are unless it is given

Pads are never changed, nor are scores and pattern of keys that a query does not see.
"""

from typing import Any

from jaxqkv.architectures.sites import EditFunction, Site
from jaxqkv.edits.randomness import as_key
from jaxqkv.edits.ready_made import Edit, Mean, Noise, Permute, Replace, Scale
from jaxqkv.edits.regions import Where, flat
from jaxqkv.errors import JaxqkvError

__all__ = ["Edit", "EditFunction", "Site", "mean", "noise", "permute", "replace", "scale", "zero"]


def zero(
    heads: Any = None, *, layers: Any = None, positions: Any = None, keys: Any = None, renormalise: bool = False
) -> Edit:
    """Returns an edit that sets values to 0: the same program as `scale`, of strength 0."""
    return scale(0.0, heads, layers=layers, positions=positions, keys=keys, renormalise=renormalise)


def scale(
    strength: Any,
    heads: Any = None,
    *,
    layers: Any = None,
    positions: Any = None,
    keys: Any = None,
    renormalise: bool = False,
) -> Edit:
    """Returns an edit that multiplies values by a number, or by one of each head `[layer, head]`."""
    return Scale(Where.of(heads, layers, positions, keys), renormalise, _strength(strength))


def mean(
    heads: Any = None,
    *,
    reference: Any = None,
    layers: Any = None,
    positions: Any = None,
    keys: Any = None,
    renormalise: bool = False,
) -> Edit:
    """Returns an edit that puts a mean in the place of values.

    Args:
      heads: see the module.
      reference: `[layer, head, head_dim]`, or `[layer, embed]` of a field without heads. Without it, the mean over
        the text's own tokens (in a causal model later ones too); of scores and pattern the mean of each row over the
        keys that its query sees, which makes attention uniform.
      layers, positions, keys, renormalise: see the module.
    """
    return Mean(Where.of(heads, layers, positions, keys), renormalise, reference)


def replace(
    donor: Any,
    heads: Any = None,
    *,
    layers: Any = None,
    positions: Any = None,
    source: Any = None,
    keys: Any = None,
    renormalise: bool = False,
) -> Edit:
    """Returns an edit that puts the values of another run in the place of those here.

    Args:
      donor: the `Activations` of that run, with the field captured, of as many texts or of one for all; layers that
        it does not have are left alone, and refused if they are named. Or an array with all layers.
      heads: see the module.
      layers: see the module.
      positions: see the module; the values come from the same places.
      source: numbers like `positions`: the donor's places that they come from instead.
      keys, renormalise: see the module.

    Raises:
      JaxqkvError: in the run, for a donor of another model or of other positions, and a pad for a real token.
    """
    return Replace(Where.of(heads, layers, positions, keys), renormalise, donor, flat(source, "source", 2))


def permute(
    key: Any,
    heads: Any = None,
    *,
    layers: Any = None,
    positions: Any = None,
    keys: Any = None,
    renormalise: bool = False,
) -> Edit:
    """Returns an edit that shuffles the values of each head: positions and dimensions together.

    Each row of scores and pattern is shuffled over the keys that its query sees. The order depends on the key, the
    layer and the text's own tokens' places: padding and other texts do not change it.

    Args:
      key: a seed, or from `jax.random.key`.
      heads, layers, positions, keys, renormalise: see the module.
    """
    return Permute(Where.of(heads, layers, positions, keys), renormalise, as_key(key))


def noise(
    key: Any,
    strength: Any,
    heads: Any = None,
    *,
    layers: Any = None,
    positions: Any = None,
    keys: Any = None,
    renormalise: bool = False,
) -> Edit:
    """Returns an edit that adds normal noise, which depends on the same as the order of `permute`.

    Args:
      key: a seed, or from `jax.random.key`.
      strength: its standard deviation: a number, or one of each head `[layer, head]`.
      heads, layers, positions, keys, renormalise: see the module.
    """
    return Noise(Where.of(heads, layers, positions, keys), renormalise, as_key(key), _strength(strength))


def _strength(given: Any) -> Any:
    if isinstance(given, str) or given is None:
        raise JaxqkvError(f"the strength of an edit is a number or an array, not {given!r}")
    return given
