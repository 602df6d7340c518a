"""Checkpoints in memory: a model of transformers, or a state_dict and its config."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxqkv.checkpoints import tables
from jaxqkv.checkpoints.checkpoint import Checkpoint
from jaxqkv.checkpoints.config import Config, Registry
from jaxqkv.errors import CheckpointError, NoTokenizer
from jaxqkv.runtime.arrays import to_numpy
from jaxqkv.text.tokenizers import Tokenizer

# Names of dtypes in NumPy and PyTorch → in safetensors.
STORED = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class MemoryCheckpoint(Checkpoint):
    """The config and the tensors of a model in memory; each tensor is copied once.

    Made by `open_checkpoint`; later changes of the model have no effect.
    """

    def __init__(self, spec: str, config: Config, tensors: Mapping[str, Any]):
        """Copies the tensors that the architecture needs.

        Args:
          spec: name for messages.
          config: sizes and settings.
          tensors: arrays of any library, named as in a file of the model.

        Raises:
          CheckpointError: when tensors are missing, unexpected or wrongly shaped, or cannot be read.
        """
        self.spec, self.config, self.where, self.tokenizer_folder = spec, config, spec, None
        given = {key: value if hasattr(value, "shape") else self._numpy(key, value) for key, value in tensors.items()}
        self.shapes = {key: tuple(value.shape) for key, value in given.items()}
        self.dtypes = {key: _stored(value) for key, value in given.items()}
        table = config.table()
        needed = [*tables.resolve(table, config.n_layer, self.shapes, self.where).values()]
        if table.masked:
            needed += table.masked.find(table.prefix, self.shapes)[0].values()
        copies: dict[Any, np.ndarray] = {}  # one for tied tensors
        self._tensors = {}
        for key in needed:
            place = _place(given[key]) or key
            if place not in copies:
                copies[place] = np.array(self._numpy(key, given[key]))
                copies[place].flags.writeable = False
            self._tensors[key] = copies[place]

    def _numpy(self, key: str, value: Any) -> np.ndarray:
        if isinstance(value, Mapping | list | tuple):
            raise CheckpointError(f"{self.where}: {key} is a {type(value).__name__}, not an array")
        return to_numpy(value, f"{self.where}: {key}", CheckpointError)

    def tensor(self, key: str) -> Shaped[np.ndarray, "..."]:
        """Returns the copy of one tensor; read-only."""
        return self._tensors[key]

    def tokenizer(self) -> Tokenizer:
        """Refuses: a model in memory has none.

        Raises:
          NoTokenizer: always.
        """
        raise NoTokenizer(
            f"{self.spec}: a model in memory has no tokenizer; load(…, tokenizer=…) takes a folder or an object of "
            "tokenizers or transformers"
        )

    def summary(self) -> dict[str, str]:
        """Returns that the weights are in memory."""
        return {"files": "none; in memory"} | super().summary()

    def identity(self) -> dict[str, Any]:
        """Returns the SHA-256 of all tensors."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self._tensors.items()):
            digest.update(f"{key} {tensor.dtype} {tensor.shape} ".encode())
            digest.update(np.ascontiguousarray(tensor).view(np.uint8).data)
        return {"checkpoint": self.spec, "source": "memory", "sha256": digest.hexdigest()}


def is_in_memory(given: Any) -> bool:
    """Tells a model, or a mapping of tensors, from the name of a checkpoint."""
    return isinstance(given, Mapping) or callable(getattr(given, "state_dict", None))


def open_memory(given: Any, config: Any, registry: Registry) -> MemoryCheckpoint:
    """Opens a model of transformers, or a mapping of tensors by name.

    Args:
      given: a model with `state_dict()` and `config`, or what `state_dict()` returns.
      config: config of a mapping: the contents of config.json, a config of transformers, or one of this package.
      registry: the known architectures.

    Raises:
      CheckpointError: for an architecture or a setting that is not implemented, and tensors that do not fit.
    """
    if isinstance(given, Mapping):
        name, tensors = "state_dict", given
    else:
        given = getattr(given, "_orig_mod", given)  # compiled by PyTorch, which changes the names of tensors
        name, tensors = type(given).__name__, given.state_dict()
        own = getattr(given, "config", None)
        if own is not None and config is not None:
            raise CheckpointError(f"{name} has a config of its own; config= goes with a state_dict")
        config = config if own is None else own
    if config is None:
        raise CheckpointError(
            f"{name} needs config=…: a dict with what config.json holds, a config of transformers or one of jaxqkv"
        )
    if wrong := [key for key in tensors if not isinstance(key, str)]:
        raise CheckpointError(f"{name}: {wrong[0]!r} is not the name of a tensor")
    return MemoryCheckpoint(name, _parsed(config, f"{name}: config", registry), tensors)


def _parsed(config: Any, where: str, registry: Registry) -> Config:
    if isinstance(config, Config):
        return config
    if not isinstance(config, Mapping) and callable(getattr(config, "to_dict", None)):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise CheckpointError(
            f"{where}: expected a dict, a config of transformers or one of jaxqkv, not {type(config).__name__}"
        )
    return registry.parse(config, where)


def _stored(value: Any) -> str:
    """Returns safetensors' name of the dtype, or the library's own name for a dtype that safetensors does not have."""
    name = str(getattr(value.dtype, "name", value.dtype)).rpartition(".")[2]
    return STORED.get(name, name)


def _place(value: Any) -> Any:
    """Returns a key that is the same for all names of one PyTorch tensor; None for other arrays."""
    if not callable(getattr(value, "data_ptr", None)) or not callable(getattr(value, "stride", None)):
        return None
    return value.data_ptr(), tuple(value.shape), tuple(value.stride()), str(value.dtype), str(value.device)
