"""Metrics of a model's output for a sweep: `metric=metrics.logit_difference(a, b)`.

A metric looks at the last token of each text unless `positions` is given: indices along the batch's axis of positions,
`[n]` for all texts or `[batch, n]` for each. The ready-made metrics are the mean over several positions. Tokens and
positions are arrays, so that changing them compiles nothing anew.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Int

from jaxqkv.edits.regions import check_positions
from jaxqkv.errors import JaxqkvError
from jaxqkv.text.batches import Batch


@struct.dataclass
class Metric:
    """A number for each text, computed from logits or hidden states at some positions.

    Attributes:
      function: takes the values `[batch, vocab]`, or `[batch, n, vocab]` for several positions; with `of_clean` those
        of the clean run; and the tokens. Returns an array `[batch, …]`, or a pytree of them.
      tokens: arrays of ids that the function takes.
      positions: as given; None is the last token.
      of_logits: whether the values are logits; else they are hidden states.
      of_clean: whether the function takes the clean run's values too.
    """

    function: Any = struct.field(pytree_node=False)
    tokens: tuple[Any, ...] = ()
    positions: Any = None
    of_logits: bool = struct.field(pytree_node=False, default=True)
    of_clean: bool = struct.field(pytree_node=False, default=False)

    def places(self, batch: Batch) -> Int[np.ndarray, "batch n"]:
        """Returns the positions of every text, `[batch, n]`.

        Raises:
          JaxqkvError: for positions that do not exist.
        """
        size, pos = batch.ids.shape
        if self.positions is None:
            return np.asarray(batch.last)[:, None]
        given = np.asarray(self.positions)
        if given.ndim > 2 or not np.issubdtype(given.dtype, np.integer) or (given.ndim == 2 and len(given) != size):
            raise JaxqkvError(
                f"positions of a metric are whole numbers [n], or [batch={size}, n], not {given.dtype} "
                f"{list(given.shape)}"
            )
        check_positions(given, "the metric", "position", pos)
        given = given.reshape(1, -1) if given.ndim < 2 else given
        return np.broadcast_to(given, (size, given.shape[1]))

    @property
    def is_single(self) -> bool:
        """Whether there is a single position; the values then have no axis of positions."""
        return self.positions is None or np.ndim(self.positions) == 0

    def __call__(self, values: Any, clean: Any) -> Any:
        """Returns the function's result, given values `[batch, n, …]` and those of the clean run.

        Raises:
          JaxqkvError: for a result without the axis of texts.
        """
        if self.is_single:
            values, clean = values[:, 0], None if clean is None else clean[:, 0]
        arguments = (values, clean) if self.of_clean else (values,)
        found = self.function(*arguments, *self.tokens)
        for leaf in jax.tree.leaves(found):
            if jnp.shape(leaf)[:1] != (len(values),):
                raise JaxqkvError(
                    f"a metric returns a value for each text, [batch={len(values)}, …], not an array "
                    f"{list(jnp.shape(leaf))}; means over texts are taken afterwards"
                )
        return found


def logit_difference(a: Any, b: Any, positions: Any = None) -> Metric:
    """Returns the metric logit(a) − logit(b); a and b are token ids, or `[batch]` with one for each text."""
    return Metric(_logit_difference, (_ids(a), _ids(b)), positions)


def log_probability(token: Any, positions: Any = None) -> Metric:
    """Returns the metric log p(token) in nats; `token` is an id, or `[batch]` with one for each text."""
    return Metric(_log_probability, (_ids(token),), positions)


def largest(positions: Any = None) -> Metric:
    """Returns the metric max log p in nats: the log probability of the most probable token."""
    return Metric(_largest, (), positions)


def divergence(positions: Any = None) -> Metric:
    """Returns the metric KL(clean ‖ edited) in nats, between the distributions over tokens."""
    return Metric(_divergence, (), positions, of_clean=True)


def of_logits(function: Callable[..., Any], positions: Any = None) -> Metric:
    """Returns a function of logits as a metric: `[batch, vocab]` at one position, `[batch, n, vocab]` at several.

    The function returns an array `[batch, …]`, or a pytree of them.
    """
    return Metric(function, (), positions)


def of_hidden(function: Callable[..., Any], positions: Any = None) -> Metric:
    """Returns a function of the final hidden states as a metric: `[batch, embed]` or `[batch, n, embed]`."""
    return Metric(function, (), positions, of_logits=False)


def as_metric(given: Any) -> Metric:
    """Returns a metric as it is, or a function of the last token's logits as a metric.

    Raises:
      JaxqkvError: for anything else.
    """
    if given is largest or given is divergence:
        return given()
    if isinstance(given, Metric):
        return given
    if not callable(given):
        raise JaxqkvError(f"a metric is one of jaxqkv.metrics, or a function of logits, not {given!r}")
    return of_logits(given)


def _ids(token: Any) -> Any:
    if isinstance(token, str):
        raise JaxqkvError(f"a metric takes token ids, not {token!r}; `model.tokenizer.encode` gives them")
    array = token if isinstance(token, jax.Array) else np.asarray(token)
    if not jnp.issubdtype(array.dtype, jnp.integer) or array.ndim > 1:
        raise JaxqkvError(f"tokens of a metric are ids, one or [batch], not {array.dtype} {list(array.shape)}")
    return array.astype(np.int32)


def _at(values: Any, token: Any) -> Any:
    """Returns the values `[batch, …, vocab]` at a token, or at each text's own token."""
    index = jnp.broadcast_to(jnp.asarray(token), len(values)).reshape(-1, *[1] * (values.ndim - 1))
    return jnp.take_along_axis(values, jnp.broadcast_to(index, (*values.shape[:-1], 1)), axis=-1)[..., 0]


def _averaged(values: Any) -> Any:
    """Returns the mean over positions, if there are several."""
    return values if values.ndim == 1 else values.mean(-1)


def _logit_difference(logits: Any, a: Any, b: Any) -> Any:
    return _averaged(_at(logits, a) - _at(logits, b))


def _log_probability(logits: Any, token: Any) -> Any:
    return _averaged(_at(jax.nn.log_softmax(logits), token))


def _largest(logits: Any) -> Any:
    return _averaged(jax.nn.log_softmax(logits).max(-1))


def _divergence(logits: Any, clean: Any) -> Any:
    before, after = jax.nn.log_softmax(clean), jax.nn.log_softmax(logits)
    return _averaged((jnp.exp(before) * (before - after)).sum(-1))
