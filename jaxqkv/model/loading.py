"""`load`: opens a checkpoint for running."""

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxqkv.architectures import open_checkpoint
from jaxqkv.model.model import Model
from jaxqkv.text.tokenizers import Tokenizer


def load(
    spec: Any,
    *,
    config: Any = None,
    revision: str | None = None,
    seed: int = 0,
    dtype: Any = jnp.float32,
    stream: bool | None = None,
    tokenizer: Any = None,
    mesh: Mesh | None = None,
) -> Model:
    """Opens a checkpoint for running; weights are read when they are first needed.

    Args:
      spec: hub id, folder, `demo-gpt2`, `demo-bert` or `random:SPEC`; or an open `Checkpoint`. Or a GPT-2, BERT,
        RoBERTa or DistilBERT model of transformers, with or without a head: its config and its tensors are copied, so
        that later changes have no effect, nor have its code, hooks and dropout. Or a mapping of such tensors by name,
        as `state_dict()` returns it: arrays of PyTorch, NumPy, or any library with `__array__` or `__dlpack__`.
      config: config of such a mapping: the contents of config.json, a config of transformers, or one of this package.
      revision: branch, tag or commit on the hub.
      seed: seed of the fresh weights of `random:SPEC`.
      dtype: dtype of the arithmetic.
      stream: whether to read each layer's weights anew at every run, instead of keeping them in memory between runs;
        True above 2 GiB unless given.
      tokenizer: tokenizer to use instead of the checkpoint's: a folder with tokenizer files, a `tokenizers.Tokenizer`,
        or a fast tokenizer of transformers. An object is copied, without its padding and truncation.
      mesh: from `make_mesh`, to run on several devices.

    Raises:
      CheckpointError: naming file, key and reason.
      JaxqkvError: for a tokenizer of transformers that runs in Python.
    """
    checkpoint = open_checkpoint(spec, config=config, revision=revision, seed=seed)
    own = None if tokenizer is None else Tokenizer.of(tokenizer, checkpoint.config)
    return Model(checkpoint, dtype=dtype, stream=stream, tokenizer=own, mesh=mesh)
