"""Checks the arrays of every figure that a test makes against the names and axes in the figure's definition."""

import numpy as np

# Axes of a fixed length whose names have no slashes.
FIXED = {"qkv": 3, "qk": 2}


def check_arrays(spec, arrays):
    """Asserts that the arrays are those declared, and that axes of one name have one length.

    Within a family, as `density_LAYER [bin]`, each member has its own lengths.
    """
    declared, lengths = spec.arrays.declared, {}
    missing = {each.family for each in declared if not each.condition}
    for name, values in arrays.items():
        shape, found = np.shape(values), spec.arrays.find(name)
        assert found is not None, f"{spec.id}: {name} {shape} is not declared: {spec.arrays}"
        missing.discard(found.family)
        assert len(found.axes) == len(shape), f"{spec.id}: {name} {shape} has not the axes {found.axes}"
        own = lengths.setdefault(found.match(name), {})
        for axis, length in zip(found.axes, shape, strict=True):
            assert own.setdefault(axis, length) == length, f"{spec.id}: {name} {shape}: {axis} is {own[axis]} elsewhere"
    assert not missing, f"{spec.id}: {missing} are declared and not there"
    for own in lengths.values():
        shared = lengths.get((), {}) | own
        for axis, length in own.items():
            expected = size(axis, shared)
            assert expected in (None, length), f"{spec.id}: {axis} is {length}, not {expected}"


def size(axis, lengths):
    """The length that an axis must have by its name and by those of the others; None if they do not say."""
    if "/" in axis:
        return len(axis.split("/"))
    if axis in FIXED:
        return FIXED[axis]
    if axis.endswith("edge") and (bins := axis.replace("edge", "bin")) in lengths:
        return lengths[bins] + 1
    if "·" in axis:
        factors = [FIXED.get(each, lengths.get(each)) for each in axis.split("·")]
        return None if None in factors else int(np.prod(factors))
    for sign in (1, -1):
        base = axis.removesuffix(f"{sign:+}")
        if base != axis and base in lengths:
            return lengths[base] + sign
    return None
