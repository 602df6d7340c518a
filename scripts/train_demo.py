"""Trains the two bundled checkpoints on a folder of texts, or measures them.

    python scripts/train_demo.py FOLDER                      trains both into jaxqkv/demo
    python scripts/train_demo.py FOLDER --resume             continues an interrupted training
    python scripts/train_demo.py FOLDER --evaluate           measures those in jaxqkv/demo on held-out texts
    python scripts/train_demo.py FOLDER --only demo-bert --steps 200 --out my-demo

FOLDER holds .txt files (a document each) and .jsonl files (a document a line, in the field "text");
the texts of Python's own help (`pydoc_data.topics`) are added. The last twentieth of every document
is held out. Needs the extra `train` (optax). On a CPU every core trains on a part of each step's windows.

The learning rate rises, stays, and falls over the last three fifths of the steps. Until it falls, a training
can be resumed with another --steps: with fewer to end it early, with more to take it further.
"""

import argparse
import os
from pathlib import Path

from training.evaluation import evaluate
from training.loop import train
from training.sizes import CONFIGS
from training.texts import read_documents

import jaxqkv
from jaxqkv.checkpoints.checkpoint import BUNDLED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with .txt and .jsonl files")
    parser.add_argument("--only", choices=CONFIGS, help="train only this one")
    parser.add_argument("--steps", type=int, default=10_000, help="training steps (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=BUNDLED["demo-gpt2"].parent, help="default: jaxqkv/demo")
    parser.add_argument("--resume", action="store_true", help="continue from the state saved in --out")
    parser.add_argument("--evaluate", action="store_true", help="measure the checkpoints in --out without training")
    arguments = parser.parse_args()
    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={os.cpu_count()}")
    documents = read_documents(arguments.folder)
    for name, config in CONFIGS.items():
        if arguments.only not in (None, name):
            continue
        if arguments.evaluate:
            print(name)
            for measure, value in evaluate(jaxqkv.load(arguments.out / name), documents).items():
                print(f"  {value:6.3f}  {measure}", flush=True)
        else:
            train(name, config, documents, arguments.out, arguments.steps, seed=arguments.seed, resume=arguments.resume)


if __name__ == "__main__":
    main()
