"""Files: pictures, arrays and manifest that appear together and whole or not at all, one gallery page."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxqkv.figures.displays import Display
from jaxqkv.figures.drawing import save_arrays
from jaxqkv.figures.style import FORMATS
from jaxqkv.pages import manifest
from jaxqkv.pages.html import fill, write_page
from jaxqkv.pages.manifest import Record, listed_figures
from jaxqkv.runtime.files import locked, make_writable, replacing_all, written
from jaxqkv.runtime.interrupts import undisturbed


class NamedAxes(Protocol):
    """Names of the axes of a figure's arrays."""

    def axes(self, names: Iterable[str]) -> Mapping[str, Sequence[str]]:
        """Returns the axes of the arrays of these names."""


@runtime_checkable
class Listed(Protocol):
    """A figure, as the page lists it."""

    @property
    def id(self) -> str:
        """Its name on the command line."""

    @property
    def title(self) -> str:
        """What it shows."""

    @property
    def arrays(self) -> NamedAxes:
        """Axes of its arrays."""


@runtime_checkable
class ListedStudy(Protocol):
    """A study, as the page lists it."""

    name: str
    title: str

    @property
    def figures(self) -> Mapping[str, Listed]:
        """Its figures by id, in their order."""


PAGE = "index.html"
ADVICE = "; choose another folder with --out"


@contextlib.contextmanager
def prepared_folder(out: Path, study: str) -> Iterator[None]:
    """Makes `out/study` and proves that both can be written, before any work is done.

    If the block fails, those of the two that it has made and that are still empty are removed.
    """
    folder = out / study
    new = [each for each in (folder, out) if not each.exists()]
    try:
        with written(folder, ADVICE):
            make_writable(folder)
            make_writable(out)
        yield
    except BaseException:
        for each in new:
            with contextlib.suppress(OSError):
                each.rmdir()
        raise


def save_figure(display: Display, spec: Listed, record: Record, command: str, pictures: Mapping[str, bytes]) -> None:
    """Writes `ID.npz`, a picture in each format, and the manifest that lists them, with the command that draws them.

    All are made before any takes its place, so that arrays, pictures and manifest are of one run;
    pictures of earlier runs in other formats are removed. Other runs' figures stay listed: no other
    process writes to the folder from the moment that the manifest is read.

    Args:
      display: the figure.
      spec: its id, title and axes.
      record: of the run.
      command: that draws it alone.
      pictures: content of its files, by format.
    """
    folder, names = record.folder, [f"{spec.id}.{kind}" for kind in ("npz", *pictures)]
    with written(folder / spec.id, ADVICE), contextlib.ExitStack() as alone:
        folder.mkdir(parents=True, exist_ok=True)  # another run may have made it, failed, and removed it
        with replacing_all([folder / name for name in (*names, manifest.NAME)]) as (arrays, *files, listing):
            save_arrays(display.arrays, arrays)
            for file, picture in zip(files, pictures.values(), strict=True):
                file.write(picture)
            alone.enter_context(locked(folder))
            alone.enter_context(undisturbed())
            entry: dict[str, Any] = {
                "title": spec.title,
                "caption": display.caption,
                "files": names,
                "command": command,
                "arrays": spec.arrays.axes(display.arrays),
            }
            listing.write(record.manifest(spec.id, entry))
        for kind in set(FORMATS) - set(pictures):
            (folder / f"{spec.id}.{kind}").unlink(missing_ok=True)
        record.finished[spec.id] = entry


_BODY = """<h1>jaxqkv figures</h1>
<nav aria-label="Contents" id="contents">
{contents}</nav>
<main>
{sections}</main>
<dialog id="large" aria-label="Figure in full">
<figure>
<img alt="">
<figcaption><span></span><button type="button" class="size">Full size</button><a>Open the file</a>
<button type="button" class="close">Close</button></figcaption>
</figure>
</dialog>
"""
_FIGURE = """<figure id="{{place}}">
<h3>{{id}}. {{title}}</h3>
"""
_PICTURE = """<a class="enlarge" href="{{file}}">
<img src="{{file}}" alt="{{alt}}" width="{{width}}" height="{{height}}" loading="lazy">
</a>
"""
_CAPTION = """<figcaption>
<p>{{caption}}</p>
<div class="command"><code>{{command}}</code><button type="button" class="copy">Copy</button></div>
"""


def write_gallery(out: Path, studies: Sequence[ListedStudy]) -> Path:
    """Writes `out/index.html`: every figure of the studies that the manifests under `out` list, with its caption."""
    contents, sections = "", ""
    for study in studies:
        entries = listed_figures(out / study.name / manifest.NAME)
        ids = [id for id in study.figures if id in entries] if entries else []
        if ids:
            contents += _contents(study.name, {id: study.figures[id].title for id in ids})
            heading = '<h2 id="{{name}}">{{name}}: {{title}}</h2>\n'
            sections += fill(heading, name=study.name, title=study.title)
            sections += "".join(_figure(out, study.name, id, entries[id]) for id in ids)
    page = out / PAGE
    write_page(page, "gallery", "jaxqkv figures", [_BODY.format(contents=contents, sections=sections)])
    return page


def _contents(study: str, titles: Mapping[str, str]) -> str:
    link = '<a href="#{{study}}-{{id}}" title="{{title}}">{{id}}</a>\n'
    links = "".join(fill(link, study=study, id=id, title=title) for id, title in titles.items())
    return fill('<div><a class="study" href="#{{study}}">{{study}}</a>\n', study=study) + f"{links}</div>\n"


def _figure(out: Path, study: str, id: str, entry: Mapping[str, Any]) -> str:
    """Returns one figure's HTML. Only texts of a manifest are shown; which files it may name is known here."""
    files = [file for kind in ("npz", *FORMATS) if (out / study / (file := f"{id}.{kind}")).is_file()]
    title = entry.get("title", "")
    html = fill(_FIGURE, place=f"{study}-{id}", id=id, title=title)
    file = f"{study}/{id}.png"
    width, height = _png_size(out / file) if f"{id}.png" in files else (0, 0)
    if width and height:
        alt = f"Figure {id} of {study}: {title}"
        html += fill(_PICTURE, file=file, alt=alt, width=width, height=height)
    else:
        html += "<p>Arrays only; no picture was drawn.</p>\n"
    html += fill(_CAPTION, caption=entry.get("caption", ""), command=entry.get("command", ""))
    link = '<a href="{{study}}/{{file}}">{{file}}</a>\n'
    links = "".join(fill(link, study=study, file=file) for file in files)
    return f'{html}<p class="files">{links}</p>\n</figcaption>\n</figure>\n'


def _png_size(path: Path) -> tuple[int, int]:
    """Returns width and height from the picture's header, so that the page keeps its place free; 0 where it is none."""
    with path.open("rb") as file:
        header = file.read(24)
    if not header.startswith(b"\x89PNG"):
        return 0, 0
    return int.from_bytes(header[16:20]), int.from_bytes(header[20:24])
