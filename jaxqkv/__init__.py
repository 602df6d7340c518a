"""GPT-2 and BERT in JAX with every attention intermediate as a return value."""

import importlib
from types import ModuleType

from jaxqkv.activations import Activations, Attention
from jaxqkv.checkpoint import Checkpoint, open_checkpoint
from jaxqkv.errors import CheckpointError, JaxqkvError, JaxqkvWarning
from jaxqkv.model import Model, load
from jaxqkv.running import forward, hidden, logits
from jaxqkv.tokens import Batch
from jaxqkv.weights import Weights

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

# Imported when they are first used: what they bring takes longer to load than the rest.
_SUBMODULES = ("corpus", "figures", "kernels", "studies")


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__} has no attribute {name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
