"""Pictures are the same whatever matplotlib is told elsewhere, and in every script that an installed font has."""

import io
import os
import pickle
import subprocess
import sys
import warnings

import matplotlib
import matplotlib.font_manager
import numpy as np
import pytest
from conftest import GPT2, write_folder
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.t2CharStringPen import T2CharStringPen
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.text import Text

from jaxqkv.errors import JaxqkvWarning
from jaxqkv.figures import fonts
from jaxqkv.figures.displays import Display, strongest
from jaxqkv.figures.distributions import Violins
from jaxqkv.figures.drawing import drawn, rendered
from jaxqkv.figures.panels import Image, Line, Lines
from jaxqkv.figures.tables import Table
from jaxqkv.studies import qkv_weights

# What a user's matplotlibrc or notebook may say.
SETTINGS = {
    "text.usetex": True,
    "axes.labelsize": 31,
    "axes.grid": True,
    "savefig.dpi": 37,
    "savefig.bbox": "tight",
    "savefig.transparent": True,
    "figure.dpi": 41,
    "figure.constrained_layout.h_pad": 0.5,
    "font.family": "serif",
    "font.sans-serif": ["STIXGeneral"],
    "lines.markersize": 19,
    "lines.antialiased": False,
    "image.cmap": "gray",
    "axes.unicode_minus": False,
    "mathtext.fontset": "cm",
    "xtick.direction": "in",
    "axes.xmargin": 0.4,
    "svg.fonttype": "path",
}


def a_display(title="T", **more):
    values = np.arange(6.0).reshape(2, 3) - 2
    lines = Lines(lines=[Line(x=values[0], y=values[1], label="a")], title="L", xlabel=r"$\frac{x}{2}$", ylabel="y")
    panels = [[Image(values=values, colorbar="unit", xlabel="x", **more), lines]]
    return Display(arrays={}, panels=panels, caption="", size=(6, 3), title=title)


def titled(title):
    """A display that is drawn quickly."""
    line = Line(x=np.arange(2), y=np.arange(2))
    return Display(arrays={}, panels=[[Lines(lines=[line])]], caption="", size=(3, 2), title=title)


def files_of(display, *kinds, theme="light"):
    figure = drawn(display, theme, 50)
    return {kind: bytes(rendered(figure, kind, theme)) for kind in kinds}


def test_what_the_layout_leaves_out_moves_nothing(monkeypatch):
    from matplotlib.artist import Artist

    cells = {"texts": [["a", "b", "c"]] * 2, "cells": True, "tag": "H0"}
    displays = [a_display(**cells), a_display(vmin=-1, vmax=1, xticks=(), yticks=())]  # both ends of the bar pointed
    faster = [drawn(display, "light", 150).canvas for display in displays]
    monkeypatch.setattr(Artist, "set_in_layout", lambda self, included: None)
    for canvas, display in zip(faster, displays, strict=True):
        whole = drawn(display, "light", 150).canvas
        canvas.draw()
        whole.draw()
        for ours, theirs in zip(canvas.figure.axes, whole.figure.axes, strict=True):
            assert not ours.spines["left"].get_in_layout()
            assert theirs.spines["left"].get_in_layout()
            moved = np.abs(ours.get_window_extent().extents - theirs.get_window_extent().extents)
            assert moved.max() < 0.5  # pixels


def test_settings_of_the_user_s_change_nothing_and_are_left_alone():
    import matplotlib.style

    kinds = {"light": ("svg", "pdf"), "dark": ("png",)}
    expected = {theme: files_of(a_display(), *each, theme=theme) for theme, each in kinds.items()}
    with matplotlib.rc_context(SETTINGS | {"path.sketch": (1, 100, 2)}):
        before = matplotlib.rcParams.copy()
        assert {theme: files_of(a_display(), *each, theme=theme) for theme, each in kinds.items()} == expected
        assert dict.__eq__(matplotlib.rcParams, before)
    with matplotlib.style.context("classic"):
        assert files_of(a_display(), "png", theme="dark") == expected["dark"]


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Variables of a process in `tmp_path` that has a matplotlibrc."""
    monkeypatch.chdir(tmp_path)
    lines = [f"{key}: {value}" for key, value in SETTINGS.items() if not isinstance(value, list)]
    (tmp_path / "matplotlibrc").write_text("\n".join(lines))
    return os.environ | {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}


COMMAND = """
from jaxqkv.cli.main import command
command(["figures", "qkv-weights", "2d", "--model", "model", "--dpi", "40", "--quiet"])
"""


@pytest.mark.slow
def test_the_environment_changes_nothing(tmp_path, environment):
    """Neither a matplotlibrc nor a backend that is not installed, as a notebook's may not be."""
    write_folder(tmp_path / "model", GPT2)
    environment["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    done = subprocess.run([sys.executable, "-c", COMMAND], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    picture = qkv_weights.figure("2d", model="model", dpi=40).save("here.png").read_bytes()
    assert (tmp_path / "figures/qkv-weights/2d.png").read_bytes() == picture


# Draws the display that it reads, which needs no JAX.
LIBRARY = """
import os, pickle, sys
from jaxqkv.figures.drawing import drawn, rendered
figure = drawn(pickle.load(sys.stdin.buffer), "light", 50)
sys.stdout.buffer.write(rendered(figure, "png", "light"))
import matplotlib
print(dict.__getitem__(matplotlib.rcParams, "backend"), os.environ["MPLBACKEND"], file=sys.stderr)
"""


@pytest.mark.parametrize(("backend", "kept"), [("svg", "svg"), ("nonsense", None)])
@pytest.mark.slow
def test_a_backend_of_the_user_s_changes_nothing_and_stays_theirs(environment, backend, kept):
    """As far as there is one: so pyplot goes on to show figures in a notebook."""
    environment["MPLBACKEND"] = backend
    display = pickle.dumps(a_display())
    process = [sys.executable, "-c", LIBRARY]
    done = subprocess.run(process, env=environment, input=display, capture_output=True, check=True, timeout=120)
    assert done.stdout == files_of(a_display(), "png")["png"]
    said = done.stderr.decode()
    chosen, told = said.split(maxsplit=1) if kept else said.rsplit(maxsplit=1)
    assert told.strip() == backend
    assert (chosen == kept) == bool(kept)


# --- characters that the usual font lacks ---

CAT, MODEL, GIFT = "猫", "模", "\U0001f381"


def make_font(path, characters, name, compact=False):
    """A font file with a square, 0.7 of the size wide, for each of the characters."""
    names = [".notdef", *(f"u{ord(char):X}" for char in characters)]
    pen = T2CharStringPen(800, None) if compact else TTGlyphPen(None)
    pen.moveTo((50, 0))
    for point in ((50, 700), (750, 700), (750, 0)):
        pen.lineTo(point)
    pen.closePath()
    square = pen.getCharString() if compact else pen.glyph()
    font = FontBuilder(1000, isTTF=not compact)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(char): glyph for char, glyph in zip(characters, names[1:], strict=True)})
    if compact:
        font.setupCFF(name.replace(" ", ""), {"FullName": name}, dict.fromkeys(names, square), {})
    else:
        font.setupGlyf(dict.fromkeys(names, square))
    font.setupHorizontalMetrics(dict.fromkeys(names, (800, 50)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": name, "styleName": "Regular", "psName": name.replace(" ", "")})
    font.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    font.setupPost()
    font.save(path)
    return str(path)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine that has the fonts that matplotlib brings, and those that it is given."""
    manager = matplotlib.font_manager.fontManager
    own = str(matplotlib.get_data_path())
    installed = []
    monkeypatch.setattr(manager, "ttflist", [entry for entry in manager.ttflist if str(entry.fname).startswith(own)])
    monkeypatch.setattr(matplotlib.font_manager, "findSystemFonts", lambda *arguments: list(installed))
    manager._findfont_cached.cache_clear()
    fonts._look_for_new_fonts.cache_clear()

    def install(characters, name, known=True, **options):
        path = make_font(tmp_path / f"{name}.{'otf' if options.get('compact') else 'ttf'}", characters, name, **options)
        installed.append(path)
        if known:
            manager.addfont(path)

    yield install
    manager._findfont_cached.cache_clear()
    fonts._look_for_new_fonts.cache_clear()


def drawn_with(display):
    """The figure, and the characters that are boxes in it, as matplotlib itself says."""
    figure = drawn(display, "light", 50)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.canvas.draw()
    return figure, {chr(int(str(each.message).split()[1])) for each in caught if "missing from" in str(each.message)}


def test_a_font_that_has_the_character_is_used_in_every_place(machine):
    """Draws it as a title, a label, a tick label, a word in a legend, a cell and in a table."""
    machine(CAT, "Cats")
    values = np.arange(4.0)
    image = Image(values=values.reshape(2, 2), texts=[[CAT, "a"], ["b", "c"]])
    violins = Violins(samples=[values, values], names=["a", f"{CAT} b"], colors=["r", "g"], seed=0)
    table = Table(heading=("a", "b"), rows=[("1", CAT)])
    legend = Lines(lines=[Line(x=values, y=values, label=CAT)], ylabel=CAT)
    panels = [[image, violins], [table, legend]]
    figure, boxes = drawn_with(Display(arrays={}, panels=panels, caption="", size=(6, 4), title=f"T {CAT}"))
    assert not boxes
    assert sum(CAT in text.get_text() for text in figure.findobj(Text)) >= 6


@pytest.mark.parametrize(("compact", "known"), [(True, False), (False, True)])
def test_fonts_of_either_make_in_files_of_every_kind(machine, caplog, compact, known):
    """Also one that was installed after matplotlib looked for fonts."""
    machine(CAT, "Cats", known=known, compact=compact)
    figure, boxes = drawn_with(titled(CAT))
    assert not boxes
    for kind in ("png", "svg", "pdf"):
        file = bytes(rendered(figure, kind, "light"))
        assert kind != "pdf" or b"Cats" in file
    assert not caplog.records


def test_what_is_drawn_is_the_glyph(machine):
    """A square in the ink's colour."""
    machine(CAT, "Cats")
    from matplotlib.image import imread

    def ink(text):
        figure = drawn(titled(""), "light", 100)
        figure.clear()
        figure.text(0.2, 0.2, text, fontsize=36)
        return int((imread(io.BytesIO(rendered(figure, "png", "light")))[..., 0] < 0.5).sum())

    side = 0.7 * 36 / 72 * 100
    assert ink(CAT) == pytest.approx(side**2, rel=0.06)
    assert ink(2 * CAT) == pytest.approx(2 * side**2, rel=0.06)


def test_several_fonts_stand_in_for_one_text(machine):
    machine(CAT, "Cats")
    machine(MODEL, "Models")
    figure, boxes = drawn_with(titled(f"{CAT} é {MODEL}"))
    assert not boxes
    assert figure.get_suptitle() == f"{CAT} é {MODEL}"


def test_what_no_font_has_is_named_once(machine):
    """And the rest is drawn in the font that has it."""
    machine(CAT, "Cats")
    with pytest.warns(JaxqkvWarning) as caught:
        _, boxes = drawn_with(titled(f"{CAT} {MODEL} {GIFT} {MODEL}"))
    assert boxes == {MODEL, GIFT}
    (warning,) = caught
    assert str(warning.message) == (
        f"no font on this machine has {MODEL} (U+6A21), {GIFT} (U+1F381): boxes are drawn in their place; install a "
        "font that has, such as Noto Emoji and Noto Sans CJK, and draw again"
    )


def test_mathematics_has_fonts_of_its_own(machine, caplog):
    machine(CAT, "Cats")
    with pytest.warns(JaxqkvWarning, match=rf"no font on this machine has {CAT} \(U\+732B\)"):
        drawn(titled(f"$x$ of {CAT}"), "light", 50)
    assert not caplog.records


def test_texts_that_were_changed_since(machine):
    machine(CAT, "Cats")
    figure = drawn(titled("T"), "light", 50)
    assert rendered(figure, "png", "light")
    figure.suptitle(CAT)
    figure.axes[0].set_title(MODEL)
    with pytest.warns(JaxqkvWarning) as caught:
        assert None not in [rendered(figure, kind, "light") for kind in ("png", "svg")]
    assert len(caught) == 1
    assert f"has {MODEL} (U+6A21):" in str(caught[0].message)


def test_fonts_are_looked_for_only_where_a_character_is_missing(machine, monkeypatch):
    monkeypatch.setattr(fonts, "_families", lambda: pytest.fail("searched"))
    drawn_with(titled("Größe × модель · … − αβγ ↵"))


def test_placeholders_and_symbols_are_no_fonts_for_text():
    """Matplotlib brings a font that has a box for every character, and some with glyphs at other places."""
    assert not [name for name in fonts._families() if name.startswith(("Last Resort", "cm", "STIXSize", "STIXNon"))]
    assert "DejaVu Sans" in fonts._families()


def test_the_strongest_heads_are_named():
    values = np.array([[0.5, -2.0, np.nan], [1.0, np.inf, -1.0]])
    assert strongest(values) == "0.1 (-2.00), 1.0 (1.00), 1.2 (-1.00)"
    assert strongest(values, 1) == "0.1 (-2.00)"
    assert strongest(np.full((2, 3), np.nan)) == "none"
