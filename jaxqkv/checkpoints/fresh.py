"""Freshly initialised weights of an architecture, to compare trained weights with."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxqkv.checkpoints.checkpoint import BUNDLED, Checkpoint, as_path, is_path
from jaxqkv.checkpoints.config import Config, Registry
from jaxqkv.checkpoints.hub import download
from jaxqkv.errors import CheckpointError, NoTokenizer
from jaxqkv.text.tokenizers import TOKENIZER_FILES


class FreshCheckpoint(Checkpoint):
    """Freshly initialised weights for a config; each tensor is made when it is asked for.

    Weights are normal with the config's `initializer_range`, biases 0, norms 1; GPT-2's projections into the residual
    stream are divided by √(2·n_layer). Each tensor depends on seed and key only.
    """

    finite = True

    def __init__(self, spec: str, config: Config, seed: int):
        """Takes a config.

        Args:
          spec: name for messages.
          config: sizes and settings.
          seed: seed of the weights.

        Raises:
          CheckpointError: for a config that does not say how weights are initialised.
        """
        if config.initializer_range is None:
            raise CheckpointError(f"{spec}: {config.missing('initializer_range')}")
        self.spec, self.where, self.config, self.seed, self.tokenizer_folder = spec, spec, config, seed, None
        self._rules = config.table().rules(config.n_layer)
        self.shapes = {key: rule.shape for key, rule in self._rules.items()}
        self.dtypes = dict.fromkeys(self.shapes, "F32")

    def tensor(self, key: str) -> Shaped[np.ndarray, "..."]:
        """Makes one tensor in float32."""
        rule = self._rules[key]
        if rule.init in ("zeros", "ones"):
            values = np.full(rule.shape, rule.init == "ones", np.float32)
        else:
            scale = self.config.initializer_range
            if rule.init == "residual":
                scale /= (2 * self.config.n_layer) ** 0.5
            generator = np.random.Generator(np.random.SFC64([self.seed, zlib.crc32(key.encode())]))
            values = generator.standard_normal(rule.shape, np.float32)
            values *= np.float32(scale)
        values.flags.writeable = False
        return values

    def summary(self) -> dict[str, str]:
        """Returns the seed, and the tokenizer's files."""
        return {"files": f"none; fresh weights from seed {self.seed}"} | super().summary()

    def identity(self) -> dict[str, Any]:
        """Returns the spec and the seed."""
        return {"checkpoint": self.spec, "source": "random", "seed": self.seed}


class RandomCheckpoint(FreshCheckpoint):
    """`random:SPEC`: freshly initialised weights of the named checkpoint, with its tokenizer."""

    def __init__(self, spec: str, seed: int, registry: Registry, revision: str | None = None):
        self.base = spec.removeprefix("random:")
        self._revision, self._known = revision, registry.known
        self._template = None
        if self.base in registry.known:
            self.config = registry.known[self.base]
        elif not self.base or self.base.startswith("random:"):
            raise CheckpointError(f"{spec}: expected a checkpoint after 'random:', for example random:gpt2")
        elif self.base in BUNDLED or is_path(self.base):
            self._template = BUNDLED.get(self.base) or as_path(self.base)
            self.config = registry.read(self._template / "config.json")
        else:
            self._template = download(self.base, revision, ("config.json", *TOKENIZER_FILES), registry.known)
            self.config = registry.read(self._template / "config.json")
        super().__init__(spec, self.config, seed)
        self.tokenizer_folder = self._template

    def tokenizer_source(self) -> Path | None:
        """Returns the folder with the tokenizer of SPEC, fetched if need be."""
        if self._template is None:
            try:
                return download(self.base, self._revision, TOKENIZER_FILES, self._known)
            except CheckpointError as error:
                raise NoTokenizer(
                    f"{self.spec}: text needs the tokenizer of {error}; or give a folder with tokenizer files "
                    "(--tokenizer FOLDER, in the library tokenizer=)"
                ) from None
        return self._template
