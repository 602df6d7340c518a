"""Reducers as keys of compiled programs, compared by their code and the values that it sees, not by identity."""

import dataclasses
import dis
import functools
import hashlib
import sysconfig
import types
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxqkv.errors import JaxqkvError

# A function of one layer's attention, the mask, and `inputs` if there are any, to the layer's results.
Reducer = Callable[..., Any]
PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
# Folders of libraries, whose globals are taken not to change.
LIBRARIES = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
OWN = __name__.partition(".")[0]


class Identity:
    """An object as a key that equals only itself; keeps the object alive, so that its id is not used again."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.value is other.value


class Bound:
    """A reducer that is compared by its code and the values that the code can see.

    Two are equal if they have the same code, and equal values in the closure, the defaults, the arguments of a
    `functools.partial`, the globals that the code names, and, for a method, the attributes of its object that the code
    names. Numbers, texts, NumPy arrays, containers and dataclasses are compared by value; functions like the reducer
    itself, those of libraries without their globals; modules, classes, JAX arrays, compiled functions and other objects
    by identity.

    Args:
      function: the reducer, or another function that is compiled into a block.
      role: name of the function in errors.

    Raises:
      JaxqkvError: for a value that cannot be compared, such as a bytearray.
    """

    def __init__(self, function: Reducer, role: str = "`reduce`"):
        self.function = function
        self._key = _Keys(role).of_callable(function)
        self._hash = hash(self._key)

    def __call__(self, *arguments: Any) -> Any:
        """Returns the function's result."""
        return self.function(*arguments)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bound) and self._hash == other._hash and self._key == other._key


class _Keys:
    """Keys of the values that one function can see; a value nested in itself is named by its place."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._places: dict[int, int] = {}

    def of_callable(self, function: Any) -> Hashable:
        """Returns the key of a function, a partial, a method or a callable object."""
        if isinstance(function, functools.partial):
            return ("partial", *map(self.of, (function.func, function.args, function.keywords)))
        if isinstance(function, types.MethodType):
            return ("method", self.of(function.__func__), self._of_self(function.__self__, function.__func__))
        if isinstance(function, types.FunctionType):
            return self._once(function, self._of_function)
        if isinstance(function, types.BuiltinFunctionType | type) or hasattr(function, "__wrapped__"):
            return Identity(function)  # of a library, or compiled by `jax.jit`
        call = type(function).__call__
        return ("called", self.of(call), self._of_self(function, call))

    def of(self, value: Any, name: str = "") -> Hashable:
        """Returns the key of a value; `name` is its name in errors."""
        if isinstance(value, PLAIN):
            return (type(value), repr(value))  # -0.0 is not 0.0, True is not 1, and NaN is NaN
        if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
            return self.of_callable(value)
        if isinstance(value, np.ndarray) and value.dtype != object:
            return (np.ndarray, value.shape, str(value.dtype), hashlib.sha256(value.tobytes()).digest())
        if isinstance(value, tuple | list | set | frozenset | Mapping):
            return self._once(value, lambda value: self._of_container(value, name))
        if isinstance(value, types.SimpleNamespace):
            return self._once(value, lambda value: self._of_attributes(value, tuple(vars(value)), name))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = tuple(field.name for field in dataclasses.fields(value))
            return self._once(value, lambda value: self._of_attributes(value, fields, name))
        if isinstance(value, type | types.ModuleType | jax.Array) or _is_hashed_by_identity(value):
            return Identity(value)
        try:
            hash(value)
        except TypeError:
            what = f"`{name}`, a {type(value).__name__}," if name else f"a {type(value).__name__}"
            raise JaxqkvError(
                f"{self._role} depends on {what} whose changes would not be noticed; give arrays as `inputs=`, and the "
                "rest as numbers, texts, tuples or frozen dataclasses"
            ) from None
        return (type(value), value)

    def _once(self, value: Any, key: Callable[[Any], Hashable]) -> Hashable:
        if id(value) in self._places:
            return ("again", self._places[id(value)])
        self._places[id(value)] = len(self._places)
        try:
            return key(value)
        finally:
            del self._places[id(value)]

    def _of_container(self, value: Any, name: str) -> Hashable:
        if isinstance(value, Mapping):
            return (type(value), *((self.of(key, name), self.of(item, name)) for key, item in value.items()))
        if isinstance(value, set | frozenset):
            return (type(value), frozenset(self.of(item, name) for item in value))
        return (type(value), *(self.of(item, name) for item in value))

    def _of_attributes(self, value: Any, names: Iterable[str], name: str) -> Hashable:
        parts = ((each, self.of(getattr(value, each), f"{name}.{each}")) for each in names if hasattr(value, each))
        return (type(value), *parts)

    def _of_self(self, value: Any, function: Any) -> Hashable:
        """Returns the key of the object that a method belongs to, from the attributes that the code names."""
        if isinstance(value, type) or not isinstance(function, types.FunctionType):
            return Identity(value)
        names: set[str] = set()
        fresh = set(_names_of(function.__code__))
        while fresh:  # methods that it calls may name others
            names |= fresh
            methods = (getattr(type(value), each, None) for each in fresh)
            codes = [each.__code__ for each in methods if isinstance(each, types.FunctionType)]
            fresh = {each for code in codes for each in _names_of(code)} - names
        own = (each for each in sorted(names) if not hasattr(type(value), each) or each in _vars_of(value))
        return self._once(value, lambda value: self._of_attributes(value, own, "self"))

    def _of_function(self, function: types.FunctionType) -> Hashable:
        if _is_of_a_library(function):
            try:
                return (function.__code__, *self._of_own(function))
            except JaxqkvError:
                return Identity(function)
        space = function.__globals__
        named = tuple((each, self.of(space[each], each)) for each in _globals_of(function.__code__) if each in space)
        return (function.__code__, *self._of_own(function), named)

    def _of_own(self, function: types.FunctionType) -> tuple[Hashable, ...]:
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        closure = tuple((name, self.of(cell.cell_contents, name)) for name, cell in cells if _is_filled(cell))
        return (closure, self.of(function.__defaults__), self.of(function.__kwdefaults__))


def _vars_of(value: Any) -> Mapping[str, Any]:
    """Returns the attributes of the object itself, not of its class."""
    return getattr(value, "__dict__", {})


def _is_of_a_library(function: types.FunctionType) -> bool:
    module = str(function.__globals__.get("__name__", ""))
    return module.partition(".")[0] == OWN or function.__code__.co_filename.startswith(LIBRARIES)


def _is_hashed_by_identity(value: Any) -> bool:
    own: Any = type(value).__hash__
    return own is object.__hash__


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (an empty one raises)
    except ValueError:
        return False
    return True


@functools.lru_cache(maxsize=256)
def _globals_of(code: types.CodeType) -> tuple[str, ...]:
    """Returns the names of the globals that a function's code reads, functions that it defines included."""
    names = {each.argval for each in dis.get_instructions(code) if each.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for inner in _inner(code):
        names.update(_globals_of(inner))
    return tuple(sorted(names))


def _names_of(code: types.CodeType) -> set[str]:
    """Returns every name in a function's code except its own variables: globals and attributes."""
    return set(code.co_names).union(*map(_names_of, _inner(code)))


def _inner(code: types.CodeType) -> list[types.CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
