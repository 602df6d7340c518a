"""Files: pictures and arrays that appear whole or not at all, a manifest a study, one gallery page."""

import contextlib
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxqkv.errors import JaxqkvError
from jaxqkv.figures import style
from jaxqkv.figures.displays import Display
from jaxqkv.figures.registry import STUDIES
from jaxqkv.files import make_writable, replacing

# The first is always drawn: the page shows it.
FORMATS = ("png", "svg", "pdf")


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
        arrays = files.enter_context(replacing(folder / f"{id}.npz"))
        np.savez(arrays, **{name: np.asarray(array) for name, array in display.arrays.items()})
        if formats:
            pictures = {kind: files.enter_context(replacing(folder / f"{id}.{kind}")) for kind in formats}
            draw(display, pictures, theme, dpi)
    for kind in set(FORMATS) - set(formats):
        (folder / f"{id}.{kind}").unlink(missing_ok=True)
    return [f"{id}.{kind}" for kind in ("npz", *formats)]


def draw(display: Display, files: Mapping[str, Any], theme: str, dpi: int) -> None:
    """The display, drawn once and written to a file for each format."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(style.settings(theme)):
        figure = Figure(figsize=display.size, layout="constrained", dpi=dpi)
        FigureCanvasAgg(figure)
        display.draw(figure)
        for kind, file in files.items():
            metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata)
            file.write(buffer.getbuffer())


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


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>jaxqkv figures</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
figure {{ margin: 2rem 0; }}
img {{ max-width: 100%; height: auto; border: 1px solid #8884; background: white; }}
code {{ font-size: .9em; overflow-wrap: anywhere; }}
figcaption, dl {{ color: GrayText; }}
</style>
<h1>jaxqkv figures</h1>
{body}
</html>
"""


def write_gallery(out: Path) -> Path:
    """`out/index.html`: every figure that the manifests under `out` list, with its caption."""
    from jaxqkv.figures.registry import study

    sections = []
    for name in STUDIES:
        entries = listed_figures(out / name / "manifest.json")
        figures = [_figure(name, id, entries[id]) for id in study(name).figures if id in entries]
        if any(figures):
            title = html.escape(f"{name}: {study(name).title}")
            sections.append(f'<h2 id="{name}">{title}</h2>\n{"".join(figures)}')
    page = out / "index.html"
    with replacing(page) as file:
        file.write(_PAGE.format(body="\n".join(sections)).encode())
    return page


def _figure(study: str, id: str, entry: Mapping[str, Any]) -> str:
    caption, title = html.escape(entry.get("caption", "")), html.escape(entry.get("title", ""))
    command = html.escape(entry.get("run", {}).get("command", ""))
    links = " ".join(
        f'<a href="{study}/{html.escape(name)}">{html.escape(name)}</a>' for name in entry.get("files", [])
    )
    picture = f"{study}/{id}.png"
    shown = f'<a href="{picture}"><img src="{picture}" alt="{title}" loading="lazy"></a>'
    if f"{id}.png" not in entry.get("files", []):
        shown = "<p>Arrays only; no picture was drawn.</p>"
    return (
        f'<figure id="{study}-{id}">\n<h3>{id}. {title}</h3>\n{shown}\n'
        f"<figcaption>{caption}<br>{links}<br><code>{command}</code></figcaption>\n</figure>\n"
    )
