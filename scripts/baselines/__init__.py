"""What jaxqkv is measured against: the same results in PyTorch, as a notebook has them and as an expert would."""

from importlib import import_module
from pathlib import Path

import numpy as np

SCORE_EDGES, PATTERN_EDGES = np.linspace(-20, 20, 101), np.linspace(0, 1, 91)
CORRELATION_EDGES = np.linspace(-1, 1, 101)


def study(side, name):
    """The function of a study of the notebook or the tuned side."""
    return getattr(import_module(f"baselines.{side}_studies"), name.replace("-", "_"))


def load_tokenizer(folder):
    """The tokenizer beside a checkpoint's weights."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
