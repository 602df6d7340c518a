"""Files: pictures and arrays that appear whole or not at all, a manifest a study, one gallery page."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxqkv.errors import JaxqkvError
from jaxqkv.figures.displays import Display
from jaxqkv.figures.drawing import FORMATS, drawn, rendered, save_arrays
from jaxqkv.figures.pages import fill, write_page
from jaxqkv.figures.registry import STUDIES
from jaxqkv.files import make_writable, replacing


def prepare_folder(out: Path, study: str) -> Path:
    """Makes `out/study` and proves that both can be written, before any work is done."""
    folder = out / study
    try:
        make_writable(folder)
        make_writable(out)
    except OSError as error:
        raise JaxqkvError(f"{folder}: cannot be written ({error.strerror}); choose another folder with --out") from None
    return folder


def save_figure(display: Display, id: str, folder: Path, formats: Sequence[str], theme: str, dpi: int) -> list[str]:
    """Writes `ID.npz` and a picture in each format; the names of the files.

    All are made before any takes its place, so that arrays and pictures are of one run; pictures of
    earlier runs in other formats are removed.
    """
    with contextlib.ExitStack() as files:
        save_arrays(display.arrays, files.enter_context(replacing(folder / f"{id}.npz")))
        if formats:
            pictures = {kind: files.enter_context(replacing(folder / f"{id}.{kind}")) for kind in formats}
            draw(display, pictures, theme, dpi)
    for kind in set(FORMATS) - set(formats):
        (folder / f"{id}.{kind}").unlink(missing_ok=True)
    return [f"{id}.{kind}" for kind in ("npz", *formats)]


def draw(display: Display, files: Mapping[str, Any], theme: str, dpi: int) -> None:
    """The display, drawn once and written to a file for each format."""
    figure = drawn(display, theme, dpi)
    for kind, file in files.items():
        file.write(rendered(figure, kind, theme))


def write_manifest(folder: Path, study: str, run: Mapping[str, Any], figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Records a run in `folder/manifest.json`; figures of earlier runs that are still there stay listed."""
    earlier = listed_figures(folder / "manifest.json")
    kept = {id: entry for id, entry in earlier.items() if (folder / f"{id}.npz").exists()}
    manifest = {"study": study, **run, "figures": kept | {id: {**entry, "run": run} for id, entry in figures.items()}}
    with replacing(folder / "manifest.json") as file:
        file.write((json.dumps(manifest, indent=2) + "\n").encode())


def listed_figures(path: Path) -> dict[str, dict[str, Any]]:
    """The figures that a manifest lists; none where there is none that can be read."""
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))["figures"]
        return {id: entry for id, entry in figures.items() if isinstance(entry, dict)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


_BODY = """<h1>jaxqkv figures</h1>
<nav aria-label="Contents" id="contents">
{contents}</nav>
<main>
{sections}</main>
<dialog id="large" aria-label="Figure in full">
<figure>
<img alt="">
<figcaption><span></span><a>Open the file</a></figcaption>
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


def write_gallery(out: Path) -> Path:
    """`out/index.html`: every figure that the manifests under `out` list, with its caption."""
    from jaxqkv.figures.registry import study

    contents, sections = "", ""
    for name in STUDIES:
        entries = listed_figures(out / name / "manifest.json")
        ids = [id for id in study(name).figures if id in entries]
        if ids:
            contents += _contents(name, {id: study(name).figures[id].title for id in ids})
            sections += fill('<h2 id="{{name}}">{{name}}: {{title}}</h2>\n', name=name, title=study(name).title)
            sections += "".join(_figure(out, name, id, entries[id]) for id in ids)
    page = out / "index.html"
    write_page(page, "gallery", "jaxqkv figures", [_BODY.format(contents=contents, sections=sections)])
    return page


def _contents(study: str, titles: Mapping[str, str]) -> str:
    link = '<a href="#{{study}}-{{id}}" title="{{title}}">{{id}}</a>\n'
    links = "".join(fill(link, study=study, id=id, title=title) for id, title in titles.items())
    return fill('<div><a class="study" href="#{{study}}">{{study}}</a>\n', study=study) + f"{links}</div>\n"


def _figure(out: Path, study: str, id: str, entry: Mapping[str, Any]) -> str:
    """One figure. Of a manifest only texts are shown; which files it may name is known here."""
    files = [file for kind in ("npz", *FORMATS) if (out / study / (file := f"{id}.{kind}")).exists()]
    title = entry.get("title", "")
    html = fill(_FIGURE, place=f"{study}-{id}", id=id, title=title)
    if f"{id}.png" in files:
        file = f"{study}/{id}.png"
        width, height = _png_size(out / file)
        alt = f"Figure {id} of {study}: {title}"
        html += fill(_PICTURE, file=file, alt=alt, width=width, height=height)
    else:
        html += "<p>Arrays only; no picture was drawn.</p>\n"
    html += fill(_CAPTION, caption=entry.get("caption", ""), command=entry.get("command", ""))
    link = '<a href="{{study}}/{{file}}">{{file}}</a>\n'
    links = "".join(fill(link, study=study, file=file) for file in files)
    return f'{html}<p class="files">{links}</p>\n</figcaption>\n</figure>\n'


def _png_size(path: Path) -> tuple[int, int]:
    """Width and height from the picture's header, so that the page keeps its place free."""
    with path.open("rb") as file:
        header = file.read(24)
    return int.from_bytes(header[16:20]), int.from_bytes(header[20:24])
