"""Finds a checkpoint by its name.

    gpt2, bert-large-uncased, owner/name   from the Hugging Face hub or its local cache
    path/to/folder                         a folder in Hugging Face's format; never the network
    demo-gpt2, demo-bert                   the small trained checkpoints bundled with the package
    random:SPEC                            the architecture of SPEC with freshly initialised weights

A model of transformers, or a mapping of its tensors, is a checkpoint without a name.

Weights are read from safetensors only: nothing in a checkpoint is ever executed. Files are mapped, not loaded, so that
a tensor takes memory only while it is used.
"""

import os
from typing import Any

from jaxqkv.checkpoints.checkpoint import BUNDLED, Checkpoint, as_path, is_path
from jaxqkv.checkpoints.config import Registry
from jaxqkv.checkpoints.folder import INDEX, SINGLE, FolderCheckpoint
from jaxqkv.checkpoints.fresh import RandomCheckpoint
from jaxqkv.checkpoints.hub import download
from jaxqkv.checkpoints.memory import is_in_memory, open_memory
from jaxqkv.errors import CheckpointError
from jaxqkv.text.tokenizers import TOKENIZER_FILES

HUB_FILES = ("config.json", SINGLE, INDEX, "model-?????-of-?????.safetensors", *TOKENIZER_FILES)


def open_checkpoint(
    spec: Any, registry: Registry, *, config: Any = None, revision: str | None = None, seed: int = 0
) -> Checkpoint:
    """Opens a checkpoint, reading its config and the headers of its files but no weights.

    Args:
      spec: a hub id, a folder, a bundled name or `random:SPEC`, as in the module's docstring; an open checkpoint, which
        is returned as it is; a model of transformers, or the mapping that its `state_dict()` returns.
      registry: the known architectures.
      config: config of such a mapping.
      revision: branch, tag or commit on the hub.
      seed: seed of the fresh weights of `random:SPEC`.

    Raises:
      CheckpointError: naming file, key and reason.
    """
    if is_in_memory(spec):
        return open_memory(spec, config, registry)
    if config is not None:
        raise CheckpointError("config= goes with a state_dict; a checkpoint with a name has its own config.json")
    if isinstance(spec, Checkpoint):
        return spec
    if not isinstance(spec, str | os.PathLike):
        raise CheckpointError(
            f"expected the name of a checkpoint, a folder, a model of transformers or a state_dict, not "
            f"{type(spec).__name__}"
        )
    spec = os.fspath(spec)
    if not spec:
        raise CheckpointError("the name of the checkpoint is empty; give a hub id, a folder or demo-gpt2")
    if spec.startswith("random:"):
        return RandomCheckpoint(spec, seed, registry, revision)
    if spec in BUNDLED:
        return FolderCheckpoint(spec, BUNDLED[spec], registry)
    if is_path(spec):
        return FolderCheckpoint(spec, as_path(spec), registry)
    # The config first: an unsupported checkpoint is refused before its weights are fetched.
    registry.read(download(spec, revision, ("config.json",), registry.known) / "config.json")
    folder = download(spec, revision, HUB_FILES, registry.known)
    return FolderCheckpoint(spec, folder, registry, hub=True, revision=revision)
