"""The first-order approximation of a sweep: Σ (edited value − value) · ∂metric/∂value, from one backward pass.

Layers are differentiated one after another, from the last to the first, and each layer's weights are read again; only
one residual stream a layer stays in memory.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxqkv.architectures.base import Architecture, Params
from jaxqkv.architectures.sites import Editing
from jaxqkv.errors import JaxqkvError
from jaxqkv.metrics import Metric
from jaxqkv.model.branches import Branches
from jaxqkv.model.driver import site_of
from jaxqkv.model.sources import Source
from jaxqkv.model.sweep import Passes, Sweep, measure
from jaxqkv.runtime.devices import Execution, jit
from jaxqkv.text.batches import Batch


@jit(static_argnames=("config", "execution", "count"))
def _pull_back(
    params: Params,
    x: Any,
    mask: Any,
    cotangents: Any,
    branches: Branches,
    layer: Any,
    start: Any,
    *,
    config: Architecture,
    execution: Execution,
    count: int,
) -> tuple[Any, Any]:
    """Returns gradients by the stream that enters a layer, `[metric, …]`, and the contributions of `count` branches.

    Args:
      cotangents: gradients by the stream that leaves the layer, `[metric, batch, pos, embed]`.
      params, x, mask, branches, layer, start, config, execution, count: as for `_branch_off`.

    Returns:
      Gradients; and contributions Σ (edited value − value) · gradient by the value, `[metric, branch, batch]`.
    """
    site, field = site_of(layer, mask, config), branches.field

    def run(x: Any, added: Any) -> tuple[Any, Any]:
        """Returns the stream after the layer and the field's value; differentiated by `added`, which is 0."""
        edit = {} if added is None else {field: (lambda value, site: value + added,)}
        after, attention = config.block(params, x, site.visible, layer, execution, Editing(edit, site))
        return after, getattr(attention, field)

    shape = jax.eval_shape(lambda: run(x, None)[1])
    _, pull, value = jax.vjp(run, x, jnp.zeros(shape.shape, shape.dtype), has_aux=True)
    by_stream, by_value = jax.vmap(pull)(cotangents)

    def contribution(edit: Any) -> Any:
        difference = branches.changed(edit, value, config, site, start) - value
        return (by_value * difference[None]).sum(range(2, by_value.ndim))

    return by_stream, branches.map_one_by_one(contribution, count).swapaxes(0, 1)


@jit(static_argnames="config")
def _of_output(
    final: Params,
    head: Params | None,
    metrics: Mapping[str, Metric],
    places: Mapping[str, Any],
    stream: Any,
    *,
    config: Architecture,
) -> tuple[Any, Any]:
    """Returns the metrics of the clean run, `[batch]`, and their gradients by the last stream, `[metric, …]`."""

    def run(stream: Any) -> tuple[Any, Any]:
        found = measure(final, head, metrics, places, None, [stream], config=config, count=1)
        leaves = [leaf[0] for leaf in jax.tree.leaves(found)]
        if any(leaf.ndim != 1 for leaf in leaves):
            raise JaxqkvError('method="gradient" takes metrics that are one number for each text; use method="exact"')
        return jnp.stack([leaf.sum() for leaf in leaves]), jax.tree.map(lambda leaf: leaf[0], found)

    sums, pull, values = jax.vjp(run, stream, has_aux=True)
    (gradients,) = jax.vmap(pull)(jnp.eye(len(sums), dtype=sums.dtype))
    return values, gradients


def first_order(source: Source, batch: Batch, config: Architecture, sweep: Sweep) -> dict[str, Any]:
    """Returns the clean metrics plus their first-order changes, `[branch, batch]`, of every branch.

    Raises:
      JaxqkvError: for a divergence, whose gradient is 0, and for a metric that is not one number for each text.
    """
    if any(metric.of_clean for metric in sweep.metrics.values()):
        raise JaxqkvError(
            'the gradient of a divergence from the clean run is 0 there, so method="gradient" cannot measure it; use '
            'method="exact"'
        )
    passes = Passes(source, batch, config, sweep)
    streams, pieces = [passes.clean], range(len(passes.pieces))
    lowest, done, total = min(sweep.layers), 0, 2 * config.n_layer - min(sweep.layers)

    def step() -> None:
        nonlocal done
        done += 1
        if sweep.progress:
            sweep.progress(done, total)

    for layer in range(config.n_layer):
        params = source.layer(layer, after=streams[-1])
        streams.append([passes.block(params, layer, streams[-1][piece], passes.masks[piece]) for piece in pieces])
        step()
    source.check(list(streams[-1]), config.n_layer, made=True)
    ends = [_of_output(*passes.readout.arguments(passes.pieces[p]), streams[-1][p], config=config) for p in pieces]
    gradients = [each[1] for each in ends]
    shape = (len(gradients[0]), len(sweep.layers), len(batch.ids))
    changes = np.zeros(shape, gradients[0].dtype)
    for layer in reversed(range(lowest, config.n_layer)):
        numbers = passes.of_layer.get(layer, np.zeros(1, int))  # for a layer that is not swept, one branch, unused
        params = source.layer(layer, after=gradients)
        for piece, part in enumerate(passes.pieces):
            gradients[piece], sums = _pull_back(
                params,
                streams[layer][piece],
                passes.masks[piece],
                gradients[piece],
                sweep.branches.chosen(numbers),
                np.int32(layer),
                np.int32(part.start),
                config=config,
                execution=passes.how,
                count=len(numbers),
            )
            if layer in passes.of_layer:
                changes[:, numbers, part] = sums
        streams[layer + 1] = []
        step()
    values = jax.tree.map(lambda *leaves: np.concatenate(leaves), *(each[0] for each in ends))
    leaves, structure = jax.tree.flatten(values)
    return jax.tree.unflatten(structure, [leaf + change for leaf, change in zip(leaves, changes, strict=True)])
