"""The studies by name. A new study is a module in this folder and a line here."""

import importlib

from jaxqkv.errors import JaxqkvError, nearest
from jaxqkv.studies.study import Study

# Modules in this folder, each with a `STUDY`, in the order of the table of studies.
MODULES = (
    "qkv_weights",
    "attention_scores",
    "token_frequency",
    "weight_tour",
    "token_similarity",
    "qkv_activations",
    "adjustment_magnitudes",
    "prediction_divergence",
    "category_selectivity",
    "head_silencing",
    "head_patching",
    "heads",
)
# Studies that are defined elsewhere, added by `add`.
_added: dict[str, Study] = {}


def add(study: Study) -> None:
    """Adds a study from outside the package; it is then drawn and listed like the others."""
    _added[study.name] = study


def names() -> list[str]:
    """Returns the names of all studies."""
    return [module.replace("_", "-") for module in MODULES] + list(_added)


def study(name: str) -> Study:
    """Returns the study of that name; its run and figures are imported when they are first used.

    Raises:
      JaxqkvError: when there is none, suggesting near names.
    """
    if name in _added:
        return _added[name]
    if name not in names():
        raise JaxqkvError(f"no study {name}; {nearest(name, names())}")
    found: Study = importlib.import_module(f"jaxqkv.studies.{name.replace('-', '_')}").STUDY
    return found


def studies() -> list[Study]:
    """Returns all studies, in the order of the table."""
    return [study(name) for name in names()]
