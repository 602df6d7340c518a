"""Reads the documents of a text file (.txt), a file of JSON objects (.jsonl) or a table (.parquet), as they are used.

Files without documents give none.
"""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxqkv.errors import CorpusError, JaxqkvWarning, first_line, listed
from jaxqkv.text.reading import read_document, read_lines

# Rows of a table that are in memory at a time, and bytes of the read buffer.
ROWS = 256
BUFFER = 1 << 20
# Arrow's types of text; a dictionary of one of them is text too.
TEXT_TYPES = ("string", "large_string", "string_view")


def read_text_file(file: Path, documents: str, text_column: str) -> Iterator[str]:
    """Reads a text file as one document, or as paragraphs separated by blank lines."""
    if documents == "files":
        if text := read_document(file):
            yield text
        return
    paragraph: list[str] = []
    for line in read_lines(file):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield "\n".join(paragraph)


def read_jsonl(file: Path, documents: str, text_column: str) -> Iterator[str]:
    """Reads the text of every non-blank line; other fields may have any type."""
    for number, line in enumerate(read_lines(file), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{where}: not JSON ({error})") from None
        yield text_of(fields, text_column, where)


def read_parquet(file: Path, documents: str, text_column: str) -> Iterator[str]:
    """Reads only the text column of a table, batch by batch."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        if not file.stat().st_size:
            warnings.warn(f"{file}: has 0 bytes, so it is left out; was it copied whole?", JaxqkvWarning, stacklevel=2)
            return
        with parquet.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False) as table:
            if not table.metadata.num_rows:
                return
            _check_column(table.schema_arrow, text_column, str(file))
            for batch in table.iter_batches(batch_size=ROWS, columns=[text_column]):
                for value in batch.column(text_column):
                    yield text_of({text_column: value.as_py()}, text_column, f"{file}, row {number}")
                    number += 1
    except UnicodeDecodeError:
        raise CorpusError(f"{file}, row {number}: {text_column!r} is not UTF-8 text") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(f"{file}: not a readable parquet file ({first_line(error)})") from None


def _check_column(schema: Any, column: str, where: str) -> None:
    """Refuses a table unless it has exactly one column of that name, with text in it."""
    import pyarrow

    if schema.names.count(column) > 1:
        raise CorpusError(f"{where}: has {schema.names.count(column)} columns {column!r}; keep one")
    if column not in schema.names:
        raise CorpusError(_no_column(where, column, schema.names))
    kind = schema.field(column).type
    text = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if str(text) not in TEXT_TYPES:
        raise CorpusError(f"{where}: column {column!r} is {kind}, not text; name the text column with --text-column")


def text_of(row: Any, column: str, where: str) -> str:
    """Returns the text in a table's row or in a JSON object.

    Raises:
      CorpusError: for a row without that field, or without text in it.
    """
    if not isinstance(row, dict) or column not in row:
        raise CorpusError(_no_column(where, column, list(map(str, row)) if isinstance(row, dict) else []))
    text = row[column]
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        raise CorpusError(f"{where}: {column!r} is {kind}, not text")
    if not text.isascii():  # half an emoji, as truncated JSON has it, is no character
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _no_column(where: str, column: str, names: list[str]) -> str:
    has = f"it has {listed(names)}" if names else "it has no fields"
    return f"{where}: no column {column!r}; {has}; name the text column with --text-column"


READERS = {".txt": read_text_file, ".jsonl": read_jsonl, ".parquet": read_parquet}
