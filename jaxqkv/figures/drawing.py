"""Draws displays with matplotlib, without windows or pyplot's global state; `Figure`, which a notebook shows."""

import base64
import contextlib
import dataclasses
import gc
import html
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxqkv.errors import JaxqkvError
from jaxqkv.figures import fonts, style
from jaxqkv.figures.displays import Display
from jaxqkv.figures.style import FORMATS
from jaxqkv.runtime import showing
from jaxqkv.runtime.files import replacing, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure


def load_matplotlib() -> Any:
    """Imports matplotlib even if `MPLBACKEND` names a backend that is not installed: no backend is needed here."""
    if "matplotlib" not in sys.modules and (backend := os.environ.pop("MPLBACKEND", None)) is not None:
        try:
            import matplotlib
        finally:
            os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    import matplotlib

    return matplotlib


@contextlib.contextmanager
def _settings(theme: str) -> Iterator[None]:
    """Sets matplotlib's defaults and the theme's settings for the block, instead of the user's own."""
    matplotlib = load_matplotlib()
    with contextlib.ExitStack() as stack:
        with warnings.catch_warnings():  # deprecated settings have defaults too
            warnings.simplefilter("ignore", matplotlib.MatplotlibDeprecationWarning)
            defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
            stack.enter_context(matplotlib.rc_context(defaults | style.settings(theme)))
        # `fonts.complete` warns of characters that no font has.
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        for name in ("mathtext", "font_manager"):
            logger = logging.getLogger(f"matplotlib.{name}")
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Switches garbage collection off in the block; with matplotlib's many objects it took a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def drawn(display: Display, theme: str, dpi: int) -> "MatplotlibFigure":
    """Draws the display on a matplotlib figure of its own."""
    load_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with _settings(theme), _no_garbage_collection():
        figure = Figure(figsize=display.size, layout="constrained", dpi=dpi)
        FigureCanvasAgg(figure)
        display.draw(figure)
        fonts.complete(figure)
    return figure


def rendered(figure: "MatplotlibFigure", kind: str, theme: str) -> memoryview:
    """Returns the bytes of a file in one of `FORMATS`."""
    with _settings(theme), _no_garbage_collection():
        fonts.complete(figure)  # its texts may have been changed since it was drawn
        return _png(figure) if kind == "png" else _saved(figure, kind)


def _png(figure: "MatplotlibFigure") -> memoryview:
    """Draws once, whereas `savefig` draws twice to lay the figure out, and compresses in half the usual time."""
    from matplotlib import __version__
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image, PngImagePlugin

    with contextlib.ExitStack() as stack:
        stack.callback(figure.set_canvas, figure.canvas)  # restores the canvas, perhaps a window's
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    about = PngImagePlugin.PngInfo()
    about.add_text("Software", f"Matplotlib version {__version__}, https://matplotlib.org/")
    buffer = io.BytesIO()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba()))
    if image.getextrema()[-1] == (255, 255):  # nothing is transparent
        image = image.convert("RGB")
    image.save(buffer, format="png", dpi=(figure.dpi, figure.dpi), compress_level=3, pnginfo=about)
    return buffer.getbuffer()


def _saved(figure: "MatplotlibFigure", kind: str) -> memoryview:
    no_date = {"svg": "Date", "pdf": "CreationDate"}[kind]
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=figure.dpi, metadata={no_date: None})
    return buffer.getbuffer()


def pictures(display: Display, kinds: Sequence[str], theme: str, dpi: int) -> list[bytes]:
    """Draws the display once, and returns the bytes of a file in each of these formats."""
    figure = drawn(display, theme, dpi)
    return [bytes(rendered(figure, kind, theme)) for kind in kinds]


def save_arrays(arrays: Mapping[str, Any], file: Any) -> None:
    """Writes a figure's arrays as .npz."""
    by_name: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
    np.savez(file, **by_name)


@dataclasses.dataclass(eq=False, repr=False)
class Figure:
    """One figure of a study: the plotted arrays, and the picture, which a notebook shows.

    It also unpacks: `figure, arrays = …`.

    Attributes:
      study: name of the study.
      id: name on the command line.
      title: title in the table of figures.
      caption: what the figure shows, and of which checkpoint and layer.
      arrays: plotted arrays, by their names in the .npz file.
      figure: matplotlib's figure; changes of it are shown and saved.
      theme: theme of the picture, "light" or "dark".
      axes: names of the axes of each array.
    """

    study: str
    id: str
    title: str
    caption: str
    arrays: dict[str, np.ndarray]
    figure: "MatplotlibFigure"
    theme: str = "light"
    axes: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.figure, self.arrays))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the picture as .png, .svg or .pdf, or the arrays as .npz, as the path ends."""
        path = Path(path)
        kind = path.suffix.removeprefix(".").lower()
        if kind not in (*FORMATS, "npz"):
            endings = ", ".join(f".{each}" for each in (*FORMATS, "npz"))
            raise JaxqkvError(f"{path}: a figure is saved as one of {endings}; give the name such an ending")
        with written(path), replacing(path) as file:
            if kind == "npz":
                save_arrays(self.arrays, file)
            else:
                file.write(rendered(self.figure, kind, self.theme))
        return path

    def __repr__(self) -> str:
        rows = [
            (name, showing.shape_text(array.shape, self.axes.get(name, ())), str(array.dtype))
            for name, array in self.arrays.items()
        ]
        return "\n".join([f"Figure {self._heading}", *showing.aligned(rows)])

    def _repr_html_(self) -> str:
        picture = base64.b64encode(rendered(self.figure, "png", self.theme)).decode()
        width = round(96 * self.figure.get_figwidth())  # a browser has 96 pixels an inch
        return (
            f'<figure style="margin: 0"><img src="data:image/png;base64,{picture}" '
            f'alt="{html.escape(self.title)}" style="width: {width}px; max-width: 100%">\n'
            f"<figcaption><b>{html.escape(self._heading)}.</b> {html.escape(self.caption)}</figcaption></figure>"
        )

    @property
    def _heading(self) -> str:
        return f"{self.id} of {self.study}: {self.title}"
