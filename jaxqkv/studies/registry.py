"""What can be drawn: studies, and the figures of each by id.

A figure is a function from its study's run to a `Display`; `needs` names the reductions that the
run has to make for it, so that one pass over the layers serves all the figures that are asked for.
"""

import argparse
import dataclasses
import difflib
import importlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, TypeVar, overload, runtime_checkable

import numpy as np

from jaxqkv.errors import JaxqkvError
from jaxqkv.figures.displays import Display
from jaxqkv.figures.drawing import Figure, drawn

# Name on the command line → module; the order is that of the README's table.
STUDIES = {
    "qkv-weights": "qkv_weights",
    "attention-scores": "attention_scores",
    "token-frequency": "token_frequency",
    "weight-tour": "weight_tour",
    "token-similarity": "token_similarity",
}


_Make = TypeVar("_Make", bound=Callable[[Any], Display])


@runtime_checkable
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


def _leave(run: Any) -> None:
    """What most studies have to do at the end of a run: nothing."""


def _from_the_beginning(run: Any) -> list[str]:
    """What most studies have to say of an interrupted run: nothing."""
    return []


@dataclasses.dataclass
class Study:
    """A published study: its name, its default checkpoints, its figures and how to run it.

    `options` are the arguments of the command that this study takes and others may not; `finish` is
    called with the run when its figures are written, and `goes_on` says of an interrupted one how it goes on.
    """

    name: str
    title: str
    models: tuple[str, ...]
    demo: str
    run: Callable[[argparse.Namespace], Run]
    options: tuple[str, ...] = ()
    finish: Callable[[Any], None] = _leave
    goes_on: Callable[[Any], list[str]] = _from_the_beginning
    figures: dict[str, FigureSpec] = dataclasses.field(default_factory=dict)

    def figure(self, id: str, title: str, needs: Collection[str] = ()) -> Callable[[_Make], _Make]:
        """Registers the decorated function as a figure of this study."""

        def register(make: _Make) -> _Make:
            self.figures[id] = FigureSpec(id, title, frozenset(needs), make)
            return make

        return register

    def select(self, ids: Sequence[str]) -> list[FigureSpec]:
        """The figures named, in the registry's order; all of them when none is."""
        unknown = [id for id in ids if id not in self.figures]
        if unknown:
            raise JaxqkvError(f"{self.name} has no figure {unknown[0]}; {nearest(unknown[0], self.figures)}")
        return [spec for id, spec in self.figures.items() if not ids or id in ids]

    @staticmethod
    def needs(specs: Sequence[FigureSpec]) -> frozenset[str]:
        """What a run has to prepare for these figures."""
        return frozenset().union(*(spec.needs for spec in specs))

    @overload
    def draw(self, id: str, *, model: Any = None, **options: Any) -> Figure: ...

    @overload
    def draw(self, id: list[str] | tuple[str, ...], *, model: Any = None, **options: Any) -> list[Figure]: ...

    def draw(
        self, id: str | list[str] | tuple[str, ...], *, model: Any = None, **options: Any
    ) -> Figure | list[Figure]:
        """Draws a figure of this study, as `jaxqkv figures` does, and gives it instead of writing files.

        Args:
          id: the figure's; of several, a list of figures that share one pass over the model.
          model: hub id, folder, demo-gpt2, demo-bert or random:SPEC; an open `Checkpoint` or a `Model`;
            several in a list where the study takes several. The study's own unless given.
          options: those of the command that this study takes, under their Python names: `layer`,
            `seed`, `theme`, `text`, `sentences` (also as a list), `text_file`, `skip_missing`, ….

        Raises:
          JaxqkvError: on names, values, checkpoints and texts that the command would refuse, too.
        """
        from jaxqkv.studies.options import from_keywords

        if not isinstance(id, str | list | tuple):
            raise JaxqkvError(f"a figure's id is a text, as {next(iter(self.figures))!r}, not {id!r}")
        ids = [id] if isinstance(id, str) else list(id)
        specs = self.select(ids)
        chosen = from_keywords(self, model, options)
        run = self.run(chosen)
        run.prepare(self.needs(specs))
        figures = {}
        for spec in specs:
            display = spec.make(run)
            arrays = {name: np.array(array) for name, array in display.arrays.items()}
            picture = drawn(display, chosen.theme, chosen.dpi)
            figures[spec.id] = Figure(self.name, spec.id, spec.title, display.caption, arrays, picture, chosen.theme)
        return figures[id] if isinstance(id, str) else [figures[each] for each in ids or figures]


def study(name: str) -> Study:
    """The study of that name, imported when it is first asked for."""
    if name not in STUDIES:
        raise JaxqkvError(f"no study {name}; {nearest(name, STUDIES)}")
    return importlib.import_module(f"jaxqkv.studies.{STUDIES[name]}").STUDY


def nearest(name: str, names: Collection[str]) -> str:
    """What an error about an unknown name ends with."""
    same = [each for each in names if each.casefold() == name.casefold()]
    near = same or difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(names)}"
