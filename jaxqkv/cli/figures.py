"""`jaxqkv figures`: draws the figures of a study into a folder, with their arrays, a manifest and a page."""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxqkv import errors
from jaxqkv.cli.output import about_run, note_words, say, show
from jaxqkv.cli.parser import Line, Output, Parser, Precision, add_options, first_option, made, shell_line
from jaxqkv.figures.style import FORMATS
from jaxqkv.runtime import console
from jaxqkv.studies import registry
from jaxqkv.studies.options import Options, flag, option, options_of
from jaxqkv.studies.study import FigureSpec, Run, Study

if TYPE_CHECKING:
    from jaxqkv.figures.displays import Display
    from jaxqkv.figures.drawers import Drawers

HELP = "draw the figures of a study"
ALL = "all"
# Figures that a study has, roughly; the exact number is known only after its modules, and JAX with them, are loaded.
FIGURES = 9
EXAMPLE = "jaxqkv figures qkv-weights --demo"
EXAMPLES = f"""examples:
  {EXAMPLE}
  jaxqkv figures qkv-weights 2c 5b --model demo-gpt2 random:demo-gpt2 --theme dark --format svg
  jaxqkv figures all --demo"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """Files to write."""

    out: Path = option(Path("figures"), "folder to write to", parse=Path, metavar="FOLDER")
    format: tuple[str, ...] = option(
        (), "write pictures in these formats too, besides png", choices=FORMATS, several=True
    )
    arrays_only: bool = option(False, "write the .npz files and draw nothing")
    no_compilation_cache: bool = option(False, "do not keep XLA's compiled programs")

    @property
    def formats(self) -> list[str]:
        """Formats of the pictures that are drawn."""
        first, *others = FORMATS
        return [] if self.arrays_only else [first, *(kind for kind in others if kind in self.format)]


# --- arguments ---


class _Word(str):
    """A word that is compared by identity, to tell the 6 of `--layer 6` from figure 6."""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parses the words after `figures`; figure ids may be before and after the options."""
    words = [_Word(word) for word in words]
    named = next((word for word in words if word in (*registry.names(), ALL)), None)
    if named is None:
        return _parse_without_study(words)
    study = None if named == ALL else registry.study(named)
    parser = _parser(study, named)
    place = next(index for index, word in enumerate(words) if word is named)
    given, rest = parser.parse_known_args(words[:place] + words[place + 1 :])
    if study is None or any(word.startswith("-") for word in rest):
        parser.refuse_unknown(rest, _owners(rest))
    given.ids = [*getattr(given, "ids", ()), *rest]
    given.study, given.studies = named, [study] if study else registry.studies()
    given.typed = words
    return given


def _owners(words: Sequence[str]) -> str:
    """Returns the end of the error about unknown words: which studies have the first unknown option, if any."""
    unknown = first_option(words)
    owners = [each.name for each in registry.studies() if unknown in {flag(name) for name in options_of(each.options)}]
    return f"; {unknown} is an option of {errors.listed(owners)}" if owners else ""


def _parser(study: Study | None, named: str) -> Parser:
    parser = Parser(
        prog=f"jaxqkv figures {named}",
        usage=f"jaxqkv figures {named} [ID ...] [options]" if study else f"jaxqkv figures {named} [options]",
        description=f"{study.title}. `jaxqkv list {named}` names its figures."
        if study
        else "Draw every study, each with its own checkpoints unless --demo or --model is given.",
        epilog=f"example:\n  jaxqkv figures {named} --demo",
    )
    if study:
        parser.add_argument("ids", metavar="ID", nargs="*", default=[], help="figures to draw (default all)")
    for group in (study.options if study else Options, Files, Precision, Output):
        add_options(parser, group)
    return parser


def _parse_without_study(words: Sequence[str]) -> argparse.Namespace:
    studies = "\n".join(f"  {each.name:24}{each.title}" for each in registry.studies())
    parser = Parser(
        prog="jaxqkv figures",
        usage="jaxqkv figures STUDY [ID ...] [options]",
        description=f"Draw the figures of a study:\n\n{studies}\n  {ALL:24}every study",
        epilog=f"`jaxqkv figures STUDY --help` shows the study's options.\n\n{EXAMPLES}",
    )
    add_options(parser, Output)
    given, rest = parser.parse_known_args(words)
    if rest and not rest[0].startswith("-"):
        parser.error(f"no study {rest[0]}; {errors.nearest(rest[0], [*registry.names(), ALL])}")
    if rest:
        parser.error(f"{rest[0]} needs the name of a study, as in `{EXAMPLE}`; `jaxqkv list` names all")
    given.studies = []
    return given


def command_for(given: argparse.Namespace, study: Study, id: str, before: Sequence[str] = ()) -> str:
    """Returns the command that draws only one of the figures: the same line with that id alone.

    Args:
      given: from `parse`.
      study: study of the figure.
      id: id of the figure.
      before: words before `figures`.
    """
    kept = [word for word in given.typed if not any(word is each for each in given.ids)]
    place = next(index for index, word in enumerate(kept) if word is given.study)
    return shell_line(["jaxqkv", *before, "figures", *kept[:place], study.name, id, *kept[place + 1 :]])


# --- drawing ---


@dataclasses.dataclass(frozen=True)
class Order:
    """Figures of one study to draw.

    Attributes:
      study: the study.
      specs: the figures.
      options: options of the study.
      files: options of the files to write.
      asked: whether figures were named in the command.
      given: the parsed command.
      line: the command.
      drawers: the processes that draw.
    """

    study: Study
    specs: Sequence[FigureSpec]
    options: Any
    files: Files
    asked: bool
    given: argparse.Namespace
    line: Line
    drawers: "Drawers"

    @property
    def folder(self) -> Path:
        """Folder of the study's files."""
        return self.files.out / self.study.name


def run(given: argparse.Namespace, line: Line) -> int:
    """Draws the studies and figures that the command names."""
    if not given.studies:
        studies = [{"study": each.name, "title": each.title} for each in registry.studies()]
        lines = [f"{each['study']:24}{each['title']}" for each in studies]
        lines += ["", f"Name a study, as in `{EXAMPLE}`; `jaxqkv list` shows the figures of each."]
        show(given, studies, lambda: "\n".join(lines))
        return 0
    from jaxqkv.figures.drawers import Drawers

    documents: dict[str, dict[str, Any] | None] = {}
    failed = []
    count = (len(given.ids) or FIGURES) * len(given.studies) if made(Files, given).formats else 0
    with Drawers(count) as drawers:
        if not getattr(given, "distributed", False):
            drawers.begin()  # they load matplotlib while this process loads JAX, and then the study's figures
        for study in given.studies:
            try:
                documents[study.name] = _draw_study(_order(given, line, study, drawers))
            except errors.JaxqkvError as error:
                if len(given.studies) == 1:
                    raise
                failed.append(study.name)
                print(f"jaxqkv: {study.name}: {error}", file=sys.stderr)
            except KeyboardInterrupt as stop:
                if len(given.studies) == 1:
                    raise
                done = f": {', '.join(documents)}" if documents else ""
                done = f"{len(documents)} of {len(given.studies)} studies finished{done}"
                raise KeyboardInterrupt(done, *stop.args) from None
    found = list(documents.values())
    show(given, found if given.study == ALL else found[0], lambda: "")
    if failed:
        raise errors.JaxqkvError(f"{', '.join(failed)} could not be drawn; the other studies were")
    return 0


def _order(given: argparse.Namespace, line: Line, study: Study, drawers: "Drawers") -> Order:
    specs = study.select(given.ids)
    for name in ("model", "compare"):  # options with several values, which take figure ids after them too
        values = getattr(given, name, ())
        taken = [each for each in values if each in study.figures and not Path(each).exists()]
        if taken:
            raise errors.JaxqkvError(f"{taken[0]} is a figure of {study.name}; put ids before --{name}")
    texts = getattr(given, "text", ())
    note_words(() if isinstance(texts, str) else texts)  # some studies take a single text
    options = made(study.options, given)
    return Order(study, specs, options, made(Files, given), bool(given.ids), given, line, drawers)


def _join_job(options: Any) -> None:
    """Joins a job of several processes if `--distributed` is given."""
    from jaxqkv.runtime import distributed

    lost = [name for name in ("coordinator", "processes", "process") if getattr(options, name, None) is not None]
    if lost and not options.distributed:
        raise errors.JaxqkvError(f"--{lost[0]} needs --distributed")
    if getattr(options, "distributed", False):
        distributed.start(options.coordinator, options.processes, options.process, options.patience)


def _draw_study(order: Order) -> dict[str, Any] | None:
    """Draws the figures of one study, and returns the document that --json prints."""
    from jaxqkv.pages import gallery, manifest
    from jaxqkv.runtime import devices

    _join_job(order.options)
    if not order.files.no_compilation_cache:
        devices.enable_compilation_cache()
    record = manifest.Record(order.folder, order.study.name)
    try:
        with gallery.prepared_folder(order.files.out, order.study.name):
            return _draw(order, record)
    except KeyboardInterrupt as stop:
        done = f"no figure of {order.study.name} was finished"
        done += f", and {order.folder} is unchanged" if not stop.args else ""
        if record.finished:
            count, names = len(record.finished), ", ".join(record.finished)
            done = f"{count} of {len(order.specs)} figures finished in {order.folder}: {names}"
        raise KeyboardInterrupt(done, *stop.args) from None


def _draw(order: Order, record: Any) -> dict[str, Any] | None:
    from jaxqkv.pages import gallery, manifest
    from jaxqkv.runtime import distributed, showing

    start = time.monotonic()
    with order.study.start(order.options, order.folder) as run:
        record.about = {"seed": order.options.seed} | about_run(order.options, order.line) | run.describe()
        names = [errors.escaped(checkpoint["checkpoint"]) for checkpoint in record.about["checkpoint"]]
        say(f"{order.study.name}: {', '.join(names)}")
        if distributed.index() == 0:  # the first process of a job, which alone draws
            order.drawers.begin()
        reductions = run.compute(order.study.needs(order.specs))
        if distributed.index() > 0:
            return None
        record.about |= run.describe()
        for note in record.about.get("notes", ()):
            say(note)
        record.computing = time.monotonic() - start
        left_out = _draw_each(order, record, run, reductions)
        if len(order.specs) == 1 and left_out:
            raise errors.JaxqkvError(f"{order.specs[0].id} is not drawn: {left_out[order.specs[0].id]}")
        if not record.finished:
            name = order.study.name
            raise errors.JaxqkvError(f"no figure of {name} can be drawn with this checkpoint and these options")
    figures = {
        id: entry | {"files": [str(record.folder / name) for name in entry["files"]]}
        for id, entry in record.finished.items()
    }
    page = order.files.out / gallery.PAGE
    document = {"study": order.study.name, **record.about, "seconds": record.seconds, "figures": figures}
    document |= {"not drawn": left_out, "manifest": str(record.folder / manifest.NAME), "page": str(page)}
    drawn = f"{showing.counted(len(figures), 'figure')} in {record.folder}"
    times = f"computing {record.seconds['computing']:.1f} s"
    if order.files.formats:
        times += f", drawing {record.seconds['drawing']:.1f} s"
    say(f"{drawn}; {times}; see {page}")
    if left_out and order.asked:
        show(order.given, document, lambda: "")
        raise errors.JaxqkvError(f"{', '.join(left_out)} cannot be drawn with this checkpoint and these options")
    return document


def _draw_each(order: Order, record: Any, run: Run, reductions: Any) -> dict[str, str]:
    """Draws and writes the figures one by one; returns those that cannot be drawn, with the reasons."""
    from jaxqkv.pages import gallery
    from jaxqkv.runtime.files import locked

    options, formats = order.options, order.files.formats
    left_out: dict[str, str] = {}
    try:
        displays = _displays(order, record, run, reductions)
        figures = order.drawers.drawn(displays, formats, options.theme, options.dpi)
        begin, computed = time.monotonic(), record.computing
        for (spec, reason), display, pictures in console.bar(
            figures, total=len(order.specs), desc="figures", unit="figure"
        ):
            if display is None:
                left_out[spec.id] = reason
                if len(order.specs) > 1:
                    print(f"jaxqkv: {spec.id} is not drawn: {reason}", file=sys.stderr)
                continue
            if display.text:
                say(display.text)
            record.drawing = time.monotonic() - begin - (record.computing - computed)
            command = command_for(order.given, order.study, spec.id, order.line.before)
            gallery.save_figure(display, spec, record, command, dict(zip(formats, pictures, strict=True)))
    finally:  # the page of an interrupted run shows the finished figures
        if record.finished:
            with locked(order.files.out):  # if several runs end at once, the last one's page shows all figures
                gallery.write_gallery(order.files.out, registry.studies())
    return left_out


def _displays(
    order: Order, record: Any, run: Run, reductions: Any
) -> "Iterator[tuple[tuple[FigureSpec, str], Display | None]]":
    """Computes the figures one by one; yields each display, or None and the reason why it cannot be drawn."""
    for spec in order.specs:
        begin = time.monotonic()
        reason, display = "", None
        try:
            display = spec.display(run, reductions)
        except errors.NotDrawable as error:
            reason = str(error)
        record.computing += time.monotonic() - begin
        yield (spec, reason), display
