"""`Checkpoint`: a config and its tensors, wherever they are; the names of files in a folder of one."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxqkv.checkpoints.config import Config
from jaxqkv.errors import CheckpointError, NoTokenizer
from jaxqkv.runtime import showing
from jaxqkv.text.tokenizers import TOKENIZER_FILES, Tokenizer

BUNDLED = {name: Path(__file__).parents[1] / "demo" / name for name in ("demo-gpt2", "demo-bert")}


def is_path(spec: str) -> bool:
    try:
        return spec.startswith((".", "/", "~", "\\")) or Path(spec).exists()
    except (OSError, ValueError):  # longer than a path may be, or with a null byte
        return False


def as_path(spec: str) -> Path:
    try:
        return Path(spec).expanduser()
    except RuntimeError:
        raise CheckpointError(f"{spec}: no such folder") from None


class Checkpoint:
    """A config and its tensors. Made by `open_checkpoint`.

    Attributes:
      spec: as the user gave it.
      config: sizes and settings.
      shapes, dtypes: of every tensor, by the keys that `tensor` takes; dtypes in safetensors' names (F16, BF16, …).
      tokenizer_folder: where the tokenizer's files are, if they are here.
      where: what an error about the tensors' names blames.
      absent: why a tensor that the index names is not there, by its key.
      finite: that no tensor can have NaN or infinite values.
    """

    spec: str
    config: Config
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    tokenizer_folder: Path | None
    where: str
    absent: Mapping[str, str] = MappingProxyType({})
    finite: bool = False

    @property
    def name(self) -> str:
        """The spec, short enough for a title: of a folder, its last part."""
        base = self.spec.removeprefix("random:")
        prefix = self.spec.removesuffix(base)
        if base in BUNDLED or not is_path(base):
            return self.spec
        return prefix + as_path(base).resolve().name

    def tensor(self, key: str) -> Shaped[np.ndarray, "..."]:
        """One tensor in the dtype that it is stored in; read-only.

        Raises:
          CheckpointError: when that dtype is none of floating point.
        """
        raise NotImplementedError

    def file_of(self, key: str) -> str:
        """Where a tensor is stored, for messages."""
        return self.spec

    def identity(self) -> dict[str, Any]:
        """What a manifest records, so that the same weights can be found again."""
        raise NotImplementedError

    def tokenizer_source(self) -> Path | None:
        """The folder with the tokenizer's files, or None when the checkpoint has none.

        Raises:
          CheckpointError: when they would have to be fetched, and cannot be.
        """
        return self.tokenizer_folder

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer that lies beside the weights.

        Raises:
          CheckpointError: when there is none, or it cannot be read.
        """
        folder = self.tokenizer_source()
        if folder is None:
            raise NoTokenizer(
                f"{self.spec}: has no tokenizer.json, vocab.json with merges.txt, or vocab.txt; give a folder "
                "that has (--tokenizer FOLDER, in the library tokenizer=)"
            )
        tokenizer = Tokenizer.from_folder(folder, self.config)
        tokenizer.where = self.spec
        return tokenizer

    def summary(self) -> dict[str, str]:
        """What `jaxqkv info` says of where the weights and the tokenizer come from."""
        return {"tokenizer": ", ".join(self.tokenizer_files) or "none here"}

    @property
    def tokenizer_files(self) -> list[str]:
        """The names of the tokenizer's files, without looking further than this machine."""
        folder = self.tokenizer_folder
        return [name for name in TOKENIZER_FILES if folder is not None and (folder / name).exists()]

    def __repr__(self) -> str:
        return f"Checkpoint {self.spec}: {self.config.architecture}; {len(self.shapes)} tensors"

    def _repr_html_(self) -> str:
        about = {
            "architecture": self.config.architecture,
            "width": str(self.config.n_embd),
            "vocabulary": self.config.vocabulary,
            "tensors": f"{len(self.shapes)}, {', '.join(sorted(set(self.dtypes.values())))}",
        }
        return showing.facts_table(f"Checkpoint {self.spec}", about | self.summary())
