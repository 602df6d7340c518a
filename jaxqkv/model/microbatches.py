"""Microbatches: a batch cut to fit the memory and the devices, and its results put together again."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxqkv.checkpoints.config import Config
from jaxqkv.errors import JaxqkvError

# On a CPU, tokens of a microbatch: with more, activations leave the cache and a block is slower a token.
CPU_TOKENS = 2048


def cut(tree: Any, shape: tuple[int, ...], config: Config, memory: int | None, parts: int, whole: bool) -> list[Any]:
    """Cuts arrays along the batch, in pieces that fit in `memory` on each of several devices.

    Args:
      tree: arrays `[batch, …]`.
      shape: batch and positions.
      config: of the model, whose temporaries are counted.
      memory: bytes; None leaves it to the device.
      parts: devices that share the batch.
      whole: not to be cut without a limit.
    """
    size, pos = shape
    most = size
    if memory is not None:
        # Scores, pattern and the softmax's exponentials; Q, K, V, z and residuals; the MLP's two widths.
        widths = 4 * (config.n_embd + config.attention_width) + 2 * config.n_inner
        floats = 3 * config.n_head * pos * pos + pos * widths
        most = max(1, memory // (4 * floats))
    if jax.default_backend() == "cpu" and not (memory is None and whole):
        most = min(most, max(1, CPU_TOKENS // pos))
    most *= parts
    step = -(-size // -(-size // most))
    step = -(-step // parts) * parts  # of the pieces only the last is uneven
    return [jax.tree.map(lambda leaf: leaf[start : start + step], tree) for start in range(0, size, step)]  # noqa: B023


def first(size: int, tree: Any, parts: int) -> Any:
    """Returns arrays without what filled a batch of `size` up to equal parts."""
    return jax.tree.map(lambda leaf: leaf[:size], tree) if size % parts else tree


def joined(results: Sequence[Any]) -> Any:
    """Puts the results of microbatches together along the batch axis."""
    return results[0] if len(results) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *results)


def check_batch_axis(block: Callable[..., Any], x: Float[Array, "batch pos embed"], inputs: Any) -> None:
    """Refuses a reducer whose results cannot be joined: their first axis has to be the batch.

    Raises:
      JaxqkvError: if it is not.
    """
    for size in (1, 2):
        x_piece, inputs_piece = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype),  # noqa: B023
            (x, inputs),
        )
        _, result = jax.eval_shape(block, x_piece, jax.ShapeDtypeStruct(x_piece.shape[:2], bool), inputs_piece)
        if any(leaf.shape[:1] != (size,) for leaf in jax.tree.leaves(result)):
            raise JaxqkvError(
                "the batch is cut to fit `memory` or filled up for the mesh, so each array that `reduce` returns must "
                "have it as its first axis"
            )
