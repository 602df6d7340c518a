"""Ready-made edits of a run: `edit={"z": edits.zero(heads=[(4, 1)])}`.

Each is a pytree whose arrays are traced: changing a head, position, strength, donor or key compiles nothing anew, and
you can jit, differentiate and vmap over them. All take these arguments besides their own:

    heads         pairs (layer, head), or a mask [layer, head]; all heads unless given
    layers        instead of heads: layer numbers, or a mask [layer]
    positions     indices along the batch's axis of positions, [n] for all texts or [batch, n] for each; or a mask
                  [pos] or [batch, pos]. For scores and pattern they are the queries
    keys          the same for the keys of scores and pattern
    renormalise   whether to divide the rows of an edited pattern by their sums; False unless given

Pads are never changed, nor are scores and pattern at keys that a query does not see.
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
    """Returns an edit that sets values to 0: `scale` with strength 0."""
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
    """Returns an edit that multiplies values by a number, or by a number for each head, `[layer, head]`."""
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
    """Returns an edit that replaces values by a mean.

    Args:
      heads: see the module.
      reference: `[layer, head, head_dim]`, or `[layer, embed]` for a field without heads. Unless given, the mean over
        the text's own tokens (in a causal model later ones too); for scores and pattern the mean of each row over the
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
    """Returns an edit that replaces values by those of another run.

    Args:
      donor: the `Activations` of that run with the field captured, for as many texts, or one for all; layers that it
        does not have are left alone, and refused if they are named. Or an array with all layers.
      heads: see the module.
      layers: see the module.
      positions: see the module; the values come from the same positions in the donor.
      source: positions in the donor to take the values from instead, as many as `positions`.
      keys, renormalise: see the module.

    Raises:
      JaxqkvError: in the run, for a donor of another model or with other positions, or if a pad would replace a token.
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
    """Returns an edit that shuffles the values of each head, positions and dimensions together.

    Each row of scores and pattern is shuffled over the keys that its query sees. The order depends on the key, the
    layer and the positions of the text's own tokens; padding and other texts do not change it.

    Args:
      key: a seed, or a key from `jax.random.key`.
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
    """Returns an edit that adds normal noise; like the order of `permute`, padding and other texts do not change it.

    Args:
      key: a seed, or a key from `jax.random.key`.
      strength: standard deviation of the noise: a number, or one for each head, `[layer, head]`.
      heads, layers, positions, keys, renormalise: see the module.
    """
    return Noise(Where.of(heads, layers, positions, keys), renormalise, as_key(key), _strength(strength))


def _strength(given: Any) -> Any:
    if isinstance(given, str) or given is None:
        raise JaxqkvError(f"the strength of an edit is a number or an array, not {given!r}")
    return given
