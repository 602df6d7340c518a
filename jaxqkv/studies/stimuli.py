"""Texts that the package carries for its studies."""

from pathlib import Path

FOLDER = Path(__file__).parent


def stimuli(name: str) -> list[str]:
    """The lines of a data file of the package, without its heading."""
    text = (FOLDER / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]
