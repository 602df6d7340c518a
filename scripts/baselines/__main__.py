"""A study in PyTorch as a process of its own: `python -m baselines notebook|tuned JOB.json`.

A job has `study`, `models` (folders), `texts`, `device`, `out` (a folder for the arrays, and the pictures if `draw`),
and the study's own options under their names on the command line; `corpus` is a .jsonl file.
"""

import json
import sys
from pathlib import Path

import numpy as np

from baselines import study


def main(side, path):
    job = json.loads(Path(path).read_text())
    figures = study(side, job["study"])(job)
    folder = Path(job["out"]) / job["study"]
    folder.mkdir(parents=True, exist_ok=True)
    for figure, arrays in figures.items():
        np.savez(folder / f"{figure}.npz", **arrays)
    if job["draw"]:
        from baselines.drawing import draw

        draw(job["study"], figures, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
