"""`Checkpoint`: a config and its tensors, wherever they are stored."""

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
    """Tells the path of a folder or a file from the name of a repository on the hub."""
    try:
        file = spec.endswith(".safetensors") and "/" not in spec  # a repository on the hub may end so, after its owner
        return file or spec.startswith((".", "/", "~", "\\")) or Path(spec).exists()
    except (OSError, ValueError):  # too long for a path, or with a null byte
        return False


def as_path(spec: str) -> Path:
    """Returns a folder's path, with `~` expanded.

    Raises:
      CheckpointError: when there is no such user.
    """
    try:
        return Path(spec).expanduser()
    except RuntimeError:
        raise CheckpointError(f"{spec}: no such folder") from None


class Checkpoint:
    """A config and its tensors. Made by `open_checkpoint`.

    Attributes:
      spec: the name or path as the user gave it.
      config: sizes and settings.
      shapes, dtypes: of every tensor, by the keys that `tensor` takes; dtypes in safetensors' names (F16, BF16, …).
      tokenizer_folder: folder with the tokenizer's files, if they are on this machine.
      where: file or checkpoint to name in errors about the tensors' names.
      absent: key of a missing tensor that the index names → why it is missing.
      finite: whether it is certain that no tensor has NaN or infinite values.
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
        """The spec, shortened for titles: of a folder, its last part."""
        base = self.spec.removeprefix("random:")
        prefix = self.spec.removesuffix(base)
        if base in BUNDLED or not is_path(base):
            return self.spec
        return prefix + as_path(base).resolve().name

    def tensor(self, key: str) -> Shaped[np.ndarray, "..."]:
        """Returns one tensor in the dtype that it is stored in; read-only.

        Raises:
          CheckpointError: when the dtype is not a floating-point one.
        """
        raise NotImplementedError

    def file_of(self, key: str) -> str:
        """Returns where a tensor is stored, for messages."""
        return self.spec

    def identity(self) -> dict[str, Any]:
        """Returns what a manifest records, so that the same weights can be found again."""
        raise NotImplementedError

    def tokenizer_source(self) -> Path | None:
        """Returns the folder with the tokenizer's files, or None when the checkpoint has none.

        Raises:
          CheckpointError: when they have to be fetched and cannot be.
        """
        return self.tokenizer_folder

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer that is stored with the weights.

        Raises:
          CheckpointError: when there is none, or it cannot be read.
        """
        folder = self.tokenizer_source()
        if folder is None:
            raise NoTokenizer(
                f"{self.spec}: has no tokenizer.json, vocab.json with merges.txt, or vocab.txt; give a folder "
                "that has one (--tokenizer FOLDER, in the library tokenizer=)"
            )
        tokenizer = Tokenizer.from_folder(folder, self.config)
        tokenizer.where = self.spec
        return tokenizer

    def summary(self) -> dict[str, str]:
        """Returns what `jaxqkv info` says about where the weights and the tokenizer come from."""
        return {"tokenizer": ", ".join(self.tokenizer_files) or "none here"}

    @property
    def tokenizer_files(self) -> list[str]:
        """The names of the tokenizer's files on this machine."""
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
