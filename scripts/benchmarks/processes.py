"""The cases that are whole processes: importing, first use of a checkpoint, and studies."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring import BenchmarkError, Whole, array_difference
from benchmarks.studies import STUDIES

IMPORTS = {
    "jaxqkv": "from jaxqkv import load",
    "tuned": "import torch; from transformers import GPT2Model",
    "notebook": "import numpy, torch; from transformers import AutoModelForCausalLM",
}


def import_case() -> Whole:
    def command(side: str, out: Path) -> Sequence[str]:
        return [sys.executable, "-c", IMPORTS[side.split()[0]]]

    return Whole("import", command)


def first_use_case(name: str, folder: Path, batch: int, pos: int, device: str) -> Whole:
    """Returns the case of a process that imports, loads, and computes Q, K and V of a batch once."""
    spec = {"kind": "forward", "folder": str(folder), "batch": batch, "pos": pos, "first use": True, "device": device}

    def command(side: str, out: Path) -> Sequence[str]:
        kept = {"compiled programs": side == "jaxqkv"}
        result = str(out / "result.npy")
        return [sys.executable, "-m", "benchmarks.worker", side.split()[0], json.dumps(spec | kept), result]

    def difference(ours: Path, theirs: Path) -> float:
        return array_difference(*(np.load(side / "result.npy", allow_pickle=False) for side in (ours, theirs)))

    return Whole(name, command, difference)


def study_case(study: str, folders: Sequence[Path], draw: bool, words: Sequence[str], job: dict[str, Any]) -> Whole:
    """Returns the case of a study with all figures of the baselines: arrays alone, or pictures too.

    Args:
      study: its name.
      folders: checkpoints.
      draw: whether pictures are drawn.
      words: further words of the command, from `studies.inputs`.
      job: of the baselines, from there too.
    """
    models = [str(folder) for folder in folders]

    def command(side: str, out: Path) -> Sequence[str]:
        if side.startswith("jaxqkv"):
            start = [sys.executable, "-m", "jaxqkv.cli", "figures", study, *STUDIES[study].figures, "--out", str(out)]
            start += [] if draw else ["--arrays-only"]
            start += ["--no-compilation-cache"] if side.endswith("cold") else []
            return [*start, *words, "--model", *models]
        path = out / "job.json"
        path.write_text(json.dumps({"study": study, "models": models, "out": str(out), "draw": draw} | job))
        return [sys.executable, "-m", "baselines", side, str(path)]

    name = f"{study}, {'with pictures' if draw else 'arrays'}"
    return Whole(name, command, lambda ours, theirs: study_difference(ours / study, theirs / study))


def study_difference(ours: Path, theirs: Path) -> float:
    """Returns the largest difference of all arrays that both sides have and that are not drawn at random."""
    differences = []
    for path in sorted(theirs.glob("*.npz")):
        one, two = (np.load(each, allow_pickle=False) for each in (ours / path.name, path))
        with one as mine, two as other:
            for name in sorted(set(mine.files) & set(other.files)):
                if ours.name in STUDIES and (path.stem, name) in STUDIES[ours.name].random:
                    continue
                pair = (each[name].astype(np.float64) for each in (mine, other))
                differences.append(array_difference(*pair, f"{ours.name} {path.stem} {name}"))
    if not differences:
        raise BenchmarkError(f"{ours.name}: there is nothing to compare")
    return max(differences)
