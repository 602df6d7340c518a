"""What can be drawn: studies, and the figures of each by id.

A figure is a function from its study's run to a `Display`; `needs` names the reductions that the
run has to make for it, so that one pass over the layers serves all the figures that are asked for.
"""

import argparse
import dataclasses
import difflib
import importlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

from jaxqkv.errors import JaxqkvError
from jaxqkv.figures.displays import Display

# Name on the command line → module; the order is that of the README's table.
STUDIES = {
    "qkv-weights": "qkv_weights",
    "attention-scores": "attention_scores",
    "token-frequency": "token_frequency",
    "weight-tour": "weight_tour",
    "token-similarity": "token_similarity",
}


class Run(Protocol):
    """A study's computation: what its figures are functions of."""

    def prepare(self, needs: Collection[str]) -> None:
        """Makes the reductions in `needs`, together."""

    def describe(self) -> dict[str, Any]:
        """What the manifest says about this run: checkpoint, layer, text or corpus."""


@dataclasses.dataclass(frozen=True)
class FigureSpec:
    """One row of the table: `make(run)` gives the figure's display."""

    id: str
    title: str
    needs: frozenset[str]
    make: Callable[[Any], Display]


@dataclasses.dataclass
class Study:
    """A published study: its name, its default checkpoints, its figures and how to run it.

    `options` are the arguments of the command that this study takes and others may not; `finish` is
    called with the run when its figures are written.
    """

    name: str
    title: str
    models: tuple[str, ...]
    demo: str
    run: Callable[[argparse.Namespace], Run]
    options: tuple[str, ...] = ()
    finish: Callable[[Any], None] = lambda run: None
    figures: dict[str, FigureSpec] = dataclasses.field(default_factory=dict)

    def figure(self, id: str, title: str, needs: Collection[str] = ()) -> Callable:
        """Registers the decorated function as a figure of this study."""

        def register(make: Callable[[Any], Display]) -> Callable[[Any], Display]:
            self.figures[id] = FigureSpec(id, title, frozenset(needs), make)
            return make

        return register

    def select(self, ids: Sequence[str]) -> list[FigureSpec]:
        """The figures named, in the registry's order; all of them when none is."""
        unknown = [id for id in ids if id not in self.figures]
        if unknown:
            raise JaxqkvError(f"{self.name} has no figure {unknown[0]}; {_nearest(unknown[0], self.figures)}")
        return [spec for id, spec in self.figures.items() if not ids or id in ids]


def study(name: str) -> Study:
    """The study of that name, imported when it is first asked for."""
    if name not in STUDIES:
        raise JaxqkvError(f"no study {name}; {_nearest(name, STUDIES)}")
    return importlib.import_module(f"jaxqkv.studies.{STUDIES[name]}").STUDY


def _nearest(name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(names)}"
