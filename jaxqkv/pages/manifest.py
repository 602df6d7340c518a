"""`manifest.json`: what was run, and the figures that there are; of a study's folder, in which runs may meet."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxqkv.runtime import console
from jaxqkv.runtime.files import read_whole

NAME = "manifest.json"
# Of a manifest, whose like have some ten thousand.
MOST_BYTES = 100_000_000
# What an entry may hold, by the type that its reader counts on.
ENTRY = {"title": str, "caption": str, "files": list, "command": str, "run": dict}


@dataclasses.dataclass
class Record:
    """A run, as the manifest of its folder tells it.

    Attributes:
      folder: of the study.
      study: its name.
      about: what was run: command, checkpoint, seed, …
      computing: seconds so far; `drawing` too.
      finished: the figures that are in the folder, by id: title, caption, names of files, command, axes of arrays.
    """

    folder: Path
    study: str
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    computing: float = 0.0
    drawing: float = 0.0
    finished: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def seconds(self) -> dict[str, float]:
        """Of computing and of drawing, to the millisecond."""
        return {"computing": round(self.computing, 3), "drawing": round(self.drawing, 3)}

    def manifest(self, id: str, entry: Mapping[str, Any]) -> bytes:
        """The manifest's content with one more figure; those of other runs that are still there stay listed.

        Whoever writes it holds the folder's lock from before this call on, so that nothing is lost between.
        """
        there = {path.name for path in self.folder.iterdir()}
        earlier = listed_figures(self.folder / NAME)
        if NAME in there and not earlier:
            console.note(f"{self.folder / NAME} lists no figures that can be read; it is begun anew")
        kept = {id: figure for id, figure in earlier.items() if f"{id}.npz" in there}

        def text(figures: Mapping[str, Any]) -> bytes:
            content = {"study": self.study, **self.about, "seconds": self.seconds, "figures": figures}
            return (json.dumps(content, indent=2) + "\n").encode()

        made = {id: {**entry, "run": self.about}}
        try:
            return text(kept | made)
        except RecursionError:  # no manifest of this package's is so deep
            return text(made)


def listed_figures(path: Path) -> dict[str, dict[str, Any]]:
    """The figures that a manifest lists, with what they are counted on to have; none where it cannot be read."""
    try:
        figures = json.loads(read_whole(path, MOST_BYTES).decode())["figures"]
        return {id: entry for id, entry in figures.items() if _is_entry(entry)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(name, kind()), kind) for name, kind in ENTRY.items())
        and all(isinstance(name, str) for name in entry.get("files", []))
    )
