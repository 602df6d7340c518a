"""`Batch`: token ids of several texts, and the mask that keeps pads out."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

from jaxqkv.errors import JaxqkvError
from jaxqkv.runtime import showing
from jaxqkv.runtime.arrays import snapshot
from jaxqkv.typing import AnyArray


@runtime_checkable
class Sizes(Protocol):
    """What a batch has to fit: a model's vocabulary, positions and token types."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""

    @property
    def n_positions(self) -> int:
        """Most tokens of a text."""

    @property
    def token_types(self) -> int:
        """Number of token types; 1 where there are none."""

    @property
    def model_type(self) -> str:
        """The architecture's name, for messages."""


@struct.dataclass
class Batch(showing.Arrays):
    """Token ids of several texts.

    Attributes:
      ids: int32; 0 at pads, where any id would do.
      mask: True at real tokens; pads may stand on either side.
      token_types: BERT's segments; 0 unless there are two.
    """

    __repr__ = showing.Arrays.__repr__  # which `dataclass` then does not replace

    ids: Int[AnyArray, "batch pos"]
    mask: Bool[AnyArray, "batch pos"]
    token_types: Int[AnyArray, "batch pos"]

    @property
    def positions(self) -> Int[Array, "batch pos"]:
        """Index of each token among its sequence's real tokens, so that padding shifts nothing."""
        return jnp.maximum(jnp.cumsum(self.mask, axis=-1, dtype=self.ids.dtype) - 1, 0)


# What the model's functions take: a batch, or integer ids [batch, pos] without padding.
BatchLike = Batch | jax.typing.ArrayLike | Sequence[Sequence[int]]


def as_batch(batch: BatchLike, config: Sizes) -> Batch:
    """Returns a batch, or unpadded ids `[batch, pos]` as one, checked against the config's sizes.

    Host arrays are copied, so that a run that is still going on does not see what the caller changes afterwards.

    Raises:
      JaxqkvError: on ids that are not whole numbers `[batch, pos]` or not in the vocabulary, on a mask or token
        types that do not go with them, and on more tokens than the model has positions.
    """
    if not isinstance(batch, Batch):
        try:
            ids = batch if isinstance(batch, jax.Array) else np.asarray(batch)
        except ValueError:
            raise JaxqkvError("expected ids [batch, pos] with rows of one length; `tokenize` pads texts") from None
        _check_ids(ids, config)
        ids = ids.astype(np.int32)
        batch = Batch(ids=ids, mask=np.ones(ids.shape, bool), token_types=np.zeros(ids.shape, np.int32))
    else:
        _check_ids(batch.ids, config)
        for name, part in (("mask", batch.mask), ("token_types", batch.token_types)):
            if part.shape != batch.ids.shape:
                raise JaxqkvError(f"{name} {list(part.shape)} does not go with ids {list(batch.ids.shape)}")
        if batch.mask.dtype != bool:
            raise JaxqkvError(f"mask is boolean, True at real tokens, not {batch.mask.dtype}")
        _check_token_types(batch.token_types, config)
    if batch.ids.shape[-1] > config.n_positions:
        raise JaxqkvError(f"{batch.ids.shape[-1]} tokens are more than the model's {config.n_positions} positions")
    return snapshot(batch)


def _check_ids(ids: AnyArray, config: Sizes) -> None:
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or 0 in ids.shape:
        hint = "; `tokenize` makes them of texts" if ids.dtype.kind in "UO" else ""
        raise JaxqkvError(f"expected integer ids [batch, pos], got {ids.dtype} {list(ids.shape)}{hint}")
    if not isinstance(ids, jax.core.Tracer) and (ids.min() < 0 or ids.max() >= config.vocab_size):
        raise JaxqkvError(
            f"token ids reach from {ids.min()} to {ids.max()}; the model's are 0 to {config.vocab_size - 1}"
        )


def _check_token_types(token_types: AnyArray, config: Sizes) -> None:
    if not np.issubdtype(token_types.dtype, np.integer):
        raise JaxqkvError(f"expected integer token_types [batch, pos], got {token_types.dtype}")
    if isinstance(token_types, jax.core.Tracer):
        return
    smallest, largest = token_types.min(), token_types.max()
    if smallest < 0 or largest >= config.token_types:
        theirs = f"0 to {config.token_types - 1}" if config.token_types > 1 else f"0 alone ({config.model_type})"
        raise JaxqkvError(f"token_types reach from {smallest} to {largest}; the model's are {theirs}")
