"""Corpora of documents: from the Hugging Face hub, from local files, or from Python itself.

    owner/name[:CONFIG[:SPLIT]]     a data set on the hub, streamed; only what is used is fetched
    FILE, FOLDER                    .txt, .jsonl and .parquet, in the order of their paths
    python-docs                     the language reference that comes with CPython, in windows

Data sets on the hub are read through `datasets`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxqkv.errors import CorpusError, first_line
from jaxqkv.runtime.caches import cache_folder
from jaxqkv.runtime.files import fingerprint, make_writable, replacing
from jaxqkv.text.documents import READERS, text_of

DEFAULT = "wikimedia/wikipedia:20231101.en:train"
PYTHON_DOCS = "python-docs"
SUFFIXES = (".txt", ".jsonl", ".parquet")
DOCUMENTS = ("files", "paragraphs")
# Characters in a window of python-docs: about 1,000 of BERT's tokens.
WINDOW = 4096
WAYS_OUT = f"give local text with --corpus FILE or FOLDER ({', '.join(SUFFIXES)}), or --corpus {PYTHON_DOCS}"
# Seconds to wait for the hub's answer.
PATIENCE = 10
# Version of the reading; raised when the same files give other documents, so that old caches are not used.
READING = 2


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, read again at each iteration.

    Attributes:
      name: name as the user gave it.
      about: entries of the manifest, so that the same documents can be found again.
      fingerprint: text that changes when the documents may have changed.
      read: function that returns an iterator over the documents.
      split: function that returns one over the documents of process (index, count); every n-th document unless given.
    """

    name: str
    about: dict[str, Any]
    fingerprint: str
    read: Callable[[], Iterator[str]]
    split: Callable[[int, int], Iterator[str]] | None = None

    def __iter__(self) -> Iterator[str]:
        return self.read()

    def share(self, index: int, count: int) -> Iterator[str]:
        """Returns an iterator over the documents of one process of several."""
        if count > 1 and self.split:
            return self.split(index, count)
        return itertools.islice(self.read(), index, None, count)


def open_corpus(
    specs: str | Path | Sequence[str | Path], *, documents: str = "files", text_column: str = "text"
) -> Corpus:
    """Opens a corpus; only the fingerprints of files, or the commit of a data set, are read.

    Args:
      specs: one of those in the module's docstring, or several files and folders.
      documents: "files" if a text file is one document, "paragraphs" if blank lines separate its documents.
      text_column: field of a .jsonl line, or column of a table, with the text.

    Raises:
      CorpusError: for a corpus that does not exist, is not text, or cannot be reached.
    """
    names = [str(spec) for spec in ([specs] if isinstance(specs, str | Path) else specs)]
    if documents not in DOCUMENTS:
        raise CorpusError(f"documents are {' or '.join(DOCUMENTS)}, not {documents!r}")
    alone = [spec for spec in names if spec == PYTHON_DOCS or not _is_local(spec)]
    if alone and len(names) > 1:
        raise CorpusError(f"{alone[0]}: only files and folders can be combined; give this corpus alone")
    if alone:
        return _python_docs() if alone == [PYTHON_DOCS] else _hub_corpus(alone[0], text_column)
    return _local_corpus(names, documents, text_column)


def _is_local(spec: str) -> bool:
    try:
        return spec.startswith((".", "/", "~", "\\")) or spec.endswith(SUFFIXES) or Path(spec).exists()
    except (OSError, ValueError):  # too long for a path, or with a null byte
        return False


def digest(*parts: Any) -> str:
    """Returns a hash of `parts`, for fingerprints and file names in the cache."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# --- Python's own documentation ---


def _python_docs() -> Corpus:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise CorpusError(f"{PYTHON_DOCS}: this Python comes without pydoc_data; {WAYS_OUT}") from None
    text = "\n".join(topics[name] for name in sorted(topics))
    name = digest(text)
    about = {"corpus": PYTHON_DOCS, "source": "pydoc_data.topics", "sha256": name}
    return Corpus(PYTHON_DOCS, about, name, lambda: _windows(text))


def _windows(text: str) -> Iterator[str]:
    """Yields the text in windows, cut at the first line end after every `WINDOW` characters."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + WINDOW) + 1 or len(text)
        yield text[start:end]
        start = end


# --- local files ---


def _local_corpus(specs: Sequence[str], documents: str, text_column: str) -> Corpus:
    files = [file for spec in specs for file in _files(spec)]
    try:
        prints = [[str(file), fingerprint(file), file.stat().st_mtime_ns] for file in files]
    except OSError as error:
        raise CorpusError(f"{error.filename}: cannot be read ({error.strerror})") from None
    about = {"corpus": " ".join(specs), "source": "files", "files": {name: print for name, print, _ in prints}}
    about |= {"documents": documents, "text column": text_column}

    def read() -> Iterator[str]:
        empty = True
        for file in files:
            for text in READERS[file.suffix.lower()](file, documents, text_column):
                empty = False
                yield text
        if empty:
            files_are = "the file is" if len(files) == 1 else f"all of the {len(files)} files are"
            raise CorpusError(f"{' '.join(specs)}: no document in it: {files_are} empty; give files with text in them")

    return Corpus(" ".join(specs), about, digest(prints, documents, text_column, READING), read)


def _files(spec: str) -> list[Path]:
    """Returns the files of a spec: the file itself, or those below a folder, in the order of their paths."""
    try:
        path = Path(spec).expanduser()
    except RuntimeError:
        raise CorpusError(f"{spec}: no such file or folder") from None
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise CorpusError(f"{path}: only {', '.join(SUFFIXES)} files are read")
        return [path]
    if not path.is_dir():
        raise CorpusError(f"{path}: no such file or folder")
    files = [file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()]
    visible = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not visible:
        raise CorpusError(f"{path}: has no {', '.join(SUFFIXES)} file")
    return sorted(visible)


# --- the hub ---


def _hub_corpus(spec: str, text_column: str) -> Corpus:
    parts = spec.split(":")
    if len(parts) > 3:
        raise CorpusError(f"{spec}: expected NAME, NAME:CONFIG or NAME:CONFIG:SPLIT")
    name, config, split = (*parts, "", "")[:3]
    split = split or "train"
    commit = _commit(name)
    about = {"corpus": spec, "source": "hub", "config": config or None, "split": split, "revision": commit}
    return Corpus(
        spec,
        about,
        digest(about, text_column),
        lambda: _read_hub(spec, name, config, split, commit, text_column),
        functools.partial(_read_hub, spec, name, config, split, commit, text_column),
    )


def _commit(name: str) -> str:
    """Returns the data set's present commit; offline, the last one seen, whose counts may have been kept.

    One quick request, because `datasets` would retry many times.
    """
    import huggingface_hub
    from huggingface_hub import errors

    seen = cache_folder() / "corpora" / f"commit-{digest(name)[:32]}.txt"
    try:
        commit = str(huggingface_hub.HfApi().dataset_info(name, timeout=PATIENCE).sha)
    except errors.HFValidationError:
        reason = f"neither a file here nor a valid hub id; {WAYS_OUT}"
    except errors.GatedRepoError:
        reason = "a gated data set; accept its terms on the hub and log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = f"neither a file here nor a data set on the hub that you can read; {WAYS_OUT}"
    except Exception as error:  # the HTTP library below the hub's differs by version
        with contextlib.suppress(OSError, ValueError):
            commit = seen.read_text(encoding="ascii")
            print(f"jaxqkv: {name}: the hub cannot be reached; the last commit seen is {commit}", file=sys.stderr)
            return commit
        if isinstance(error, errors.OfflineModeIsEnabled):
            reason = f"HF_HUB_OFFLINE is set, and data sets are streamed; unset it, or {WAYS_OUT}"
        else:
            reason = f"the hub cannot be reached ({type(error).__name__}); go online, or {WAYS_OUT}"
    else:
        with contextlib.suppress(OSError):  # a cache that cannot be written is no loss
            make_writable(seen.parent)
            with replacing(seen) as file:
                file.write(commit.encode("ascii"))
        return commit
    raise CorpusError(f"{name}: {reason}")


def _read_hub(
    spec: str, name: str, config: str, split: str, commit: str, text_column: str, index: int = 0, count: int = 1
) -> Iterator[str]:
    datasets = _datasets()
    try:
        rows = datasets.load_dataset(name, config or None, split=split, revision=commit, streaming=True)
        if count > 1:  # whole files for each process if they divide evenly, else every n-th row
            rows = datasets.distributed.split_dataset_by_node(rows, rank=index, world_size=count)
        for number, row in enumerate(rows):
            yield text_of(row, text_column, f"{spec}, row {number}")
    except CorpusError:
        raise
    except Exception as error:  # of any kind, depending on the layer below `datasets`
        raise CorpusError(f"{spec}: {type(error).__name__}: {first_line(error)}; or {WAYS_OUT}") from None


def _datasets() -> Any:
    """Imports `datasets`, and switches off its progress bars and its download statistics."""
    import datasets
    import datasets.distributed

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    return datasets
