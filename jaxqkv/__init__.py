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
    "forward",
    "hidden",
    "load",
    "logits",
    "open_checkpoint",
]

if TYPE_CHECKING:
    from jaxqkv import corpus, devices, figures, kernels, studies  # noqa: F401
    from jaxqkv.activations import Activations, Attention
    from jaxqkv.checkpoint import Checkpoint, open_checkpoint
    from jaxqkv.errors import CheckpointError, JaxqkvError, JaxqkvWarning
    from jaxqkv.model import Model, load
    from jaxqkv.running import forward, hidden, logits
    from jaxqkv.tokens import Batch
    from jaxqkv.weights import Weights
else:
    # Imported when they are first used, so that the command answers at once to what needs no JAX.
    _HOMES = {
        "activations": ("Activations", "Attention"),
        "checkpoint": ("Checkpoint", "open_checkpoint"),
        "errors": ("CheckpointError", "JaxqkvError", "JaxqkvWarning"),
        "model": ("Model", "load"),
        "running": ("forward", "hidden", "logits"),
        "tokens": ("Batch",),
        "weights": ("Weights",),
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
        return sorted({*globals(), *_HOME_OF, "corpus", "devices", "figures", "kernels", "studies"})
