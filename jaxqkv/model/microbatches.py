"""Microbatches: cuts a batch to fit the memory and the devices, and joins the results."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxqkv.checkpoints.config import Config
from jaxqkv.errors import JaxqkvError
from jaxqkv.runtime.devices import jit

# Most tokens of a microbatch on a CPU; with more, activations leave the cache and each token takes longer.
CPU_TOKENS = 2048
# Tokens of the programs of a sweep on an accelerator; programs of fewer tokens take mostly the time to start them.
ACCELERATOR_TOKENS = 2048
# Most sequences of a microbatch if nothing limits them.
LARGEST = 1 << 20
# Roundings by which a reducer's results may differ when the batch is cut in another way. Products of thousands of
# numbers differ by tens of roundings, results of a reducer that mixes sequences by tens of thousands.
SAME = 4096
# Upper limit of the same, as a share of the largest value, for dtypes of 16 bits.
LARGEST_SAME = 0.1


def cut(tree: Any, shape: tuple[int, ...], config: Config, memory: int | None, parts: int, whole: bool) -> list[Any]:
    """Cuts arrays along the batch into pieces that fit in `memory` on each of several devices.

    Args:
      tree: arrays `[batch, …]`.
      shape: numbers of sequences and of positions.
      config: config of the model, whose temporaries are counted.
      memory: limit in bytes; None for a size that suits the device.
      parts: number of devices that share the batch.
      whole: whether to leave the batch whole without a limit.
    """
    size = shape[0]
    most = min(size, sequences_that_fit(shape[1], config, memory, whole)) * parts
    step = -(-size // -(-size // most))
    step = -(-step // parts) * parts  # only the last piece is smaller
    return [jax.tree.map(lambda leaf: leaf[start : start + step], tree) for start in range(0, size, step)]  # noqa: B023


def sequences_that_fit(pos: int, config: Config, memory: int | None, whole: bool = False) -> int:
    """Returns how many sequences of `pos` tokens a microbatch on one device may have; arguments as for `cut`."""
    most = LARGEST
    if memory is not None:
        # Scores, pattern and exponentials of the softmax; Q, K, V, z and residuals; both widths of the MLP.
        widths = 4 * (config.n_embd + config.attention_width) + 2 * config.n_inner
        floats = 3 * config.n_head * pos * pos + pos * widths
        most = max(1, memory // (4 * floats))
    if jax.default_backend() == "cpu" and not (memory is None and whole):
        most = min(most, max(1, CPU_TOKENS // pos))
    return most


def sequences_to_join(pos: int) -> int:
    """Returns how many sequences of `pos` tokens are faster as one microbatch than as several; on a CPU none are."""
    return 1 if jax.default_backend() == "cpu" else max(1, ACCELERATOR_TOKENS // pos)


def first(size: int, tree: Any, parts: int) -> Any:
    """Returns arrays without the padding that made a batch of `size` divisible."""
    return _cut_to(size, tree) if size % parts and jax.tree.leaves(tree) else tree


@jit(static_argnums=0)
def _cut_to(size: int, tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[:size], tree)


def joined(results: Sequence[Any]) -> Any:
    """Puts the results of microbatches together along the batch axis."""
    return results[0] if len(results) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *results)


def check_batch_axis(block: Callable[..., Any], x: Float[Array, "batch pos embed"], inputs: Any) -> None:
    """Refuses a reducer whose results cannot be joined: the batch has to be their first axis, and no other.

    Raises:
      JaxqkvError: if it is not, or if another axis changes with the size of the batch.
    """
    others = []
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
        others.append([leaf.shape[1:] for leaf in jax.tree.leaves(result)])
    if others[0] != others[1]:
        raise JaxqkvError(
            "the batch is cut to fit `memory` or filled up for the mesh, so `reduce` must treat each sequence by "
            "itself; an array that it returns has the batch as a further axis"
        )


def check_same(whole: Any, other: Any, layers: Sequence[int], what: str) -> None:
    """Refuses a reducer whose results `[layer, batch, …]` change when it is run in another way.

    Whole numbers are compared exactly, others to the rounding of their dtype. An array whose shape differs, such as one
    with an axis of positions, is left out.

    Raises:
      JaxqkvError: naming the array, the layer and the largest difference; `what` says what the reducer depends on.
    """
    for (path, one), two in zip(jax.tree_util.tree_leaves_with_path(whole), jax.tree.leaves(other), strict=True):
        if one.shape != two.shape:
            continue
        exact = not jnp.issubdtype(one.dtype, jnp.inexact)
        limit = 0.0 if exact else min(float(jnp.finfo(one.dtype).eps) * SAME, LARGEST_SAME)
        wide = np.complex128 if jnp.iscomplexobj(one) else np.float64
        one, two = (np.nan_to_num(np.asarray(each).astype(wide), posinf=0, neginf=0) for each in (one, two))
        for layer, before, after in zip(layers, one, two, strict=True):
            difference, scale = np.abs(before - after).max(initial=0), np.abs(before).max(initial=0)
            if difference > limit * max(scale, np.abs(after).max(initial=0)):
                name = jax.tree_util.keystr(path) or "its result"
                raise JaxqkvError(
                    f"`reduce` depends on {what}: {name} of layer {layer} differs by {difference:.2g}, at values up "
                    f"to {scale:.2g}; it must treat each sequence by itself and leave pads out with the mask"
                )
