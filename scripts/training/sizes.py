"""Configs of the two bundled checkpoints, and the size of a training step."""

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
# Windows of `LENGTH` tokens in a step, and in a microbatch, which stays in the cache of a processor's core.
WINDOWS, MICROBATCH = 16, 2
