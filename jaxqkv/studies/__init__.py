"""The studies, one module each, with their options, computations and figures.

`jaxqkv.studies.attention_scores.figure("5a", model="gpt2")` draws a figure; each module has such a function.
"""

import importlib
from types import ModuleType

from jaxqkv.studies.registry import MODULES

__all__ = list(MODULES)


def __getattr__(name: str) -> ModuleType:
    """Imports a study when it is first used."""
    if name in MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__} has no attribute {name}")
