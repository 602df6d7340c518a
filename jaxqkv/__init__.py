"""GPT-2 and BERT in JAX with every attention intermediate as a return value."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Activations",
    "Attention",
    "Batch",
    "Checkpoint",
    "CheckpointError",
    "JaxqkvError",
    "JaxqkvWarning",
    "Model",
    "Weights",
    "cache",
    "forward",
    "hidden",
    "layerwise",
    "load",
    "load_activations",
    "logits",
    "make_mesh",
    "open_checkpoint",
]

if TYPE_CHECKING:
    from jaxqkv import edits, figures, kernels, metrics, studies  # noqa: F401
    from jaxqkv.architectures import open_checkpoint
    from jaxqkv.architectures.activations import Activations, Attention, load_activations
    from jaxqkv.checkpoints.checkpoint import Checkpoint
    from jaxqkv.checkpoints.weights import Weights
    from jaxqkv.errors import CheckpointError, JaxqkvError, JaxqkvWarning
    from jaxqkv.model.forward import forward, hidden, layerwise, logits
    from jaxqkv.model.loading import load
    from jaxqkv.model.model import Model
    from jaxqkv.runtime.devices import cache, make_mesh
    from jaxqkv.text.batches import Batch
else:
    # Imported when they are first used, so that commands that need no JAX start at once.
    _HOMES = {
        "architectures.activations": ("Activations", "Attention", "load_activations"),
        "architectures": ("open_checkpoint",),
        "checkpoints.checkpoint": ("Checkpoint",),
        "checkpoints.weights": ("Weights",),
        "errors": ("CheckpointError", "JaxqkvError", "JaxqkvWarning"),
        "model.forward": ("forward", "hidden", "layerwise", "logits"),
        "model.loading": ("load",),
        "model.model": ("Model",),
        "runtime.devices": ("cache", "make_mesh"),
        "text.batches": ("Batch",),
    }
    _HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name in _HOME_OF:
            globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
            return globals()[name]
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__} has no attribute {name}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOME_OF, "edits", "figures", "kernels", "metrics", "studies"})
