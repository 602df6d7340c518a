"""`Study`: a study with its options, its figures and the run that computes them."""

import contextlib
import dataclasses
import importlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, overload

from jaxqkv.errors import JaxqkvError, NotDrawable, nearest
from jaxqkv.studies.arrays import FigureArrays
from jaxqkv.studies.options import Options, from_keywords

if TYPE_CHECKING:
    from jaxqkv.figures.displays import Display
    from jaxqkv.figures.drawing import Figure

Make = TypeVar("Make", bound=Callable[..., Any])
RunType = TypeVar("RunType", bound="type[Run]")


class Run:
    """One computation of a study: opens checkpoints and texts, then computes the reductions for the figures.

    A context manager, so that a study can clean up after its figures are written, or say how to resume an interrupted
    run. Subclasses set `name`, and override `describe` and `compute`.
    """

    def __init__(self, options: Any, folder: Path | None = None):
        """Opens the checkpoints and texts; `folder` is that of the study's files, None for a call from Python."""

    def describe(self) -> dict[str, Any]:
        """Returns this run's entries in the manifest: checkpoint, layer, text or corpus."""
        raise NotImplementedError

    def compute(self, names: Collection[str]) -> Mapping[str, Any]:
        """Returns the reductions of these names, computed in one pass."""
        return {}

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Does nothing by default."""


@dataclasses.dataclass(frozen=True)
class FigureSpec:
    """A figure of a study.

    Attributes:
      id: name on the command line.
      title: title in the table of figures.
      arrays: names and axes of its arrays.
      make: function of the run, and of the reductions that its other parameters name.
    """

    id: str
    title: str
    arrays: FigureArrays
    make: Callable[..., "Display"]

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the reductions that `make` takes."""
        return tuple(inspect.signature(self.make).parameters)[1:]

    def display(self, run: Run, reductions: Mapping[str, Any]) -> "Display":
        """Returns the figure as arrays and panels.

        Raises:
          NotDrawable: also if that is what the run has in the place of a reduction.
        """
        needed = {name: reductions[name] for name in self.needs}
        for found in needed.values():
            if isinstance(found, NotDrawable):
                raise found
        return self.make(run, **needed)


@dataclasses.dataclass(eq=False)
class Study:
    """A study.

    Attributes:
      name: name on the command line.
      title: title on the page and in the table of studies.
      models: default checkpoints.
      demo: the bundled checkpoint for `--demo`.
      options: dataclass of its options.
      modules: modules that define its run and its figures, imported when they are first used, so that a study's help
        needs no JAX.
    """

    name: str
    title: str
    models: tuple[str, ...]
    demo: str
    options: type[Options] = Options
    modules: tuple[str, ...] = ()
    _run: type[Run] | None = None
    _figures: dict[str, FigureSpec] = dataclasses.field(default_factory=dict)

    # --- definition ---

    def computation(self, run: RunType) -> RunType:
        """Makes the decorated class the run of this study."""
        self._run = run
        return run

    def define(self, id: str, title: str, arrays: str) -> Callable[[Make], Make]:
        """Makes the decorated function a figure of this study; its parameters after the run name reductions.

        Args:
          id: name on the command line.
          title: title in the table of figures.
          arrays: names and axes of the figure's arrays, as `edges [edge], density [layer, bin]`; see
            `jaxqkv.studies.arrays`.

        Raises:
          ValueError: for arrays in another form.
        """

        def register(make: Make) -> Make:
            self._figures[id] = FigureSpec(id, title, FigureArrays(arrays), make)
            return make

        return register

    # --- use ---

    @property
    def figures(self) -> dict[str, FigureSpec]:
        """The figures by id, in the order of the study's modules, whichever was imported first."""
        self._load()
        order = {module: place for place, module in enumerate(self.modules)}
        return dict(sorted(self._figures.items(), key=lambda item: order.get(item[1].make.__module__, -1)))

    def select(self, ids: Sequence[str]) -> list[FigureSpec]:
        """Returns the figures with these ids, in the study's order; all figures if no id is given.

        Raises:
          JaxqkvError: for an id that the study does not have.
        """
        unknown = [id for id in ids if id not in self.figures]
        if unknown:
            raise JaxqkvError(f"{self.name} has no figure {unknown[0]}; {nearest(unknown[0], self.figures)}")
        return [spec for id, spec in self.figures.items() if not ids or id in ids]

    @contextlib.contextmanager
    def start(self, options: Options, folder: Path | None = None) -> Iterator[Run]:
        """Opens a run of this study for a `with` block."""
        self._load()
        assert self._run is not None, f"{self.name} has no run"
        with self._run(options, folder) as run:
            yield run

    @staticmethod
    def needs(specs: Sequence[FigureSpec]) -> frozenset[str]:
        """Returns the names of all reductions that these figures take."""
        return frozenset(name for spec in specs for name in spec.needs)

    def _load(self) -> None:
        for module in self.modules:
            importlib.import_module(module)

    @overload
    def figure(self, id: str, *, model: Any = None, **options: Any) -> "Figure": ...

    @overload
    def figure(self, id: list[str] | tuple[str, ...], *, model: Any = None, **options: Any) -> "list[Figure]": ...

    def figure(
        self, id: str | list[str] | tuple[str, ...], *, model: Any = None, **options: Any
    ) -> "Figure | list[Figure]":
        """Draws a figure of this study, as `jaxqkv figures` does, and returns it instead of writing files.

        Args:
          id: id of the figure; a list returns a list of figures that share one pass over the model.
          model: hub id, folder, demo-gpt2, demo-bert or random:SPEC; an open `Checkpoint` or a `Model`; or a list of
            several if the study takes several. The study's own unless given.
          options: the options of `jaxqkv figures STUDY` by their Python names: `layer`, `seed`, `theme`, ….

        Raises:
          JaxqkvError: on names, values, checkpoints and texts that the command would refuse too.
        """
        import numpy as np

        from jaxqkv.figures.drawing import Figure, drawn
        from jaxqkv.studies.opening import refuse_decided

        if not isinstance(id, str | list | tuple):
            raise JaxqkvError(f"a figure's id is a text, as {next(iter(self.figures))!r}, not {id!r}")
        specs = self.select([id] if isinstance(id, str) else list(id))
        refuse_decided(model, options)
        chosen = from_keywords(self.options, {"model": model} | options, self.name)
        figures = {}
        with self.start(chosen) as run:
            reductions = run.compute(self.needs(specs))
            for spec in specs:
                display = spec.display(run, reductions)
                arrays = {name: np.array(array) for name, array in display.arrays.items()}
                picture = drawn(display, chosen.theme, chosen.dpi)
                axes = spec.arrays.axes(arrays)
                figures[spec.id] = Figure(
                    self.name, spec.id, spec.title, display.caption, arrays, picture, chosen.theme, axes
                )
        return figures[id] if isinstance(id, str) else [figures[each] for each in id or figures]
