"""The cases that are whole processes: importing, first use of a checkpoint, and the five studies."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from benchmarks.measuring import BenchmarkError, Whole, array_difference
from jaxqkv.studies.stimuli import stimuli

IMPORTS = {
    "jaxqkv": "from jaxqkv import load",
    "tuned": "import torch; from transformers import GPT2Model",
    "notebook": "import numpy, torch; from transformers import AutoModelForCausalLM",
}
# Of a token at most, so that there are enough.
CHARACTERS = 6
# Drawn at random, on each side with its own generator; and a p-value of 1e-100 has no digits to compare.
NOT_COMPARED = {("1", "raw"), ("1", "scaled"), ("distributions", "random"), ("weight-histogram", "p")}


def import_case() -> Whole:
    def command(side: str, out: Path) -> Sequence[str]:
        return [sys.executable, "-c", IMPORTS[side.split()[0]]]

    return Whole("import", command)


def first_use_case(name: str, folder: Path, batch: int, pos: int, device: str) -> Whole:
    """From nothing to Q, K and V of a batch: a process that imports, loads and computes once."""
    spec = {"kind": "forward", "folder": str(folder), "batch": batch, "pos": pos, "first use": True, "device": device}

    def command(side: str, out: Path) -> Sequence[str]:
        kept = {"compiled programs": side == "jaxqkv"}
        result = str(out / "result.npy")
        return [sys.executable, "-m", "benchmarks.worker", side.split()[0], json.dumps(spec | kept), result]

    def difference(ours: Path, theirs: Path) -> float:
        return array_difference(*(np.load(side / "result.npy", allow_pickle=False) for side in (ours, theirs)))

    return Whole(name, command, difference)


def study_case(
    study: str, folders: Sequence[Path], draw: bool, corpus: Path | None = None, tokens: int = 0, batch: int = 0,
    device: str = "cpu",
) -> Whole:  # fmt: skip
    """A study, all of its figures: the arrays alone, or the pictures too."""

    def command(side: str, out: Path) -> Sequence[str]:
        if side.startswith("jaxqkv"):
            words = [sys.executable, "-m", "jaxqkv.cli", "figures", study, "--out", out]
            words += [] if draw else ["--arrays-only"]
            words += ["--no-compilation-cache"] if side.endswith("cold") else []
            if corpus:
                words += ["--corpus", corpus, "--no-cache", "--tokens", tokens, "--batch", batch]
            return [*map(str, words), "--model", *map(str, folders)]
        job = {
            "study": study,
            "models": [str(folder) for folder in folders],
            "texts": stimuli(
                {"token-similarity": "token_similarity/her.txt"}.get(study, "attention_scores/purple.txt")
            ),
            "target": " her",
            "corpus": corpus and str(corpus),
            "tokens": tokens,
            "batch": batch,
            "device": device,
            "out": str(out),
            "draw": draw,
        }
        path = out / "job.json"
        path.write_text(json.dumps(job))
        return [sys.executable, "-m", "baselines", side, str(path)]

    name = f"{study}, {'with pictures' if draw else 'arrays'}"
    return Whole(name, command, lambda ours, theirs: study_difference(ours / study, theirs / study))


def study_difference(ours: Path, theirs: Path) -> float:
    """Of every array that both sides have, the largest difference."""
    differences = []
    for path in sorted(theirs.glob("*.npz")):
        one, two = (np.load(each, allow_pickle=False) for each in (ours / path.name, path))
        with one as mine, two as other:
            for name in sorted(set(mine.files) & set(other.files)):
                if (path.stem, name) not in NOT_COMPARED:
                    pair = (each[name].astype(np.float64) for each in (mine, other))
                    differences.append(array_difference(*pair, f"{ours.name} {path.stem} {name}"))
    if not differences:
        raise BenchmarkError(f"{ours.name}: there is nothing to compare")
    return max(differences)


def write_corpus(path: Path, documents: Iterable[str], tokens: int) -> Path:
    """Documents as a .jsonl file, text for so many tokens; over and over, if there is less."""
    characters = 0
    with path.open("w") as file:
        while characters < CHARACTERS * tokens:
            before = characters
            for text in documents:
                file.write(json.dumps({"text": text}) + "\n")
                characters += len(text)
                if characters >= CHARACTERS * tokens:
                    break
            if characters == before:
                raise BenchmarkError("the corpus has no text")
    return path
