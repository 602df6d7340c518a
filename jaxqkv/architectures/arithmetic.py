"""Arithmetic with structs of arrays, field by field."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


class Arithmetic:
    """`+`, `-`, `*`, `/` and `**` with another struct of the same class or a number; `-a` and `abs(a)`."""

    __array_ufunc__ = None  # so that a NumPy number on the left leaves the operation to this class

    def map(self, function: Callable[..., Any], *others: Any) -> Any:
        """Returns the struct with `function` applied to each field and to the same field of the others."""
        raise NotImplementedError

    def _with(self, function: Callable[[Any, Any], Any], other: Any) -> Any:
        if isinstance(other, type(self)):
            return self.map(function, other)
        if isinstance(other, np.generic):
            other = other.item()  # a Python number, which does not change the fields' dtype
        if isinstance(other, bool) or not (isinstance(other, int | float | complex) or _is_scalar(other)):
            return NotImplemented
        return self.map(lambda values: function(values, other))

    def __add__(self, other: Any) -> Any:
        return self._with(operator.add, other)

    def __sub__(self, other: Any) -> Any:
        return self._with(operator.sub, other)

    def __mul__(self, other: Any) -> Any:
        return self._with(operator.mul, other)

    def __truediv__(self, other: Any) -> Any:
        return self._with(operator.truediv, other)

    def __pow__(self, other: Any) -> Any:
        return self._with(operator.pow, other)

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: Any) -> Any:
        return self._with(lambda values, number: number - values, other)

    def __neg__(self) -> Any:
        return self.map(operator.neg)

    def __abs__(self) -> Any:
        return self.map(abs)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray) and value.ndim == 0
