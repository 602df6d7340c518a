"""The architectures, one file each, their registry, and `open_checkpoint` for any of them.

A new architecture is a file in this folder and a line of `REGISTRY`.
"""

from typing import Any

from jaxqkv.architectures import bert, distilbert, gpt2, roberta
from jaxqkv.checkpoints import finding
from jaxqkv.checkpoints.checkpoint import Checkpoint
from jaxqkv.checkpoints.config import Registry

REGISTRY = Registry()
REGISTRY.add(gpt2.GPT2Config, gpt2.KNOWN)
REGISTRY.add(bert.BertConfig, bert.KNOWN)
REGISTRY.add(roberta.RobertaConfig, roberta.KNOWN)
REGISTRY.add(roberta.XLMRobertaConfig)
REGISTRY.add(roberta.CamembertConfig)
REGISTRY.add(distilbert.DistilBertConfig, distilbert.KNOWN)


def open_checkpoint(spec: Any, *, config: Any = None, revision: str | None = None, seed: int = 0) -> Checkpoint:
    """Opens a checkpoint, reading config, names and shapes but no tensor.

    Args:
      spec: hub id, folder, `demo-gpt2`, `demo-bert` or `random:SPEC`; an open `Checkpoint`, which is returned as it is;
        a GPT-2, BERT, RoBERTa or DistilBERT model of transformers, with or without a head, whose tensors are copied;
        or a mapping of such tensors by name, as `state_dict()` returns it, from any library.
      config: config of such a mapping: the contents of config.json, a config of transformers, or one of this package.
      revision: branch, tag or commit on the hub.
      seed: seed of the fresh weights of `random:SPEC`.

    Raises:
      CheckpointError: naming file, key and reason.
    """
    return finding.open_checkpoint(spec, REGISTRY, config=config, revision=revision, seed=seed)
