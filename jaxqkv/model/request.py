"""`Request`: what is asked of a run, as one value."""

import dataclasses
import operator
from collections.abc import Callable, Collection, Iterable, Set
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxqkv.architectures.activations import FIELDS, OUTPUTS
from jaxqkv.architectures.base import Architecture
from jaxqkv.errors import JaxqkvError, nearest
from jaxqkv.model import editing
from jaxqkv.model.reducers import Bound, Reducer
from jaxqkv.runtime.arrays import is_concrete, snapshot
from jaxqkv.runtime.sizes import memory_limit
from jaxqkv.text.batches import Batch
from jaxqkv.typing import AnyArray

# A layer's number, or several: a list, a range, a set, a generator, an array.
Layers = SupportsIndex | Iterable[SupportsIndex] | AnyArray
# Names in TransformerLens and transformers → ours; TransformerLens' prefix `hook_` is removed first.
OTHER_NAMES = {
    "attn_scores": "scores",
    "result": "z",
    "query": "q",
    "key": "k",
    "value": "v",
    "attention": "pattern",
    "attentions": "pattern",
    "attention_probs": "pattern",
    "attn_weights": "pattern",
    "hidden_states": "resid_pre",
    "last_hidden_state": "hidden",
    "normalized": "hidden",
}
# Called with the number of microbatches done and the number of all in a run.
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Request:
    """A run's settings; `of` makes them from the keywords of `forward` and checks them.

    Attributes:
      capture: fields of layers to return; none with `reduce`.
      outputs: outputs of the whole model to return.
      layers: layers to return; if none, all are run, for the residual stream after the last.
      reduce: reducer of each layer, instead of `capture`.
      edit: edits by field.
      inputs: arrays `[batch, …]` for `reduce` and for edits.
      memory: bytes that the temporaries of a block may take.
      progress: called after each microbatch.
      mesh: the devices, if there are several.
      check: whether to run the reducer first on single sequences and with a further pad.
    """

    capture: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()
    layers: tuple[int, ...] = ()
    reduce: Bound | None = None
    edit: editing.Placed | None = None
    inputs: Any = None
    memory: int | None = None
    progress: Progress | None = None
    mesh: Mesh | None = None
    check: bool = False

    @classmethod
    def of(
        cls,
        config: Architecture,
        batch: Batch,
        capture: Collection[str] | None,
        layers: Layers | None,
        reduce: Reducer | None = None,
        edit: editing.Edits | None = None,
        inputs: Any = None,
        memory: float | str | None = None,
        **others: Any,
    ) -> "Request":
        """Checks what is asked of a model and a batch.

        Raises:
          JaxqkvError: on names and layers that do not exist, invalid edits, and inputs that do not fit the batch.
        """
        if others.get("check") and (reduce is None or edit is not None):
            raise JaxqkvError(
                "`check` needs `reduce`" if reduce is None else "`check` and `edit` cannot be combined; leave one out"
            )
        _check_inputs(inputs, reduce, edit, len(batch.ids))
        names, selected = _checked_capture(capture, reduce), checked_layers(layers, config.n_layer)
        selected = selected if reduce or names & set(FIELDS) else ()
        return cls(
            names & set(FIELDS),
            names & set(OUTPUTS),
            selected,
            None if reduce is None else Bound(reduce),
            editing.place(edit, batch, config, () if names & set(OUTPUTS) else selected),
            snapshot(inputs),
            memory_limit(memory),
            **others,
        )

    @classmethod
    def of_all_layers(
        cls,
        config: Architecture,
        batch: Batch,
        edit: editing.Edits | None = None,
        inputs: Any = None,
        memory: float | str | None = None,
        mesh: Mesh | None = None,
    ) -> "Request":
        """Returns a request for the residual stream after the last layer.

        Raises:
          JaxqkvError: on invalid edits, and inputs that do not fit the batch.
        """
        _check_inputs(inputs, None, edit, len(batch.ids))
        placed = editing.place(edit, batch, config, ())
        return cls(edit=placed, inputs=snapshot(inputs), memory=memory_limit(memory), mesh=mesh)


def _checked_capture(capture: Collection[str] | None, reduce: Reducer | None) -> frozenset[str]:
    if reduce is not None and not callable(reduce):
        raise JaxqkvError(f"`reduce` is a function of one layer's Attention and the mask, not {reduce!r}")
    if capture is None:
        return frozenset() if reduce else frozenset("qkv")
    capture = frozenset([capture] if isinstance(capture, str) else capture)
    if unknown := sorted(capture - {*FIELDS, *OUTPUTS}):
        raise JaxqkvError(f"cannot capture {unknown[0]}; {nearest(_own_name(unknown[0]), (*FIELDS, *OUTPUTS))}")
    if bool(capture) == bool(reduce):
        raise JaxqkvError("give exactly one of `capture`, names of what to return, and `reduce`, a function")
    return capture


def _own_name(name: str) -> str:
    """Returns this package's name for a field, given perhaps another library's name."""
    bare = name.rpartition(".")[2].removeprefix("hook_")
    return OTHER_NAMES.get(bare, bare)


def checked_layers(layers: Layers | None, n_layer: int) -> tuple[int, ...]:
    """Returns the layers in the order given; those of a set, which has no order, ascending.

    Raises:
      JaxqkvError: for layers that do not exist, are not numbers or are named twice.
    """
    if layers is None:
        return tuple(range(n_layer))
    if isinstance(layers, jax.Array) and is_concrete(layers):
        layers = np.asarray(layers)  # its elements are concrete inside `jax.jit` too
    single = isinstance(layers, str) or not isinstance(layers, Iterable) or getattr(layers, "ndim", 1) == 0
    several: Any = [layers] if single else layers
    given: list[Any] = list(several)
    if any(isinstance(layer, bool) or str(getattr(layer, "dtype", "")) == "bool" for layer in given):
        raise JaxqkvError("layers are numbers, not a boolean mask; `numpy.flatnonzero` gives those of a mask")
    try:
        selected = tuple(operator.index(layer) for layer in given)
    except TypeError:
        raise JaxqkvError(f"layers are whole numbers, not {layers if single else given!r}") from None
    bad = [layer for layer in selected if not 0 <= layer < n_layer]
    if bad or not selected:
        wrong = f"no layer {', '.join(map(str, bad))}" if bad else "no layer selected"
        raise JaxqkvError(f"{wrong}; the model's layers are 0 to {n_layer - 1}")
    if repeated := sorted({layer for layer in selected if selected.count(layer) > 1}):
        raise JaxqkvError(f"layers names {', '.join(map(str, repeated))} more than once; name each layer once")
    return tuple(sorted(selected)) if isinstance(layers, Set) else selected


def _check_inputs(inputs: Any, reduce: Reducer | None, edit: editing.Edits | None, size: int) -> None:
    if inputs is None:
        return
    if reduce is None and edit is None:
        raise JaxqkvError("`inputs` needs `reduce` or `edit`")
    wrong = [jnp.shape(leaf) for leaf in jax.tree.leaves(inputs) if jnp.shape(leaf)[:1] != (size,)]
    if wrong:
        raise JaxqkvError(f"the first axis of `inputs` must be the batch of {size}; one array is {list(wrong[0])}")
