"""Find a checkpoint and read single tensors from it.

    gpt2, bert-large-uncased, owner/name   from the Hugging Face hub or its local cache
    path/to/folder                         a folder in Hugging Face's format; never the network
    demo-gpt2, demo-bert                   the small trained checkpoints that the package carries
    random:SPEC                            the architecture of SPEC with freshly initialised weights

Weights are read from safetensors only: nothing in a checkpoint is ever executed. Files are mapped,
not loaded, so a tensor costs memory when it is used and only then.

An index cannot name files outside its folder. Links in the folder are followed wherever they lead: they
are its owner's, and the hub's cache consists of them.
"""

import difflib
import json
import os
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Shaped

from jaxqkv.runtime import showing
from jaxqkv.checkpoints import tables
from jaxqkv.checkpoints.config import KNOWN, Config, config_to_json, missing, read_config
from jaxqkv.errors import CheckpointError, JaxqkvWarning, NoTokenizer, first_line, listed, printable
from jaxqkv.runtime.files import read_whole, refuse_endless, refuse_pointer

BUNDLED = {name: Path(__file__).parents[1] / "demo" / name for name in ("demo-gpt2", "demo-bert")}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")
TOKENIZER_FILES = (*VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
HUB_FILES = ("config.json", SINGLE, INDEX, "model-?????-of-?????.safetensors", *TOKENIZER_FILES)
# Of a safetensors header or of an index, whose largest have a few.
MOST_HEADER_BYTES = 30_000_000
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16"}


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
        if base in BUNDLED or not _is_path(base):
            return self.spec
        return prefix + _as_path(base).resolve().name

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


def open_checkpoint(
    spec: "str | os.PathLike[str] | Checkpoint", *, revision: str | None = None, seed: int = 0
) -> Checkpoint:
    """Opens a checkpoint by reading its config and the headers of its files, and no weights.

    Args:
      spec: a hub id, a folder, a bundled name or `random:SPEC`; see the module's docstring. One that
        is open is given back.
      revision: branch, tag or commit on the hub.
      seed: of the fresh weights of `random:SPEC`.

    Raises:
      CheckpointError: naming file, key and reason.
    """
    if isinstance(spec, Checkpoint):
        return spec
    spec = os.fspath(spec)
    if not spec:
        raise CheckpointError("the name of the checkpoint is empty; give a hub id, a folder or demo-gpt2")
    if spec.startswith("random:"):
        return RandomCheckpoint(spec, seed, revision)
    if spec in BUNDLED:
        return FolderCheckpoint(spec, BUNDLED[spec])
    if _is_path(spec):
        return FolderCheckpoint(spec, _as_path(spec))
    # The config alone first: what is not supported is refused before its weights are fetched.
    read_config(_download(spec, revision, ("config.json",)) / "config.json")
    return FolderCheckpoint(spec, _download(spec, revision, HUB_FILES), hub=True, revision=revision)


def _is_path(spec: str) -> bool:
    try:
        return spec.startswith((".", "/", "~", "\\")) or Path(spec).exists()
    except (OSError, ValueError):  # longer than a path may be, or with a null byte
        return False


def _as_path(spec: str) -> Path:
    try:
        return Path(spec).expanduser()
    except RuntimeError:
        raise CheckpointError(f"{spec}: no such folder") from None


def _download(spec: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The local snapshot of a hub repository, fetched as far as needed and possible."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = Path(huggingface_hub.snapshot_download(spec, revision=revision, allow_patterns=list(patterns)))
        # Offline, the library gives what it has: perhaps the config and the tokenizer, and no weights.
        if folder.is_dir() and ("config.json" not in patterns or (folder / "config.json").exists()):
            return folder
        reason = "has no config.json; it is not a checkpoint, or only part of it is in the local cache"
    except errors.HFValidationError:
        reason = "neither a folder here nor a valid hub id"
    except errors.GatedRepoError:
        reason = "a gated repository; accept its terms on the hub and log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = f"no revision {revision!r} on the hub"
    except errors.RepositoryNotFoundError:
        reason = "neither a folder here nor a repository on the hub that you can read"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reason = (
            "not in the local cache, and the hub cannot be reached; go online once, or copy the checkpoint "
            "to a folder and give its path"
        )
        if "config.json" in patterns:
            reason += ", or try demo-gpt2, demo-bert or random:gpt2, which need no download"
    except Exception as error:  # the HTTP library below the hub's differs by version
        reason = f"cannot be fetched from the hub ({type(error).__name__}: {first_line(error)})"
    near = [] if spec in KNOWN else difflib.get_close_matches(spec, [*BUNDLED, *KNOWN], n=1, cutoff=0.8)
    raise CheckpointError(f"{spec}: {reason}" + "".join(f"; did you mean {name}?" for name in near))


class MappedFile:
    """A safetensors file, mapped into memory. The library checks the header; numpy maps the data.

    Raises:
      CheckpointError: when it is not a whole safetensors file.
    """

    def __init__(self, path: Path):
        from safetensors import SafetensorError, safe_open

        self.path = path
        refuse_pointer(path)
        try:
            refuse_endless(path)
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > MOST_HEADER_BYTES:
                    raise ValueError(f"header of {length:,} bytes")
                with safe_open(path, framework="np"):
                    pass  # lengths, offsets and overlaps are checked here
                self.header: dict[str, Any] = json.loads(file.read(length))
            self.header.pop("__metadata__", None)
            if not all(isinstance(entry, dict) for entry in self.header.values()):
                raise ValueError("a tensor is not described by an object")
            self.start = 8 + length
            self.bytes = np.memmap(path, np.uint8, mode="r")
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: not a whole safetensors file ({first_line(error)}); copy or download it again"
            ) from None

    def tensor(self, key: str) -> Shaped[np.ndarray, "..."]:
        """One tensor as a view of the file, in the dtype that it is stored in."""
        import ml_dtypes  # noqa: F401  (gives numpy the name bfloat16)

        entry = self.header[key]
        if entry["dtype"] not in FLOATS:
            raise CheckpointError(f"{self.path}: {key} is {entry['dtype']}, expected one of {', '.join(FLOATS)}")
        begin, end = (self.start + offset for offset in entry["data_offsets"])
        try:
            return self.bytes[begin:end].view(FLOATS[entry["dtype"]]).reshape(entry["shape"])
        except ValueError as error:  # a tensor of no values may claim a shape that no array can have
            raise CheckpointError(f"{self.path}: {key} {entry['shape']} cannot be read ({error})") from None


class FolderCheckpoint(Checkpoint):
    """A folder in Hugging Face's format: config.json, model.safetensors or an index with its shards."""

    def __init__(self, spec: str, folder: Path, hub: bool = False, revision: str | None = None):
        self.spec, self.folder, self.hub, self.revision = spec, folder, hub, revision
        if not folder.is_dir():
            raise CheckpointError(f"{spec}: no such folder")
        self.config = read_config(folder / "config.json")
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
        """Key → the file that has it; key → why no file has it, though the index names it.

        What the index forgets, or places in the wrong file, is taken from where it is.
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
                        "is not there" if file is None else "does not have it"
                    )
        twice = []
        for file in reversed(opened.values()):
            for key in file.header:
                if (placed := places.setdefault(key, file)) is not file:
                    twice.append(f"{key} is in {file.path.name} too, and taken from {placed.path.name}")
        if twice:
            warnings.warn(printable(f"{self.folder / INDEX}: {listed(twice, '; ')}"), JaxqkvWarning, stacklevel=4)
        return places, {key: reason for key, reason in absent.items() if key not in places}

    def _shards(self) -> dict[Path, list[str] | None]:
        """File → the keys to take from it; None for all."""
        index = self.folder / INDEX
        if (self.folder / SINGLE).exists():
            return {self.folder / SINGLE: None}
        if not index.exists():
            self._refuse_without_safetensors()
        refuse_pointer(index)
        try:
            places = json.loads(read_whole(index, MOST_HEADER_BYTES).decode())["tables"]
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
                raise CheckpointError(f"{index}: names what is no safetensors file: {name!r}")
        absent = [name for name in shards if not self._has(name)]
        if absent and self.hub:
            _download(self.spec, self.revision, tuple(shards))
            absent = [name for name in shards if not self._has(name)]
        if len(absent) == len(shards):  # of some it matters what they would hold
            raise CheckpointError(f"{index}: names files that are not there: {listed(absent)}")
        return {self.folder / name: keys for name, keys in shards.items()}

    def _has(self, name: str) -> bool:
        try:
            return (self.folder / name).is_file()
        except (OSError, ValueError):  # longer than a name may be, or with a null byte
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
        return self._files[key].tensor(key)

    def file_of(self, key: str) -> str:
        return str(self._files[key].path)

    def summary(self) -> dict[str, str]:
        mapped = dict.fromkeys(self._files.values())
        files = [f"{printable(each.path.name)} ({showing.megabytes(each.bytes.size)} MB)" for each in mapped]
        revision = {"revision": self.folder.name} if self.hub else {}
        return {"files": ", ".join(files), **revision} | super().summary()

    def identity(self) -> dict[str, Any]:
        if self.hub:
            return {"checkpoint": self.spec, "source": "hub", "revision": self.folder.name}
        source = "bundled" if self.spec in BUNDLED else "folder"
        return {"checkpoint": self.spec, "source": source, "files": {p.name: fingerprint(p) for p in self.files}}


class RandomCheckpoint(Checkpoint):
    """Freshly initialised weights, made tensor by tensor as they are asked for.

    Normal with the config's `initializer_range`; zero biases; unit norms; GPT-2's projections back
    into the residual stream are divided by √(2·n_layer). Each tensor depends on seed and key only.
    """

    finite = True

    def __init__(self, spec: str, seed: int, revision: str | None = None):
        self.spec, self.seed, self.base = spec, seed, spec.removeprefix("random:")
        self._revision = revision
        self._template = None
        if self.base in KNOWN:
            self.config = KNOWN[self.base]
        elif not self.base or self.base.startswith("random:"):
            raise CheckpointError(f"{spec}: expected a checkpoint after 'random:', for example random:gpt2")
        elif self.base in BUNDLED or _is_path(self.base):
            self._template = BUNDLED.get(self.base) or _as_path(self.base)
            self.config = read_config(self._template / "config.json")
        else:
            self._template = _download(self.base, revision, ("config.json", *TOKENIZER_FILES))
            self.config = read_config(self._template / "config.json")
        if self.config.initializer_range is None:
            raise CheckpointError(f"{spec}: {missing(type(self.config), 'initializer_range')}")
        self.where = spec
        self._rules = tables.table(self.config).rules(self.config.n_layer)
        self.shapes = {key: rule.shape for key, rule in self._rules.items()}
        self.dtypes = dict.fromkeys(self.shapes, "F32")
        self.tokenizer_folder = self._template

    def tokenizer_source(self) -> Path | None:
        if self._template is None:
            try:
                return _download(self.base, self._revision, TOKENIZER_FILES)
            except CheckpointError as error:
                raise NoTokenizer(
                    f"{self.spec}: text needs the tokenizer of {error}; or give a folder with tokenizer files "
                    "(--tokenizer FOLDER, in the library tokenizer=)"
                ) from None
        return self._template

    def tensor(self, key: str) -> Shaped[np.ndarray, "..."]:
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
        return {"files": f"none; fresh weights from seed {self.seed}"} | super().summary()

    def identity(self) -> dict[str, Any]:
        return {"checkpoint": self.spec, "source": "random", "seed": self.seed}


def save_checkpoint(
    folder: Path, config: Config, tensors: Mapping[str, Shaped[np.ndarray, "..."]], **extra: Any
) -> None:
    """Writes config.json and model.safetensors in Hugging Face's format.

    Args:
      folder: made if need be.
      config: of the model.
      tensors: by the names and in the shapes of the format, as `tensors_from_params` gives them.
      extra: further entries of config.json.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config_to_json(config) | extra, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / SINGLE, metadata={"format": "pt"})
