"""One module a published study: what each of its figures needs, and its arrays and labels.

`jaxqkv.studies.attention_scores.figure("5a", model="gpt2")` draws a figure; each module has such a function.
"""

import importlib
from types import ModuleType

from jaxqkv.studies.registry import STUDIES

__all__ = list(STUDIES.values())


def __getattr__(name: str) -> ModuleType:
    """Studies are imported when they are first used."""
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__} has no attribute {name}")
