"""Makes the golden arrays of the tests from PyTorch: `python scripts/make_goldens.py [FOLDER]`.

A tiny random model of each architecture, whose sizes are distinct primes, run on an unpadded, a left padded and
a right padded batch. Each file holds the checkpoint, the inputs and every intermediate.
"""

import json
import sys
from pathlib import Path

import numpy as np

from jaxqkv.architectures.base import Architecture
from jaxqkv.architectures.bert import BertConfig
from jaxqkv.architectures.distilbert import DistilBertConfig
from jaxqkv.architectures.gpt2 import GPT2Config
from jaxqkv.architectures.roberta import RobertaConfig
from jaxqkv.model import torch_reference

SIZES = {
    "vocab_size": 41,
    "n_positions": 19,
    "n_embd": 21,
    "n_layer": 2,
    "n_head": 3,
    "n_inner": 31,
    "initializer_range": 0.25,
}
# RoBERTa's padding index, after which positions begin.
PAD = 2
CONFIGS: dict[str, Architecture] = {
    "gpt2": GPT2Config(
        **SIZES,
        activation="gelu_new",
        layer_norm_epsilon=1e-5,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        tie_word_embeddings=True,
    ),
    "bert": BertConfig(**SIZES, activation="gelu", layer_norm_epsilon=1e-12, type_vocab_size=2),
    "roberta": RobertaConfig(**SIZES, activation="gelu", layer_norm_epsilon=1e-5, type_vocab_size=1, pad_token_id=PAD),
    "distilbert": DistilBertConfig(**SIZES, activation="gelu", layer_norm_epsilon=1e-12),
}
BATCH, POS = 5, 11
LENGTHS = np.array([11, 2, 7, 1, 5])


def masks() -> dict[str, np.ndarray]:
    """Returns unpadded, left-padded and right-padded masks, True at real tokens."""
    pos = np.arange(POS)
    right = pos < LENGTHS[:, None]
    return {"unpadded": np.ones((BATCH, POS), bool), "left": right[:, ::-1].copy(), "right": right}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, config in CONFIGS.items():
        model = torch_reference.build(config, seed=0)
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (BATCH, POS))
        arrays = {f"tensor/{key}": value.numpy() for key, value in model.state_dict().items()}
        arrays["config"] = np.array(json.dumps(config.to_json()))
        for padding, mask in masks().items():
            arrays |= {f"{padding}/ids": ids, f"{padding}/mask": mask}
            for field, values in torch_reference.intermediates(model, config, ids, mask).items():
                arrays[f"{padding}/{field}"] = values
        np.savez_compressed(folder / f"{name}.npz", **arrays)
        print(f"{folder / name}.npz: {(folder / name).with_suffix('.npz').stat().st_size / 2**10:.0f} KiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "tests" / "goldens")
