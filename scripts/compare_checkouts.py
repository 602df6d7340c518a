"""Compares what two checkouts of this repository draw, byte for byte: arrays, pictures, captions and titles.

    python scripts/compare_checkouts.py OLD NEW [--work FOLDER] [--study STUDY …]

OLD and NEW are folders of checkouts (`git worktree add OLD main`). Every study is drawn by both, on bundled, fresh
and BERT checkpoints. The exit status is 1 if anything differs. Use it for a change that must not alter any figure.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SMALL = ["--no-cache", "--batch", "8", "--length", "64", "--tokens", "30000"]
# Checkpoints on which each study is drawn.
RUNS: dict[str, list[list[str]]] = {
    "qkv-weights": [
        ["--demo"],
        ["--model", "random:demo-gpt2", "demo-bert"],
        ["--demo", "--compare", "random:demo-gpt2"],
    ],
    "attention-scores": [["--demo"], ["--model", "demo-bert"], ["--model", "random:demo-gpt2"]],
    "token-frequency": [["--demo", *SMALL], ["--model", "demo-gpt2", "--corpus", "python-docs", *SMALL]],
    "weight-tour": [["--demo"], ["--model", "demo-bert"], ["--model", "random:demo-gpt2", "--as-published"]],
    "token-similarity": [
        ["--demo"],
        ["--model", "demo-bert"],
        ["--model", "random:demo-gpt2", "--measure", "cosine"],
    ],
    "qkv-activations": [["--demo"], ["--model", "demo-bert", "--target", "like", "--context", "30"]],
    "adjustment-magnitudes": [["--demo"], ["--model", "demo-bert", "--corpus", "python-docs", "--batch", "3"]],
    "prediction-divergence": [["--demo"], ["--demo", "--as-published", "--skip-first", "--length", "97"]],
    "category-selectivity": [["--demo"], ["--model", "demo-bert"], ["--demo", "--as-published"]],
}


def draw(checkout: Path, study: str, arguments: list[str], out: Path) -> str:
    """Draws a study with the code of a checkout, and returns the error, or nothing."""
    line = [sys.executable, "-m", "jaxqkv.cli", "figures", study, *arguments, "--dpi", "50", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(line, env=environment, cwd=checkout, capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""


def differences(one: Path, other: Path) -> Iterator[str]:
    """Yields the differences between a study's folders of two runs."""
    names = {path.name for folder in (one, other) for path in folder.glob("*") if path.suffix in (".npz", ".png")}
    for name in sorted(names):
        if not ((one / name).exists() and (other / name).exists()):
            yield f"{name}: only one has it"
        elif name.endswith(".npz"):
            yield from (f"{name}: {array}" for array in _arrays(one / name, other / name))
        elif (one / name).read_bytes() != (other / name).read_bytes():
            yield name
    mine, theirs = (json.loads((folder / "manifest.json").read_text())["figures"] for folder in (one, other))
    if list(mine) != list(theirs):
        yield f"figures {list(mine)}, {list(theirs)}"
    for id in mine.keys() & theirs.keys():
        for key in ("title", "caption"):
            if mine[id][key] != theirs[id][key]:
                yield f"{key} of {id}:\n  - {mine[id][key]}\n  + {theirs[id][key]}"


def _arrays(one: Path, other: Path) -> Iterator[str]:
    """Returns names of arrays that differ in name, order, dtype, shape or bytes."""
    with np.load(one, allow_pickle=False) as mine, np.load(other, allow_pickle=False) as theirs:
        if mine.files != theirs.files:
            yield f"arrays {mine.files}, {theirs.files}"
            return
        for name in mine.files:
            a, b = mine[name], theirs[name]
            if (a.dtype, a.shape, a.tobytes()) != (b.dtype, b.shape, b.tobytes()):
                yield name


def main(arguments: list[str] | None = None) -> int:
    """Draws with both checkouts, prints the differences, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--work", type=Path, help="folder for the figures, kept (default a temporary one)")
    parser.add_argument("--study", nargs="+", choices=RUNS, default=list(RUNS), help="studies to draw (default all)")
    options = parser.parse_args(arguments)
    found = 0
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        for study in options.study:
            for number, run in enumerate(RUNS[study]):
                folders = [work / side / f"{study}-{number}" for side in ("old", "new")]
                for checkout, out in zip((options.old, options.new), folders, strict=True):
                    if wrong := draw(checkout.resolve(), study, run, out):
                        print(f"{checkout}: {study} {' '.join(run)}: {wrong}")
                        found += 1
                if all((out / study / "manifest.json").exists() for out in folders):
                    for difference in differences(*(out / study for out in folders)):
                        print(f"{study} {' '.join(run)}: {difference}", flush=True)
                        found += 1
    print(f"{found} differences")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
