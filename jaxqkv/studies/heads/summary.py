"""Heads of each kind: the most typical, for `jaxqkv info SPEC --heads`, and all, for `jaxqkv view SPEC --types`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from jaxqkv.figures.tables import Table
from jaxqkv.model.model import Model
from jaxqkv.pages.view import HeadKind, TypedHeads
from jaxqkv.studies.heads.types import REPEATING, measure_types

# Heads of each kind.
MOST = 3
# Mean attention from which a head is named after what it attends to, and the kinds that are names.
NAMED = 0.4
NAMES = ("previous", "duplicate", "induction", "first")
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


def typed_heads(model: Model, seed: int = 0) -> TypedHeads:
    """Returns the values of all kinds for every head, and the names of those that are clearly of one.

    A head is named after the kind with its largest value, if that is `NAMED` or more; after a repetition only if the
    bootstrap interval over texts of the difference from the control is above 0.

    Raises:
      NotDrawable: for a model of too few positions or tokens.
    """
    found = measure_types(model, seed, null=0)
    kinds = [
        HeadKind(kind, about, found.mean(kind), found.control_mean(kind) if kind in REPEATING else None)
        for kind, about in KINDS.items()
    ]
    texts, tokens = found.given.texts.shape
    about = (
        f"Types are of {texts} texts of {tokens // 2} random tokens, said twice (seed {seed}), and of a control whose "
        "first half is other tokens: mean attention, and its entropy in nats. A head is named after what it gives the "
        f"most attention to, if that is {NAMED} or more, and in a repetition more than in the control. Orders by "
        f"{' and '.join(REPEATING)} are by how much more than in the control."
    )
    names = names_of({kind: found.mean(kind) for kind in NAMES}, {kind: found.low[kind] > 0 for kind in REPEATING})
    return TypedHeads(about, kinds, names)


def names_of(
    values: Mapping[str, Float[np.ndarray, "layer head"]], above: Mapping[str, Bool[np.ndarray, "layer head"]]
) -> list[list[str]]:
    """Returns the name of every head, `[layer][head]`; empty where it has none.

    Args:
      values: mean attention, by kind.
      above: by kind that is compared with a control, whether the value is clearly larger than the control's.
    """
    counted = {kind: np.where(above.get(kind, np.True_), each, 0) for kind, each in values.items()}
    largest = np.max(list(counted.values()), axis=0)
    names = np.full(largest.shape, "", object)
    for kind, each in counted.items():
        names[(each == largest) & (each >= NAMED)] = kind
    rows: list[list[str]] = names.tolist()
    return rows
