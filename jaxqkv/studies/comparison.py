"""Comparison of checkpoints: their names and line styles, and one pass over the layers of each."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Array, Float

from jaxqkv.checkpoints.weights import Weights
from jaxqkv.figures import style
from jaxqkv.model.transfer import Arena, read_after, to_device


@dataclasses.dataclass
class Compared:
    """One checkpoint of a comparison: the first, of order 0, or one that is compared with it."""

    weights: Weights
    name: str
    order: int
    wanted_layer: int

    @property
    def suffix(self) -> str:
        """The suffix of its arrays' names; empty for the first."""
        return f"_{self.name}" if self.order else ""

    @property
    def line(self) -> style.LineStyle:
        """Line style of its curves."""
        return style.LINES[self.order % len(style.LINES)]

    @property
    def layer(self) -> int:
        """The layer that is drawn, or the last one if there are fewer."""
        return min(self.wanted_layer, self.weights.config.n_layer - 1)


def beside(names: Sequence[str]) -> str:
    """Joins the names of a comparison's checkpoints, for a caption."""
    first, *others = names
    return f"{first}, beside {', '.join(others)}" if others else first


def reduce_layers(
    weights: Weights,
    layers: Sequence[int],
    reduce: Callable[[int, Float[Array, "embed three_embed"]], Any],
    progress: Any,
) -> list[Any]:
    """Returns `reduce(layer, wide)` for each layer, with one layer's matrices in memory at a time.

    `wide` is W_Q, W_K and W_V side by side.
    """
    arena = Arena()
    results: list[Any] = []
    for layer in layers:
        wide = read_after(results[-1:], lambda: to_device(weights.W_QKV(layer), arena))  # noqa: B023
        results.append(reduce(layer, wide))
        progress.update()
    return results


def short_names(weights: Sequence[Weights]) -> list[str]:
    """Returns a unique name for each checkpoint, for titles and array names: of a folder, its last part."""
    names: list[str] = []
    for each in weights:
        name = base = each.checkpoint.name
        number = 1
        while name in names:
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return names
