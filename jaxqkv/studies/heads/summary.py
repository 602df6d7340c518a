"""The most typical heads of each kind, for `jaxqkv info SPEC --heads`."""

from typing import Any

import numpy as np

from jaxqkv.figures.tables import Table
from jaxqkv.kernels import HeadTypes
from jaxqkv.model.model import Model
from jaxqkv.studies.heads.circuits import copying_scores
from jaxqkv.studies.heads.types import REPEATING, measure_types

# Heads of each kind.
MOST = 3
# What a head of each kind does.
KINDS = {
    "previous": "attends to the token before",
    "duplicate": "attends to the same token, said before",
    "induction": "attends to what followed it",
    "first": "attends to the first position",
    "entropy": "attends evenly (nats)",
    "copying": "makes what it attends to more probable",
}


def typical_heads(model: Model, seed: int = 0) -> list[dict[str, Any]]:
    """Returns the heads with the largest values of each kind, from the weights and one pass.

    Kinds that are about a repetition are ordered by how much more than the control they attend. Copying is only of
    models whose logits follow from one final norm.

    Returns:
      For each head its kind, layer, head, value, and the value of the control; None where a kind has none.

    Raises:
      NotDrawable: for a model of too few positions or tokens.
    """
    types = measure_types(model, seed, null=0)
    found = {kind: (types.mean(kind), types.control_mean(kind)) for kind in HeadTypes._fields}
    values: dict[str, tuple[np.ndarray, np.ndarray | None]] = dict(found)
    if model.config.has_final_norm and model.config.has_logits:
        values["copying"] = (copying_scores(model.checkpoint)["copying"], None)
    rows = []
    for kind, (value, control) in values.items():
        by = value - control if kind in REPEATING and control is not None else value
        for layer, head in zip(*np.unravel_index(np.argsort(-by, axis=None)[:MOST], value.shape), strict=True):
            numbers = [None if each is None else float(each[layer, head]) for each in (value, control)]
            place = {"kind": kind, "layer": int(layer), "head": int(head)}
            rows.append(place | dict(zip(("value", "control"), numbers, strict=True)))
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """Returns those heads as a table."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    cells = [
        (KINDS[row["kind"]], str(row["layer"]), str(row["head"]), number(row["value"]), number(row["control"]))
        for row in rows
    ]
    return Table(heading=("a head that", "layer", "head", "value", "control"), rows=cells)
