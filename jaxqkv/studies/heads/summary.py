"""Heads of each kind: the most typical, for `jaxqkv info SPEC --heads`, and all, for `jaxqkv view SPEC --types`."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from jaxqkv.figures.tables import Table
from jaxqkv.kernels import HeadTypes
from jaxqkv.model.model import Model
from jaxqkv.pages.view import HeadKind, TypedHeads
from jaxqkv.studies.heads.circuits import copying_scores
from jaxqkv.studies.heads.types import REPEATING, Types, measure_types

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
    "copying": "makes what it attends to more probable",
}


def typical_heads(model: Model, seed: int = 0) -> list[dict[str, Any]]:
    """Returns the heads with the largest values of each kind, from the weights and one pass.

    Kinds that are about a repetition are ordered by how much more than the control they attend.

    Returns:
      For each head its kind, layer, head, value, and the value of the control; None where a kind has none. Heads whose
      value is NaN are in no kind.

    Raises:
      NotDrawable: for a model of too few positions or tokens.
    """
    rows = []
    for kind, (value, control) in _values(model, measure_types(model, seed, null=0)).items():
        by = value - control if kind in REPEATING and control is not None else value
        order = np.argsort(-by, axis=None)[: min(MOST, np.count_nonzero(~np.isnan(by)))]  # NaN is last
        for layer, head in zip(*np.unravel_index(order, value.shape), strict=True):
            numbers = [None if each is None else float(each[layer, head]) for each in (value, control)]
            place = {"kind": kind, "layer": int(layer), "head": int(head)}
            rows.append(place | dict(zip(("value", "control"), numbers, strict=True)))
    return rows


def _values(model: Model, types: Types) -> dict[str, tuple[np.ndarray, np.ndarray | None]]:
    """Returns value and control of every kind, `[layer, head]`.

    Copying, which has no control, is only of models whose logits follow from one final norm.
    """
    found = {kind: (types.mean(kind), types.control_mean(kind)) for kind in HeadTypes._fields}
    values: dict[str, tuple[np.ndarray, np.ndarray | None]] = dict(found)
    if model.config.has_final_norm and model.config.has_logits:
        values["copying"] = (copying_scores(model.checkpoint)["copying"], None)
    return values


def table(rows: list[dict[str, Any]]) -> Table:
    """Returns those heads as a table."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    cells = [
        (KINDS[row["kind"]], str(row["layer"]), str(row["head"]), number(row["value"]), number(row["control"]))
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
    values = _values(model, found)
    kinds = [
        HeadKind(kind, KINDS[kind], value, control if kind in REPEATING else None)
        for kind, (value, control) in values.items()
    ]
    texts, tokens = found.given.texts.shape
    about = (
        f"Types are of {texts} texts of {tokens // 2} random tokens, said twice (seed {seed}), and of a control whose "
        "first half is other tokens: mean attention, and its entropy in nats. A head is named after what it gives the "
        f"most attention to, if that is {NAMED} or more, and in a repetition more than in the control. Orders by "
        f"{' and '.join(REPEATING)} are by how much more than in the control."
    )
    if "copying" in values:
        about += " Copying is of the weights alone: 1 if every direction of tokens makes itself more probable."
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
