"""`Model.sweep` and `Model.measure`: checks of the arguments, and means over texts."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxqkv.architectures.base import Architecture
from jaxqkv.errors import JaxqkvError
from jaxqkv.metrics import Metric, as_metric
from jaxqkv.model.attribution import first_order
from jaxqkv.model.branches import EditOfHeads, branches
from jaxqkv.model.driver import run_layers
from jaxqkv.model.microbatches import joined
from jaxqkv.model.reducers import Bound
from jaxqkv.model.request import Layers, Progress, Request, checked_layers
from jaxqkv.model.sources import Source
from jaxqkv.model.sweep import Readout, Sweep, exact
from jaxqkv.runtime import console
from jaxqkv.runtime.sizes import memory_limit
from jaxqkv.text.batches import Batch

METHODS = {"exact": exact, "gradient": first_order}
# A metric, or several by name.
Metrics = Any


def sweep_heads(
    source: Source,
    batch: Batch,
    config: Architecture,
    edit: EditOfHeads,
    metric: Metrics,
    *,
    field: str,
    layers: Layers | None,
    by_position: bool,
    per_text: bool,
    method: str,
    memory: float | str | None,
    mesh: Mesh | None,
    progress: Progress | bool,
) -> Any:
    """Returns what `Model.sweep` returns."""
    if method not in METHODS:
        raise JaxqkvError(f"method is one of {', '.join(METHODS)}, not {method!r}")
    metrics, single = _named(metric)
    selected = checked_layers(layers, config.n_layer)
    ascending = sorted(selected)
    every = branches(edit, field, ascending, batch, config, by_position)
    each = config.n_head * (batch.ids.shape[1] if by_position else 1)
    of_branch = tuple(np.repeat(ascending, each).tolist())
    with _said(progress) as say:
        sweep = Sweep(every, of_branch, metrics, memory_limit(memory), mesh, say)
        found = METHODS[method](source, batch, config, sweep)
    order = [ascending.index(layer) for layer in selected]
    axes = (len(ascending), config.n_head, *([batch.ids.shape[1]] if by_position else []))
    mask = np.asarray(batch.mask) if by_position else None

    def arranged(leaf: Any) -> Any:
        leaf = leaf.reshape(*axes, *leaf.shape[1:])[order]
        leaf = np.moveaxis(leaf, len(axes), 0)  # [text, layer, head(, pos), …]
        return leaf if per_text else _mean(leaf, mask)

    found = jax.tree.map(arranged, found)
    return found["metric"] if single else found


def measure_run(
    source: Source, batch: Batch, config: Architecture, metric: Metrics, per_text: bool, request: Request
) -> Any:
    """Returns what `Model.measure` returns."""
    metrics, single = _named(metric)
    readout = Readout(source, config, metrics, batch)

    def final(request: Request) -> Any:
        stream: Any = ()
        for step in run_layers(source, batch, config, request):
            stream = step.stream
        return joined(stream)

    clean = final(Request(memory=request.memory, mesh=request.mesh)) if readout.of_clean else None
    found = jax.tree.map(lambda leaf: leaf[0], readout([final(request)], clean, slice(0, len(batch.ids)), 1))
    found = found if per_text else jax.tree.map(lambda leaf: _mean(leaf, None), found)
    return found["metric"] if single else found


@contextlib.contextmanager
def _said(progress: Progress | bool) -> Iterator[Progress | None]:
    """Gives the callback for progress: the caller's, or with True one that draws a bar."""
    if progress is not True:
        yield progress or None
        return
    with console.counting_bar(total=0, desc="branches") as show:
        yield show


def _named(metric: Metrics) -> tuple[dict[str, Metric], bool]:
    """Returns metrics by name, and whether a single one was given without a name."""

    def bound(given: Any) -> Metric:
        metric = as_metric(given)
        return dataclasses.replace(metric, function=Bound(metric.function, "the metric"))

    if not isinstance(metric, Mapping):
        return {"metric": bound(metric)}, True
    if not metric:
        raise JaxqkvError("no metric is given; see jaxqkv.metrics")
    return {str(name): bound(each) for name, each in metric.items()}, False


def _mean(leaf: Any, mask: Any) -> Any:
    """Returns the mean over texts; at a position, over the texts that have a token there, NaN if none has."""
    if mask is None:
        return leaf.mean(0)
    real = mask[:, None, None, :].reshape(len(mask), 1, 1, -1, *[1] * (leaf.ndim - 4))
    with np.errstate(invalid="ignore"):
        return np.where(real, leaf, 0).sum(0) / np.broadcast_to(real, leaf.shape).sum(0)
