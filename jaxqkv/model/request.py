"""`Request`: what is asked of a run, as one value."""

import dataclasses
import operator
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxqkv.architectures.activations import FIELDS
from jaxqkv.errors import JaxqkvError

# One layer's attention, the mask, and `inputs` when there are any → what is kept of the layer.
Reducer = Callable[..., Any]
# Microbatches done, of all of a run.
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a run; `of` makes one of the keywords of `forward` and checks them.

    Attributes:
      capture: names of the fields to return; none with `reduce`.
      layers: the layers to return; with none all are run, for the residual stream after the last.
      reduce: what is kept of a layer instead.
      inputs: arrays `[batch, …]` for `reduce`.
      memory: bytes that the temporaries of a block may take.
      progress: called after each microbatch.
      mesh: the devices, if there are several.
    """

    capture: frozenset[str] = frozenset()
    layers: tuple[int, ...] = ()
    reduce: Reducer | None = None
    inputs: Any = None
    memory: int | None = None
    progress: Progress | None = None
    mesh: Mesh | None = None

    @classmethod
    def of(
        cls,
        n_layer: int,
        batch_size: int,
        capture: Collection[str] | None,
        layers: int | Iterable[int] | None,
        reduce: Reducer | None = None,
        inputs: Any = None,
        **others: Any,
    ) -> "Request":
        """Checks what is asked of a model of `n_layer` layers and a batch.

        Raises:
          JaxqkvError: on names and layers that do not exist, and inputs that do not go with the batch.
        """
        if inputs is not None:
            _check_inputs(inputs, reduce, batch_size)
        return cls(_checked_capture(capture, reduce), _checked_layers(layers, n_layer), reduce, inputs, **others)


def _checked_capture(capture: Collection[str] | None, reduce: Reducer | None) -> frozenset[str]:
    if reduce is not None and not callable(reduce):
        raise JaxqkvError(f"`reduce` is a function of one layer's Attention and the mask, not {reduce!r}")
    if capture is None:
        return frozenset() if reduce else frozenset("qkv")
    capture = frozenset([capture] if isinstance(capture, str) else capture)
    unknown = sorted(capture - set(FIELDS))
    if unknown:
        raise JaxqkvError(f"cannot capture {', '.join(unknown)}; there is {', '.join(FIELDS)}")
    if bool(capture) == bool(reduce):
        raise JaxqkvError("give exactly one of `capture`, names of what to return, and `reduce`, a function")
    return capture


def _checked_layers(layers: int | Iterable[int] | None, n_layer: int) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(n_layer))
    try:
        selected = tuple(sorted({operator.index(layer) for layer in np.atleast_1d(np.asarray(layers)).tolist()}))
    except (TypeError, ValueError):
        raise JaxqkvError(f"layers are whole numbers, not {layers!r}") from None
    bad = [layer for layer in selected if not 0 <= layer < n_layer]
    if bad or not selected:
        wrong = f"no layer {', '.join(map(str, bad))}" if bad else "no layer selected"
        raise JaxqkvError(f"{wrong}; the model's layers are 0 to {n_layer - 1}")
    return selected


def _check_inputs(inputs: Any, reduce: Reducer | None, size: int) -> None:
    if reduce is None:
        raise JaxqkvError("`inputs` are for `reduce`, and none is given")
    wrong = [jnp.shape(leaf) for leaf in jax.tree.leaves(inputs) if jnp.shape(leaf)[:1] != (size,)]
    if wrong:
        raise JaxqkvError(f"`inputs` have the batch of {size} as their first axis; one of them is {list(wrong[0])}")
