"""Opens the checkpoints that a study's options name."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jax.sharding import Mesh

from jaxqkv.architectures import open_checkpoint
from jaxqkv.checkpoints.checkpoint import BUNDLED, Checkpoint, as_path, is_path
from jaxqkv.checkpoints.weights import Weights
from jaxqkv.errors import JaxqkvError
from jaxqkv.model.loading import load
from jaxqkv.model.model import Model
from jaxqkv.runtime.devices import make_mesh
from jaxqkv.studies.options import Options

# Options that are decided when a model is loaded, the first of them when a checkpoint is opened.
LOADING = ("revision", "dtype", "tokenizer", "devices", "mesh")


@runtime_checkable
class Defaults(Protocol):
    """The part of a study with its default checkpoints."""

    name: str
    models: tuple[str, ...]
    demo: str


def refuse_decided(model: Any, given: Mapping[str, Any]) -> None:
    """Refuses options of a call from Python that were decided when the checkpoint or model was opened.

    Raises:
      JaxqkvError: naming the option.
    """
    for each in model if isinstance(model, list | tuple) else [model]:
        decided = LOADING if isinstance(each, Model) else LOADING[:1] if isinstance(each, Checkpoint) else ()
        for name in decided:
            if given.get(name) is not None:
                raise JaxqkvError(f"{name} was decided when the checkpoint or model was opened; leave it out")


def chosen(options: Options, study: Defaults) -> tuple[Any, ...]:
    """Returns the checkpoints to draw, as names or open: those given, the bundled one, or the study's own."""
    return (study.demo,) if options.demo else options.model or study.models


def is_demo(checkpoint: Checkpoint, study: Defaults) -> bool:
    """Tells whether a checkpoint is the bundled one of a study, or a fresh one like it, however it is named."""
    base = checkpoint.spec.removeprefix("random:")
    folder = BUNDLED[study.demo].resolve()
    return base == study.demo or (base not in BUNDLED and is_path(base) and as_path(base).resolve() == folder)


def open_weights(options: Options, study: Defaults) -> list[Weights]:
    """Returns the weights of every checkpoint to draw; headers are read, no tensors."""
    return [_weights(spec, options, options.revision) for spec in chosen(options, study)]


def open_compared(options: Any, default: Sequence[str] = ()) -> list[Weights]:
    """Returns the weights of the `--compare` checkpoints; NAME@REVISION on the hub."""
    opened = []
    for spec in options.compare or default:
        revision = ""
        if isinstance(spec, str) and not Path(spec).exists():
            spec, _, revision = spec.partition("@")
        opened.append(_weights(spec, options, revision or None))
    return opened


def _weights(spec: Any, options: Options, revision: str | None) -> Weights:
    """Returns weights in float32, whatever the dtype of a model's arithmetic."""
    spec = spec.checkpoint if isinstance(spec, Model) else spec
    return Weights(open_checkpoint(spec, revision=revision, seed=options.seed))


def load_model(options: Any, study: Defaults, stream: bool | None = True) -> Model:
    """Returns the study's model, for studies that take one; read layer by layer. `stream` as for `load`."""
    specs = chosen(options, study)
    if len(specs) > 1:
        names = [getattr(getattr(each, "checkpoint", each), "spec", each) for each in specs]
        raise JaxqkvError(f"{study.name} draws one checkpoint at a time, not {', '.join(names)}")
    if isinstance(specs[0], Model):
        return specs[0]
    return load(
        specs[0],
        revision=options.revision,
        seed=options.seed,
        dtype=options.dtype,
        stream=stream,
        tokenizer=options.tokenizer,
        mesh=_mesh(options),
    )


def wide_weights(model: Model) -> Weights:
    """Returns the weights of a model in float32: its own, if that is its dtype."""
    own = model.weights
    return own if own.dtype == np.float32 else Weights(model.checkpoint)


def wide_model(model: Model) -> Model:
    """Returns a model that runs in float32: itself, where that is its dtype."""
    if model.weights.dtype == np.float32:
        return model
    return Model(model.checkpoint, dtype=np.float32, stream=True, mesh=model.mesh)


def _mesh(options: Any) -> Mesh | None:
    """Returns the devices that `--devices` or `--mesh` name; None for a single device."""
    mesh, devices = getattr(options, "mesh", None), getattr(options, "devices", None)
    if mesh is not None:
        return make_mesh(**mesh)
    if devices is None:
        return None
    return make_mesh(None if devices == "all" else devices)
