"""Finds fonts for characters in titles and labels that the usual font lacks, such as 猫."""

import contextlib
import functools
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from jaxqkv.errors import JaxqkvWarning, escaped, listed

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.text import Text

# Families that are not used: their glyphs are placeholders, or belong to other characters.
UNFIT = ("Last Resort", "STIXNonUnicode", "STIXSize", "cm")
# First words of the names of characters that Noto Sans CJK has.
CJK = {"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HANGUL", "IDEOGRAPHIC", "BOPOMOFO", "FULLWIDTH"}
FIRST_EMOJI = 0x1F000

# Characters of each figure that were warned of because no font has them.
_noted: "WeakKeyDictionary[Figure, set[str]]" = WeakKeyDictionary()


def complete(figure: "Figure") -> None:
    """Adds installed fonts to a figure's texts for the characters that their own fonts lack.

    One `JaxqkvWarning` for each figure names the characters that no font has. Mathematics has its own fonts; characters
    that they lack are named too.
    """
    noted = _noted.setdefault(figure, set())
    absent: set[str] = set()
    for text in _texts(figure):
        lacking = {char for char in text.get_text() if not char.isascii()} - noted
        if not lacking:
            continue
        font = text.get_fontproperties()
        lacking -= _characters_of(font)
        if lacking and not _is_math(text):
            families = _families_with(lacking, font)
            if families:
                text.set_fontfamily([*font.get_family(), *families])
                lacking -= _characters_of(text.get_fontproperties())
        absent |= lacking
    if absent:
        noted |= absent
        warnings.warn(_about(sorted(absent)), JaxqkvWarning, stacklevel=2)


def _about(absent: Sequence[str]) -> str:
    names = listed([f"{escaped(char)} (U+{ord(char):04X})" for char in absent])
    return (
        f"no font on this machine has {names}: boxes are drawn in their place; install a font that has, such as "
        f"{' and '.join(sorted({_usual_font(char) for char in absent}))}, and draw again"
    )


def _usual_font(char: str) -> str:
    """Returns the name of a free font that has the character."""
    words = unicodedata.name(char, "").split()
    if words and words[0] in CJK:
        return "Noto Sans CJK"
    return "Noto Emoji" if ord(char) >= FIRST_EMOJI else "the Noto Sans of its script"


def _texts(artist: "Artist") -> Iterator["Text"]:
    """Yields every text of a figure or a part of it, except tick labels that are numbers."""
    from matplotlib.axis import Axis
    from matplotlib.table import Table
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatter, NullFormatter, ScalarFormatter

    if isinstance(artist, Axis):  # its ticks take long to make, and are made again when it is drawn
        yield from (artist.label, artist.offsetText)
        if not isinstance(artist.get_major_formatter(), LogFormatter | NullFormatter | ScalarFormatter):
            yield from artist.get_ticklabels()
        return
    if isinstance(artist, Text):
        yield artist
    if isinstance(artist, Table):
        yield from (cell.get_text() for cell in artist.get_celld().values())
    for child in artist.get_children():
        yield from _texts(child)


def _is_math(text: "Text") -> bool:
    """Tells whether the text, or a part of it, is drawn as mathematics."""
    from matplotlib import cbook

    return text.get_parse_math() and bool(cbook.is_math_text(text.get_text()))


# --- fonts ---


def _characters_of(font: "FontProperties") -> frozenset[str]:
    """Returns the characters of a text's font and of its fallback fonts."""
    sets = [_characters_in(path) for family in font.get_family() if (path := _file(family, font)) is not None]
    return frozenset().union(*sets)


def _families_with(wanted: Iterable[str], font: "FontProperties") -> list[str]:
    """Returns installed families that together have as many of the characters as possible, in the style of `font`."""
    families: list[str] = []
    lacking = set(wanted)
    for newly_installed in (False, True):
        if newly_installed and lacking:
            _look_for_new_fonts()
        for family in _families():
            if not lacking:
                return families
            path = _file(family, font) if lacking & _characters_in_family(family) else None
            if path is not None and (had := lacking & _characters_in(path)):
                families.append(family)
                lacking -= had
    return families


def _families() -> list[str]:
    """Returns every readable family, in the order of preference."""
    from matplotlib import font_manager

    names = {entry.name for entry in font_manager.fontManager.ttflist if not entry.name.startswith(UNFIT)}
    return sorted(names, key=lambda name: (not name.startswith("Noto Sans"), "Sans" not in name, name))


def _characters_in_family(name: str) -> frozenset[str]:
    """Returns the characters of a family's plainest font, without the slow search of `_file`."""
    from matplotlib import font_manager

    fonts = [entry for entry in font_manager.fontManager.ttflist if entry.name == name]
    plainest = min(fonts, key=lambda entry: (entry.style != "normal", entry.weight not in (400, "normal", "regular")))
    return _characters_in(plainest.fname)


def _file(family: str, font: "FontProperties") -> Any:
    """Returns the file of a family that is nearest to the style of `font`; None if there is no such family."""
    from matplotlib import font_manager

    wanted = font.copy()
    wanted.set_family([family])
    with contextlib.suppress(ValueError):
        return font_manager.findfont(wanted, fallback_to_default=False)
    return None


@functools.cache
def _characters_in(path: Any) -> frozenset[str]:
    """Returns the characters that a font file has a glyph for; none if it cannot be read."""
    from matplotlib import font_manager

    try:
        return frozenset(map(chr, font_manager.get_font(path).get_charmap()))
    except (OSError, RuntimeError, ValueError):
        return frozenset()


@functools.cache
def _look_for_new_fonts() -> None:
    """Adds fonts that were installed after matplotlib made its list."""
    from matplotlib import font_manager

    known = {str(entry.fname) for entry in font_manager.fontManager.ttflist}
    for path in sorted(set(font_manager.findSystemFonts()) - known):
        with contextlib.suppress(OSError, RuntimeError, ValueError, NotImplementedError):
            font_manager.fontManager.addfont(path)
