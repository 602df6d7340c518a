"""What the studies share: opening the checkpoints asked for, and the nearest of what the seed names."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh
from jaxtyping import Array, Float
from tqdm import tqdm

from jaxqkv.checkpoint import open_checkpoint
from jaxqkv.devices import make_mesh
from jaxqkv.errors import JaxqkvError
from jaxqkv.figures import style
from jaxqkv.model import Model, load
from jaxqkv.streaming import Arena, read_after, to_device
from jaxqkv.weights import Weights

if TYPE_CHECKING:
    from jaxqkv.figures.registry import Study


def specs(options: argparse.Namespace, study: "Study") -> tuple[str, ...]:
    """The checkpoints to draw: `--model`, the bundled one with `--demo`, or the study's own."""
    if options.demo and options.model:
        raise JaxqkvError("--demo and --model exclude each other")
    return (study.demo,) if options.demo else tuple(options.model or study.models)


def open_weights(options: argparse.Namespace, study: "Study") -> list[Weights]:
    """The weights of every checkpoint asked for; headers are read, no tensors."""
    checkpoints = [open_checkpoint(s, revision=options.revision, seed=options.seed) for s in specs(options, study)]
    return [Weights(checkpoint) for checkpoint in checkpoints]


def open_compared(options: argparse.Namespace, default: Sequence[str] = ()) -> list[Weights]:
    """The weights that `--compare` sets beside those of the study; of the hub's, NAME@REVISION."""
    opened = []
    for spec in options.compare or default:
        name, _, revision = (spec, "", "") if Path(spec).exists() else spec.partition("@")
        opened.append(Weights(open_checkpoint(name, revision=revision or None, seed=options.seed)))
    return opened


def load_model(options: argparse.Namespace, study: "Study", stream: bool | None = True) -> Model:
    """The one checkpoint of a study of activations, read layer by layer; `stream` as for `load`."""
    chosen = specs(options, study)
    if len(chosen) > 1:
        raise JaxqkvError(f"{study.name} draws one checkpoint at a time, not {', '.join(chosen)}")
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
    text = (Path(__file__).parent / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def read_text(path: Path) -> str:
    """A text file of the user's."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise JaxqkvError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise JaxqkvError(f"{path}: not UTF-8 text (byte {error.start})") from None


def nearest_indices(wanted: Sequence[int], size: int, seed_size: int) -> list[int]:
    """The seed's indices where the last exists, else those at the same fractions of the range, all of them."""
    return list(wanted) if max(wanted) < size else [index * size // seed_size for index in wanted]


def nearest_index(wanted: int, size: int, seed_size: int) -> int:
    """`nearest_indices` of one."""
    return nearest_indices([wanted], size, seed_size)[0]


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
    def line(self) -> str | tuple:
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
    results, arena = [], Arena()
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
    """`--layer`, else the seed's layer, else the middle one; and what the caption says of it."""
    if options.layer is not None:
        if not 0 <= options.layer < n_layer:
            raise JaxqkvError(f"--layer {options.layer}: the layers of {name} are 0 to {n_layer - 1}")
        return options.layer, ""
    if wanted < n_layer:
        return wanted, ""
    return n_layer // 2, f" ({name} has no layer {wanted} as in the seed; the middle one is drawn.)"
