"""`kernel`, the decorator that gives all kernels one calling convention."""

import functools
import inspect
import numbers
import typing
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Key

from jaxqkv.errors import KernelError
from jaxqkv.runtime.arrays import is_concrete, snapshot, to_numpy
from jaxqkv.runtime.devices import jit

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")
# Annotations of floats, whole numbers, masks and random keys; `dtypes` is the kind in every version of jaxtyping.
_ANNOTATIONS: tuple[Any, ...] = (Float[jax.Array, ""], Int[jax.Array, ""], Bool[jax.Array, ""], Key[jax.Array, ""])
FLOATS, INTS, BOOLS, KEYS = (each.dtypes for each in _ANNOTATIONS)
# Kinds of NumPy dtypes that are not numeric.
NO_NUMBERS = "OSUMm"


def kernel(*, compiled: bool = True) -> Callable[[Callable[_Parameters, _Result]], Callable[_Parameters, _Result]]:
    """Returns a decorator that turns a function of arrays into a kernel.

    The kernel takes arrays of any library, and lists of numbers. The axes of each array must match its annotation, and
    an axis must have the same length in all arrays. Changes that the caller makes to an array after the call have no
    effect.

    Keyword-only parameters are settings of the program, static for `jit`. Each must fit its annotation (bool, int,
    float, or else a function), and may be an array without axes. Whole numbers are not negative, except `ddof`.

    Args:
      compiled: whether to compile by `jit`; otherwise the function runs on the host, or calls compiled ones.
    """

    def decorate(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
        signature = inspect.signature(function)
        parameters = signature.parameters.values()
        settings = {each.name: each.annotation for each in parameters if each.kind is each.KEYWORD_ONLY}
        annotations = {each.name: _shaped(each.annotation) for each in parameters if each.name not in settings}
        run: Callable[..., Any] = jit(function, static_argnames=tuple(settings)) if compiled else function

        @functools.wraps(function)
        def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> Any:
            bound = signature.bind(*args, **kwargs)
            given = bound.arguments
            arrays = {name: _array(given[name], name, annotations[name]) for name in annotations if name in given}
            _check_axes(function.__name__, arrays, annotations)
            given.update(arrays)
            given.update({name: _setting(given[name], name, settings[name]) for name in settings if name in given})
            return run(*bound.args, **bound.kwargs)

        return call

    return decorate


def _shaped(annotation: Any) -> Any:
    """Returns the first jaxtyping array type in an annotation, or None; JAX's random keys do not count."""
    types = typing.get_args(annotation) or (annotation,)
    return next((each for each in types if hasattr(each, "dim_str") and each.dtypes != KEYS), None)


def _array(value: Any, name: str, annotation: Any) -> Any:
    """Returns a value as a JAX array, or as a NumPy array that no one else can change; a mask as booleans.

    In a tree of arrays, each array is converted.
    """
    if annotation is None and not jax.tree_util.all_leaves([value]):
        return jax.tree.map(lambda leaf: _array(leaf, name, None), value)
    dtypes = getattr(annotation, "dtypes", None)
    if value is None or not is_concrete(value):
        return value
    if not isinstance(value, jax.Array) or getattr(annotation, "array_type", None) is np.ndarray:
        value = to_numpy(value, name, KernelError)
        if value.dtype.kind in NO_NUMBERS:
            raise KernelError(f"{name} must be an array of numbers, not of {value.dtype}")
        if dtypes == FLOATS and value.dtype.kind in "iub":
            value = value.astype(np.float64)  # which becomes float32 where JAX has no other
    if jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise KernelError(f"{name} must be an array of real numbers, not of {value.dtype}")
    if dtypes == INTS and jnp.issubdtype(value.dtype, jnp.floating):
        raise KernelError(f"{name} must be whole numbers, not {value.dtype}")
    if dtypes == BOOLS and value.dtype != bool:
        if not np.issubdtype(value.dtype, np.integer) or not np.isin(np.asarray(value), (0, 1)).all():
            raise KernelError(f"{name} must be boolean, True at the values that count, or 1 and 0; not {value.dtype}")
        value = value.astype(bool)
    return snapshot(value) if isinstance(value, np.ndarray) and value.flags.writeable else value


def _setting(value: Any, name: str, kind: Any) -> Any:
    """Returns a setting as it is hashed: an array without axes as its number.

    Raises:
      KernelError: for one that is traced, has axes or does not fit its annotation, and for negative whole numbers.
    """
    if not is_concrete(value):
        raise KernelError(f"{name} is a setting of the program, a number that is known before it is traced")
    if hasattr(value, "shape"):
        if tuple(value.shape):
            raise KernelError(f"{name} is one number, not an array of shape {list(value.shape)}")
        value = value.item()
    if kind is bool:
        fits, what = value in (0, 1), "True or False"
    elif kind is int:
        fits = isinstance(value, int) and not isinstance(value, bool) and (value >= 0 or name == "ddof")
        what = "a whole number" if name == "ddof" else "a whole number, 0 or more"
    elif kind is float:
        fits, what = isinstance(value, numbers.Real) and not isinstance(value, bool), "a number"
    else:
        fits, what = callable(value), "a function"
    if not fits:
        raise KernelError(f"{name} is {what}, not {value!r}")
    return value


def _check_axes(kernel: str, arrays: Mapping[str, Any], annotations: Mapping[str, Any]) -> None:
    """Refuses arrays whose axes or lengths are not those that the annotations name.

    Raises:
      KernelError: naming the array and the axes.
    """
    lengths: dict[str, tuple[str, int]] = {}
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, array in arrays.items():
        if array is None or annotations[name] is None:
            continue
        axes, shape = annotations[name].dim_str.split(), np.shape(array)
        *named, last = axes or [""]
        if last.startswith("*"):  # any axes from here on
            axes, shape, rest = named, shape[: len(named)], shape[len(named) :]
            other, whole = shapes.setdefault(last.lstrip("*#"), (name, rest))
            if rest != whole and not ("#" in last and _broadcasts(rest, whole)):
                raise KernelError(f"{kernel}: {name} {list(rest)} does not match {other} {list(whole)}")
        if len(shape) != len(axes):
            raise KernelError(f"{kernel}: {name} has the axes [{', '.join(axes)}], got {list(shape)}")
        for axis, length in zip(axes, shape, strict=True):
            other, known = lengths.setdefault(axis, (name, length))
            if length != known:
                raise KernelError(f"{kernel}: {axis} is {known} in {other} and {length} in {name}")


def _broadcasts(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    return len(shape) <= len(whole) and all(
        one in (1, other) for one, other in zip(shape[::-1], whole[::-1], strict=False)
    )
