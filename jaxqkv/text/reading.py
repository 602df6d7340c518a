"""Reads text files: UTF-8 with or without a byte-order mark, any line ends; the last line end is removed.

A line ends at LF, CR LF or CR only, not at a form feed or at U+2028.
"""

import codecs
from collections.abc import Iterator
from pathlib import Path

from jaxqkv.errors import CorpusError

# Most bytes of a text or of sentences; a thousand tokens have a few thousand bytes.
MOST_BYTES = 5_000_000
# Byte-order marks of other encodings; UTF-32 first, since its mark begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: Path) -> str:
    """Reads one of the user's text files.

    Raises:
      CorpusError: when it cannot be read, is too long for every model, is not UTF-8 or is empty.
    """
    if text := _read_bounded(path):
        return text
    raise CorpusError(f"{path}: is empty; give a file with text in it")


def read_sentences(path: Path) -> list[str]:
    """Reads the lines of a text file, blank ones left out.

    Raises:
      CorpusError: as `read_text`.
    """
    if sentences := [line for line in _read_bounded(path).split("\n") if line.strip()]:
        return sentences
    raise CorpusError(f"{path}: no sentence in it; give a file with a sentence a line")


def read_document(path: Path) -> str:
    """Reads a whole text file, however long; "" for an empty one.

    Raises:
      CorpusError: when it cannot be read or is not UTF-8.
    """
    try:
        return decode(path.read_bytes(), str(path)).removesuffix("\n")
    except OSError as error:
        raise _unreadable(path, error) from None


def read_lines(path: Path) -> Iterator[str]:
    """Reads the lines of a text file one after another, without their ends.

    Raises:
      CorpusError: when it cannot be read or is not UTF-8.
    """
    offset, number = 0, 1
    try:
        with path.open("rb") as file:
            for piece in file:  # ends at LF, which is part of no other character; CR may be inside
                lines = decode(piece, str(path), offset, number).removesuffix("\n").split("\n")
                offset += len(piece)
                number += len(lines)
                yield from lines
    except OSError as error:
        raise _unreadable(path, error) from None


def decode(content: bytes, where: str, offset: int = 0, line: int | None = None) -> str:
    """Decodes UTF-8, and makes LF the only line end; a byte-order mark is removed.

    Args:
      content: the file, or a piece of it that ends at a line end.
      where: name of the file, for errors.
      offset: offset of the piece in the file, in bytes.
      line: number of the piece's first line, if errors are to name lines.

    Raises:
      CorpusError: for another encoding, naming it if there is a mark, else naming the first wrong byte.
    """
    skipped = 0
    if offset == 0:
        for mark, name in MARKS.items():
            if content.startswith(mark):
                raise CorpusError(f"{where}: {name} text, as its byte-order mark says; save it as UTF-8")
        skipped = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        return _one_line_end(content[skipped:].decode())
    except UnicodeDecodeError as error:
        wrong = skipped + error.start
        if line is not None:
            line += _one_line_end(content[skipped:wrong].decode()).count("\n")
            where = f"{where}, line {line}"
        raise CorpusError(f"{where}: not UTF-8 text (byte {offset + wrong}); save it as UTF-8") from None


def _one_line_end(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _read_bounded(path: Path) -> str:
    """Reads a whole file, which may be a pipe, of at most `MOST_BYTES`."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, error) from None
    if len(content) > MOST_BYTES:
        raise CorpusError(f"{path}: has more than {MOST_BYTES / 1e6:.0f} MB; no model here reads so long a text")
    return decode(content, str(path)).removesuffix("\n")


def _unreadable(path: Path, error: OSError) -> CorpusError:
    return CorpusError(f"{path}: cannot be read ({error.strerror or error})")
