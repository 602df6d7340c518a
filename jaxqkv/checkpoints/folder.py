"""Reads and writes checkpoint folders in Hugging Face's format.

An index cannot name files outside its folder. Links in the folder are followed wherever they lead: the owner made them,
and the hub's cache consists of them.
"""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Shaped

from jaxqkv.checkpoints.checkpoint import BUNDLED, Checkpoint
from jaxqkv.checkpoints.config import Config, Registry
from jaxqkv.checkpoints.hub import download
from jaxqkv.checkpoints.mapped import MOST_HEADER_BYTES, MappedFile
from jaxqkv.checkpoints.tables import Rule
from jaxqkv.errors import CheckpointError, JaxqkvWarning, listed, printable
from jaxqkv.runtime import showing
from jaxqkv.runtime.files import fingerprint, read_whole, refuse_pointer
from jaxqkv.text.tokenizers import VOCABULARIES

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class FolderCheckpoint(Checkpoint):
    """A folder in Hugging Face's format: config.json, model.safetensors or an index with its shards."""

    def __init__(self, spec: str, folder: Path, registry: Registry, hub: bool = False, revision: str | None = None):
        self.spec, self.folder, self.hub, self.revision = spec, folder, hub, revision
        if not folder.is_dir():
            file = "a file; give the folder that holds it, with its config.json"
            raise CheckpointError(f"{spec}: {file if folder.exists() else 'no such folder'}")
        self.config = registry.read(folder / "config.json")
        self._files, self.absent = self._place(self._shards())
        self.where = f"{self.spec}: {SINGLE if (folder / SINGLE).exists() else INDEX}"
        self.shapes = {key: tuple(file.header[key]["shape"]) for key, file in self._files.items()}
        self.dtypes = {key: file.header[key]["dtype"] for key, file in self._files.items()}
        self.tokenizer_folder = folder if any((folder / name).exists() for name in VOCABULARIES) else None

    @property
    def files(self) -> list[Path]:
        """The safetensors files, in the order of the index."""
        return list(dict.fromkeys(file.path for file in self._files.values()))

    def _place(self, shards: Mapping[Path, Sequence[str] | None]) -> tuple[dict[str, MappedFile], dict[str, str]]:
        """Returns key → the file that has it, and key → why no file has it although the index names it.

        A tensor that the index omits, or places in the wrong file, is taken from the file that has it.
        """
        opened = {path: MappedFile(path) for path in shards if path.exists()}
        places: dict[str, MappedFile] = {}
        absent = {}
        for path, keys in shards.items():
            file = opened.get(path)
            for key in keys or (() if file is None else file.header):
                if file is not None and key in file.header:
                    places[key] = file
                else:
                    absent[key] = f"the index places it in {path.name}, which " + (
                        "does not exist" if file is None else "does not have it"
                    )
        twice = []
        for file in reversed(opened.values()):
            for key in file.header:
                if (placed := places.setdefault(key, file)) is not file:
                    twice.append(f"{key} is in {file.path.name} too, but taken from {placed.path.name}")
        if twice:
            warnings.warn(printable(f"{self.folder / INDEX}: {listed(twice, '; ')}"), JaxqkvWarning, stacklevel=4)
        return places, {key: reason for key, reason in absent.items() if key not in places}

    def _shards(self) -> dict[Path, list[str] | None]:
        """Returns file → the keys to take from it; None for all."""
        index = self.folder / INDEX
        if (self.folder / SINGLE).exists():
            return {self.folder / SINGLE: None}
        if not index.exists():
            self._refuse_without_safetensors()
        refuse_pointer(index)
        try:
            places = json.loads(read_whole(index, MOST_HEADER_BYTES).decode())["weight_map"]
            shards: dict[str, list[str]] = {}
            for key, name in places.items():
                shards.setdefault(os.fspath(name), []).append(key)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index}: not a readable index ({error!r})") from None
        for name in shards:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
                raise CheckpointError(f"{index}: names a file outside its folder: {name!r}")
            if path.suffix != ".safetensors" or any(sign in name for sign in "*?["):  # patterns of what is fetched
                raise CheckpointError(f"{index}: names a file that is not a .safetensors file: {name!r}")
        absent = [name for name in shards if not self._has(name)]
        if absent and self.hub:
            download(self.spec, self.revision, tuple(shards))
            absent = [name for name in shards if not self._has(name)]
        if len(absent) == len(shards):  # if only some are missing, an error names the tensors that they would hold
            raise CheckpointError(f"{index}: names files that do not exist: {listed(absent)}")
        return {self.folder / name: keys for name, keys in shards.items()}

    def _has(self, name: str) -> bool:
        try:
            return (self.folder / name).is_file()
        except (OSError, ValueError):  # too long for a name, or with a null byte
            return False

    def _refuse_without_safetensors(self) -> NoReturn:
        pickles = sorted(path.name for path in self.folder.glob("pytorch_model*.bin"))
        if self.hub and not pickles:
            raise CheckpointError(
                f"{self.spec}: no {SINGLE} and no {INDEX} on the hub or, offline, in the local cache; go online once, "
                "or, where the repository has pickled weights alone, load them with transformers and call its "
                "save_pretrained(FOLDER), then give that folder"
            )
        found = f"only {pickles[0]}, and pickles are never opened" if pickles else f"no {SINGLE} and no {INDEX}"
        raise CheckpointError(
            f"{self.folder}: {found}; for safetensors, load the model with "
            "transformers and call its save_pretrained(FOLDER), then give that folder"
        )

    def tensor(self, key: str) -> Shaped[np.ndarray, "..."]:
        """Returns one tensor as a view of its file."""
        return self._files[key].tensor(key)

    def file_of(self, key: str) -> str:
        """Returns the path of the file that has a tensor."""
        return str(self._files[key].path)

    def summary(self) -> dict[str, str]:
        """Returns the files with their sizes, the revision, and the tokenizer's files."""
        mapped = dict.fromkeys(self._files.values())
        files = [f"{printable(each.path.name)} ({showing.megabytes(each.bytes.size)} MB)" for each in mapped]
        revision = {"revision": self.folder.name} if self.hub else {}
        return {"files": ", ".join(files), **revision} | super().summary()

    def identity(self) -> dict[str, Any]:
        """Returns the hub's revision, or the fingerprints of the files."""
        if self.hub:
            return {"checkpoint": self.spec, "source": "hub", "revision": self.folder.name}
        source = "bundled" if self.spec in BUNDLED else "folder"
        return {"checkpoint": self.spec, "source": source, "files": {p.name: fingerprint(p) for p in self.files}}


def save_checkpoint(
    folder: Path, config: Config, tensors: Mapping[str, Shaped[np.ndarray, "..."]], **extra: Any
) -> None:
    """Writes config.json and model.safetensors in Hugging Face's format.

    Args:
      folder: folder to write to; made if it does not exist.
      config: config of the model.
      tensors: tensors with the names and shapes of the format, from `tensors_from_params`.
      extra: further entries of config.json.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config.to_json() | extra, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / SINGLE, metadata={"format": "pt"})


def tensors_from_params(params: dict[str, Any], config: Any) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Turns parameters as `forward` takes them into tensors by canonical key: the inverse of reading.

    Args:
      params: `{"embed": …, "layers": [one dict a layer], "final": …}`.
      config: config of the model.

    Returns:
      Tensors in the shapes of the checkpoint's format, for `save_checkpoint`.

    Raises:
      CheckpointError: when the number of layers is not that of the config.
    """

    def pick(tree: dict[str, Any], rule: Rule) -> np.ndarray:
        parts = []
        for place in rule.places:
            leaf = tree
            for step in place.split("/"):
                leaf = leaf[step]
            parts.append(np.asarray(leaf))
        tensor = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        return tensor.T if rule.transpose else tensor

    table = config.table()
    if len(params["layers"]) != config.n_layer:
        raise CheckpointError(f"parameters have {len(params['layers'])} layers, the config says {config.n_layer}")
    tensors = {rule.key: pick(params["embed"], rule) for rule in table.embed}
    for index, layer in enumerate(params["layers"]):
        tensors |= {rule.key.format(layer=index): pick(layer, rule) for rule in table.layer}
    head = () if table.tied and "lm_head" not in params["final"] else table.head
    return tensors | {rule.key: pick(params["final"], rule) for rule in (*table.final, *head)}
