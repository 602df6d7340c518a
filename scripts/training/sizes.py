"""Configs of the two bundled checkpoints, the size of a training step, and the blocks it is computed in."""

from typing import NamedTuple

import jax

from jaxqkv.architectures.bert import BertConfig
from jaxqkv.architectures.gpt2 import GPT2Config
from jaxqkv.checkpoints.config import Config

VOCAB, LENGTH = 4096, 256
SIZES = {
    "vocab_size": VOCAB,
    "n_positions": LENGTH,
    "n_embd": 128,
    "n_layer": 8,
    "n_head": 8,
    "n_inner": 512,
    "initializer_range": 0.02,
}
CONFIGS: dict[str, Config] = {
    "demo-gpt2": GPT2Config(
        **SIZES,
        activation="gelu_new",
        layer_norm_epsilon=1e-5,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        tie_word_embeddings=True,
    ),
    "demo-bert": BertConfig(**SIZES, activation="gelu", layer_norm_epsilon=1e-12, type_vocab_size=2),
}
BERT_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
END = "<|endoftext|>"
WINDOWS = 32  # of `LENGTH` tokens, in a step


class Blocks(NamedTuple):
    """How much is computed at a time.

    Attributes:
      windows: windows in a microbatch.
      queries: queries whose attention is computed.
      tokens: tokens whose logits are computed.
    """

    windows: int
    queries: int
    tokens: int


# `CACHED` fits in the cache of a processor's core. `WHOLE` is all at once: an accelerator is idle between small parts.
CACHED, WHOLE = Blocks(2, 64, 256), Blocks(WINDOWS, LENGTH, WINDOWS * LENGTH)


def blocks() -> Blocks:
    """Returns the blocks for JAX's default backend."""
    return CACHED if jax.default_backend() == "cpu" else WHOLE
