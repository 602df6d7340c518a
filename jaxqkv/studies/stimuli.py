"""The texts that come with the package for its studies."""

from pathlib import Path

from jaxqkv.text.reading import read_lines, read_text

FOLDER = Path(__file__).parent


def stimuli(name: str) -> list[str]:
    """Returns the lines of a study's data file, such as `attention_scores/purple.txt`, without comments."""
    return [line for line in read_lines(FOLDER / name) if line and not line.startswith("#")]


def alice() -> str:
    """Returns "Alice's Adventures in Wonderland"."""
    return read_text(FOLDER / "texts" / "alice.txt")
