"""The most typical heads of each kind, for `jaxqkv info SPEC --heads`."""

from typing import Any

import numpy as np

from jaxqkv.figures.tables import Table
from jaxqkv.model.model import Model
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
}


def typical_heads(model: Model, seed: int = 0) -> list[dict[str, Any]]:
    """Returns the heads with the largest values of each kind: kind, layer, head, value, and that of the control.

    Kinds that are about a repetition are ordered by how much more than the control they attend.

    Raises:
      NotDrawable: for a model of too few positions or tokens.
    """
    found = measure_types(model, seed, null=0)
    rows = []
    for kind in KINDS:
        value, control = found.mean(kind), found.control_mean(kind)
        order = np.argsort(-(value - control if kind in REPEATING else value), axis=None)[:MOST]
        for layer, head in zip(*np.unravel_index(order, value.shape), strict=True):
            numbers = {"value": float(value[layer, head]), "control": float(control[layer, head])}
            rows.append({"kind": kind, "layer": int(layer), "head": int(head), **numbers})
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """Returns those heads as a table."""
    cells = [
        (KINDS[row["kind"]], str(row["layer"]), str(row["head"]), f"{row['value']:.3f}", f"{row['control']:.3f}")
        for row in rows
    ]
    return Table(heading=("a head that", "layer", "head", "value", "control"), rows=cells)
