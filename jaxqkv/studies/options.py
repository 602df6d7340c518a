"""What the studies share: opening the checkpoints asked for, and the nearest of what the originals name."""

import argparse
import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh
from jaxtyping import Array, Float
from tqdm import tqdm

from jaxqkv import arguments
from jaxqkv.checkpoint import Checkpoint, open_checkpoint
from jaxqkv.devices import make_mesh
from jaxqkv.errors import JaxqkvError
from jaxqkv.figures import style
from jaxqkv.figures.panels import plain
from jaxqkv.figures.registry import nearest
from jaxqkv.model import Model, load
from jaxqkv.streaming import Arena, read_after, to_device
from jaxqkv.text.reading import read_lines
from jaxqkv.weights import Weights

if TYPE_CHECKING:
    from jaxqkv.figures.registry import Study


# What is decided when a model is loaded; the first when a checkpoint is opened.
LOADING = ("revision", "dtype", "tokenizer", "devices", "mesh")


def from_keywords(study: "Study", model: Any, given: Mapping[str, Any]) -> argparse.Namespace:
    """The options of a call from Python: the command's own, with its defaults, types and checks.

    Args:
      study: what is drawn; only the options that it takes are known.
      model: a spec, a `Checkpoint`, a `Model`, several of them, or None for the study's own.
      given: values by the options' Python names; None is as if it were not there.
    """
    names = [name for name in study.options if name in arguments.STUDY_OPTIONS and name != "resume"]
    known = arguments.COMMON_OPTIONS | {name: arguments.STUDY_OPTIONS[name] for name in names}
    options = arguments.parse(["figures", study.name])
    options.out = None  # nothing is written
    for name, value in given.items():
        if name not in known:
            raise JaxqkvError(f"{study.name} takes no option {name}; {nearest(name, known)}")
        if value is not None:
            setattr(options, name, _checked(name, value, known[name]))
    if model is not None:
        options.model = [_one("model", each, {}) for each in _several("model", model)]
    for each in options.model or ():
        decided = LOADING if isinstance(each, Model) else LOADING[:1] if isinstance(each, Checkpoint) else ()
        for name in decided:
            if given.get(name) is not None:
                raise JaxqkvError(f"{name} is decided already for a checkpoint or model that is open; leave it out")
    return options


def _checked(name: str, value: Any, rule: Mapping[str, Any]) -> Any:
    """A value as the command's parser would have it; `rule` is what the parser was told of the option."""
    if rule.get("action") == "store_true":
        if not isinstance(value, bool):
            raise JaxqkvError(f"{name} is True or False, not {value!r}")
        return value
    if name == "sentences" and not isinstance(value, str | os.PathLike):  # a list, where the command takes a file
        return [_one(name, each, {}) for each in _several(name, value)]
    if rule.get("nargs") == "+" or rule.get("action") == "append":
        return [_one(name, each, rule) for each in _several(name, value)]
    return _one(name, value, rule)


def _one(name: str, value: Any, rule: Mapping[str, Any]) -> Any:
    if name in ("model", "compare") and isinstance(value, Checkpoint | Model):
        return value
    if isinstance(value, Mapping):  # of a mesh
        value = ",".join(f"{key}={size}" for key, size in value.items())
    convert = rule.get("type")
    try:
        value = os.fspath(value) if convert is None else convert(str(value))
    except argparse.ArgumentTypeError as error:
        raise JaxqkvError(f"{name}: {error}") from None
    except (TypeError, ValueError):
        raise JaxqkvError(f"{name} cannot be {value!r}; `jaxqkv figures --help` says what it takes") from None
    if "choices" in rule and value not in rule["choices"]:
        raise JaxqkvError(f"{name} is one of {', '.join(rule['choices'])}, not {value!r}")
    return value


def _several(name: str, value: Any) -> list[Any]:
    """One or many as a list, which is not empty."""
    try:
        values = [value] if isinstance(value, str | os.PathLike | Checkpoint | Model) else list(value)
    except TypeError:
        raise JaxqkvError(f"{name} cannot be {value!r}; `jaxqkv figures --help` says what it takes") from None
    if not values:
        raise JaxqkvError(f"{name} is empty")
    return values


def specs(options: argparse.Namespace, study: "Study") -> tuple[Any, ...]:
    """The checkpoints to draw: `--model`, the bundled one with `--demo`, or the study's own.

    Names on the command line; from Python also what is open already.
    """
    if options.demo and options.model:
        raise JaxqkvError("--demo and --model exclude each other")
    return (study.demo,) if options.demo else tuple(options.model or study.models)


def _weights(spec: Any, options: argparse.Namespace, revision: str | None) -> Weights:
    """In float32, whatever the dtype of a model's arithmetic."""
    spec = spec.checkpoint if isinstance(spec, Model) else spec
    return Weights(open_checkpoint(spec, revision=revision, seed=options.seed))


def open_weights(options: argparse.Namespace, study: "Study") -> list[Weights]:
    """The weights of every checkpoint asked for; headers are read, no tensors."""
    return [_weights(spec, options, options.revision) for spec in specs(options, study)]


def open_compared(options: argparse.Namespace, default: Sequence[str] = ()) -> list[Weights]:
    """The weights that `--compare` sets beside those of the study; of the hub's, NAME@REVISION."""
    opened = []
    for spec in options.compare or default:
        revision = ""
        if isinstance(spec, str) and not Path(spec).exists():
            spec, _, revision = spec.partition("@")
        opened.append(_weights(spec, options, revision or None))
    return opened


def load_model(options: argparse.Namespace, study: "Study", stream: bool | None = True) -> Model:
    """The one checkpoint of a study of activations, read layer by layer; `stream` as for `load`."""
    chosen = specs(options, study)
    if len(chosen) > 1:
        names = [getattr(getattr(each, "checkpoint", each), "spec", each) for each in chosen]
        raise JaxqkvError(f"{study.name} draws one checkpoint at a time, not {', '.join(names)}")
    if isinstance(chosen[0], Model):
        return chosen[0]
    return load(
        chosen[0],
        revision=options.revision,
        seed=options.seed,
        dtype=options.dtype or "float32",
        stream=stream,
        tokenizer=options.tokenizer,
        mesh=_mesh(options),
    )


def _mesh(options: argparse.Namespace) -> Mesh | None:
    """The devices that `--devices` or `--mesh` name; None for one."""
    if options.devices is not None and options.mesh is not None:
        raise JaxqkvError("--devices and --mesh exclude each other: --devices N is --mesh data=N")
    if options.mesh is not None:
        return make_mesh(**options.mesh)
    if options.devices is None:
        return None
    return make_mesh(None if options.devices == "all" else options.devices)


def stimuli(name: str) -> list[str]:
    """The lines of a data file of the package, without its heading."""
    return [line for line in read_lines(Path(__file__).parent / name) if line and not line.startswith("#")]


def nearest_indices(wanted: Sequence[int], size: int, original_size: int) -> list[int]:
    """The original's indices where the last exists, else those at the same fractions of the range, all of them."""
    return list(wanted) if max(wanted) < size else [index * size // original_size for index in wanted]


def nearest_index(wanted: int, size: int, original_size: int) -> int:
    """`nearest_indices` of one."""
    return nearest_indices([wanted], size, original_size)[0]


class OfOneLayer:
    """A run that shows one layer of one checkpoint: what captions and titles call it."""

    name: str
    layer: int

    @property
    def where(self) -> str:
        """For a caption."""
        return f"layer {self.layer} of {self.name}"

    @property
    def label(self) -> str:
        """The checkpoint, for a title."""
        return plain(self.name)

    @property
    def heading(self) -> str:
        """Both, for a title."""
        return f"Layer {self.layer} of {self.label}"


@dataclasses.dataclass
class Compared:
    """One checkpoint of a comparison: the first, of order 0, or one that is set beside it."""

    weights: Weights
    name: str
    order: int
    wanted_layer: int
    reductions: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def suffix(self) -> str:
        """What its arrays' names end with; nothing for the first."""
        return f"_{self.name}" if self.order else ""

    @property
    def line(self) -> style.LineStyle:
        """How its curves are drawn."""
        return style.LINES[self.order % len(style.LINES)]

    @property
    def layer(self) -> int:
        """The layer that is drawn, or the last one where there are fewer."""
        return min(self.wanted_layer, self.weights.config.n_layer - 1)


def beside(names: Sequence[str]) -> str:
    """The checkpoints of a comparison, for a caption."""
    first, *others = names
    return f"{first}, beside {', '.join(others)}" if others else first


def reduce_layers(
    weights: Weights,
    layers: Sequence[int],
    reduce: Callable[[int, Float[Array, "embed three_embed"]], Any],
    progress: tqdm,
) -> list[Any]:
    """`reduce(layer, W_Q W_K W_V side by side)` of each layer, with one layer's matrices in memory at a time."""
    arena = Arena()
    results: list[Any] = []
    for layer in layers:
        wide = read_after(results[-1:], lambda: to_device(weights.W_QKV(layer), arena))  # noqa: B023
        results.append(reduce(layer, wide))
        progress.update()
    return results


def short_names(weights: Sequence[Weights]) -> list[str]:
    """A name for each checkpoint, fit for titles and array names: a folder's last part; never twice."""
    names: list[str] = []
    for each in weights:
        name = base = each.checkpoint.name
        number = 1
        while name in names:
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return names


def pick_layer(options: argparse.Namespace, wanted: int, n_layer: int, name: str) -> tuple[int, str]:
    """`--layer`, else the original's layer, else the middle one; and what the caption says of it."""
    if options.layer is not None:
        if not 0 <= options.layer < n_layer:
            raise JaxqkvError(f"--layer {options.layer}: the layers of {name} are 0 to {n_layer - 1}")
        return options.layer, ""
    if wanted < n_layer:
        return wanted, ""
    return n_layer // 2, f" ({name} has no layer {wanted} as in the original; the middle one is drawn.)"
