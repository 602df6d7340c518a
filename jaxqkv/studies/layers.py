"""Choice of the layer, dimensions and heads to draw: the original's, or the nearest that exist."""

from collections.abc import Sequence

from jaxqkv.errors import JaxqkvError
from jaxqkv.figures.panels import plain
from jaxqkv.studies.options import Options


def nearest_indices(wanted: Sequence[int], size: int, original_size: int) -> list[int]:
    """Returns the original's indices if all exist, else those at the same fractions of the range."""
    return list(wanted) if max(wanted) < size else [index * size // original_size for index in wanted]


def nearest_index(wanted: int, size: int, original_size: int) -> int:
    """Returns `nearest_indices` of one index."""
    return nearest_indices([wanted], size, original_size)[0]


class OfOneLayer:
    """A run that shows one layer of one checkpoint, with its names for captions and titles."""

    name: str
    layer: int

    @property
    def where(self) -> str:
        """Layer and checkpoint, for a caption."""
        return f"layer {self.layer} of {self.name}"

    @property
    def label(self) -> str:
        """Name of the checkpoint, for a title."""
        return plain(self.name)

    @property
    def heading(self) -> str:
        """Layer and checkpoint, for a title."""
        return f"Layer {self.layer} of {self.label}"


def pick_layer(options: Options, wanted: int, n_layer: int, name: str) -> tuple[int, str]:
    """Returns `--layer`, else the original's layer, else the middle one; and the note for the caption."""
    if options.layer is not None:
        if not 0 <= options.layer < n_layer:
            raise JaxqkvError(f"--layer {options.layer}: the layers of {name} are 0 to {n_layer - 1}")
        return options.layer, ""
    if wanted < n_layer:
        return wanted, ""
    return n_layer // 2, f" ({name} has no layer {wanted} as in the original; the middle one is drawn.)"
