"""`Batch`: token ids of several texts, and the mask that keeps pads out."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from jaxqkv.errors import JaxqkvError
from jaxqkv.runtime import showing
from jaxqkv.runtime.arrays import is_concrete, snapshot, to_numpy
from jaxqkv.typing import AnyArray


@runtime_checkable
class Sizes(Protocol):
    """The sizes of a model that a batch has to fit: vocabulary, positions and token types."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def n_positions(self) -> int:
        """Largest number of tokens in a text."""

    @property
    def token_types(self) -> int:
        """Number of token types; 1 if there are none."""

    @property
    def model_type(self) -> str:
        """The architecture's name, for messages."""


@struct.dataclass
class Batch(showing.Arrays):
    """Token ids of several texts.

    Attributes:
      ids: integers; 0 at pads, where any id would do.
      mask: True at real tokens; pads may be on either side.
      token_types: BERT's segments; 0 unless there are two.
    """

    __repr__ = showing.Arrays.__repr__  # so that `dataclass` does not replace it

    ids: Int[AnyArray, "batch pos"]
    mask: Bool[AnyArray, "batch pos"]
    token_types: Int[AnyArray, "batch pos"]

    @property
    def positions(self) -> Int[Array, "batch pos"]:
        """Index of each token among its sequence's real tokens, so that padding shifts nothing."""
        return jnp.maximum(jnp.cumsum(self.mask, axis=-1, dtype=self.ids.dtype) - 1, 0)

    @property
    def first(self) -> Int[Array, " batch"]:
        """Position of each sequence's first real token; pads may be on either side."""
        return jnp.argmax(jnp.asarray(self.mask), axis=-1)

    @property
    def last(self) -> Int[Array, " batch"]:
        """Position of each sequence's last real token."""
        return self.mask.shape[-1] - 1 - jnp.argmax(jnp.asarray(self.mask)[:, ::-1], axis=-1)

    def __len__(self) -> int:
        """Returns the number of sequences."""
        return len(self.ids)

    def __getitem__(self, index: Any) -> "Batch":
        """Returns a batch of some of the sequences, given a number, a slice, a list or a mask.

        Raises:
          IndexError: for a number that does not exist.
        """
        if not isinstance(index, slice) and np.ndim(index) == 0:
            number = range(len(self))[index]
            index = slice(number, number + 1)
        elif not isinstance(index, slice):
            index = np.asarray(index)
        return jax.tree.map(lambda part: part[index], self)

    @classmethod
    def of(cls, ids: Any, mask: Any = None, token_types: Any = None) -> "Batch":
        """Returns a batch made of another library's arrays or mappings.

        Args:
          ids: integers `[batch, pos]`: an array of any library with `__array__` or `__dlpack__`, or lists, which are
            padded on the right if their lengths differ; or a mapping with `input_ids` and, if there are any,
            `attention_mask` and `token_type_ids`, as the tokenizers of transformers return it.
          mask: booleans, or 1 and 0; True at real tokens. All are real unless given.
          token_types: integers; 0 unless given.

        Raises:
          JaxqkvError: for anything else, and parts of different shapes.
        """
        if isinstance(ids, Batch) and mask is None and token_types is None:
            return ids
        if isinstance(ids, Mapping):
            return _of_mapping(ids, mask, token_types)
        lengths = _lengths(ids)
        if mask is None and lengths is not None and len(set(lengths)) > 1:
            mask = np.arange(max(lengths))[None] < np.array(lengths)[:, None]
        ids = _array(ids, "ids")
        _check_kind(ids)
        mask = np.ones(ids.shape, bool) if mask is None else _array(mask, "mask")
        types = np.zeros(ids.shape, np.int32) if token_types is None else _array(token_types, "token_types")
        if np.issubdtype(mask.dtype, np.integer):
            if is_concrete(mask) and not np.isin(np.asarray(mask), (0, 1)).all():
                raise JaxqkvError("an integer mask is 1 at real tokens and 0 at pads, and this one has other values")
            mask = mask.astype(bool)
        _check_parts(ids, mask, types)
        return snapshot(cls(ids=ids, mask=mask, token_types=types))


@runtime_checkable
class ArrayLike(Protocol):
    """An array of another library."""

    def __array__(self) -> np.ndarray:
        """Returns it as a NumPy array."""


@runtime_checkable
class Exchanged(Protocol):
    """An array of another library that has the DLPack protocol."""

    def __dlpack__(self, **options: Any) -> Any:
        """Returns a capsule with its memory."""


# Batches that the model's functions take: a `Batch`, integer ids [batch, pos] without padding, or input of `Batch.of`.
BatchLike = Batch | jax.typing.ArrayLike | Sequence[Sequence[int]] | Mapping[str, Any] | ArrayLike | Exchanged
# Keys of a mapping → parts of a batch; and keys that are ignored.
KEYS = {"input_ids": "ids", "attention_mask": "mask", "token_type_ids": "token_types"}
KEYS |= {name: name for name in ("ids", "mask", "token_types")}
IGNORED = {"special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping", "num_truncated_tokens"}


def as_batch(batch: BatchLike, config: Sizes) -> Batch:
    """Returns a batch, made by `Batch.of` if need be, checked against the config's sizes.

    Host arrays are copied, so that later changes by the caller do not affect a run that has not finished.

    Raises:
      JaxqkvError: on ids that are not whole numbers `[batch, pos]` or not in the vocabulary, on a mask or token types
        that do not fit them, and on more tokens than the model has positions.
    """
    if isinstance(batch, Batch):
        _check_kind(batch.ids)
        _check_parts(batch.ids, batch.mask, batch.token_types)
        checked: Batch = snapshot(batch)
    else:
        if isinstance(batch, Sequence) and len(set(_lengths(batch) or ())) > 1:
            raise JaxqkvError("expected ids [batch, pos] with rows of one length; `Batch.of` and `tokenize` pad")
        checked = Batch.of(batch)
    _check_ids(checked.ids, config)
    _check_token_types(checked.token_types, config)
    if checked.ids.shape[-1] > config.n_positions:
        raise JaxqkvError(f"{checked.ids.shape[-1]} tokens are more than the model's {config.n_positions} positions")
    ids, token_types = (part.astype(np.int32) for part in (checked.ids, checked.token_types))
    return dataclasses.replace(checked, ids=ids, token_types=token_types)


def _of_mapping(given: Mapping[str, Any], mask: Any, token_types: Any) -> Batch:
    unknown = [str(name) for name in given if name not in KEYS and name not in IGNORED]
    if unknown:
        raise JaxqkvError(f"a batch has no {', '.join(unknown)}; it is made of {', '.join(KEYS)}")
    parts = {"mask": mask, "token_types": token_types}
    parts = {name: values for name, values in parts.items() if values is not None}
    for name, values in given.items():
        if (part := KEYS.get(name)) is not None:
            if part in parts:
                raise JaxqkvError(f"{part} is given twice, once as {name}")
            parts[part] = values
    if "ids" not in parts:
        raise JaxqkvError("a batch needs input_ids")
    return Batch.of(**parts)


def _lengths(rows: Any) -> list[int] | None:
    """Returns the lengths of rows that are lists or arrays; None for anything else."""
    if not isinstance(rows, list | tuple) or not all(hasattr(row, "__len__") for row in rows):
        return None
    return [len(row) for row in rows]


def _array(values: Any, name: str) -> AnyArray:
    """Returns values as an array of JAX or NumPy; rows of different lengths are filled up with zeros."""
    if isinstance(values, jax.Array):
        return values
    lengths = _lengths(values)
    if lengths is not None and len(set(lengths)) > 1:
        values = [[*row, *[0] * (max(lengths) - len(row))] for row in values]
    return to_numpy(values, name)


def _check_kind(ids: AnyArray) -> None:
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or 0 in ids.shape:
        hint = "; `tokenize` makes them of texts" if ids.dtype.kind in "UO" else ""
        raise JaxqkvError(f"expected integer ids [batch, pos], got {ids.dtype} {list(ids.shape)}{hint}")


def _check_parts(ids: AnyArray, mask: AnyArray, token_types: AnyArray) -> None:
    for name, part in (("mask", mask), ("token_types", token_types)):
        if part.shape != ids.shape:
            raise JaxqkvError(f"{name} {list(part.shape)} does not match ids {list(ids.shape)}")
    if mask.dtype != bool:
        raise JaxqkvError(f"mask is boolean, True at real tokens, not {mask.dtype}; `Batch.of` takes 1 and 0")
    if not np.issubdtype(token_types.dtype, np.integer):
        raise JaxqkvError(f"expected integer token_types [batch, pos], got {token_types.dtype}")


def _check_ids(ids: AnyArray, config: Sizes) -> None:
    if not is_concrete(ids):
        return
    smallest, largest = _ends(ids)
    if smallest < 0 or largest >= config.vocab_size:
        raise JaxqkvError(f"token ids reach from {smallest} to {largest}; the model's are 0 to {config.vocab_size - 1}")


def _ends(values: AnyArray) -> tuple[int, int]:
    """Returns the smallest and the largest value, by NumPy: inside `jax.jit`, JAX would trace even concrete arrays."""
    host = np.asarray(values)
    return int(host.min()), int(host.max())


def _check_token_types(token_types: AnyArray, config: Sizes) -> None:
    if not is_concrete(token_types):
        return
    smallest, largest = _ends(token_types)
    if smallest < 0 or largest >= config.token_types:
        theirs = f"0 to {config.token_types - 1}" if config.token_types > 1 else f"0 alone ({config.model_type})"
        raise JaxqkvError(f"token_types reach from {smallest} to {largest}; the model's are {theirs}")
