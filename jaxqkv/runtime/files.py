"""Files that are written whole or not at all, checks of files and folders, and a lock between processes."""

import contextlib
import errno
import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxqkv.errors import CheckpointError, JaxqkvError

fcntl: Any = None
with contextlib.suppress(ImportError):  # there is none on Windows
    import fcntl


# Beginning of the pointer that Git LFS stores in place of a large file.
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """Opens a binary file that takes `path`'s place if the block succeeds, and is deleted if it fails."""
    with replacing_all([path]) as (file,):
        yield file


@contextlib.contextmanager
def replacing_all(paths: Sequence[Path]) -> Iterator[list[Any]]:
    """Does the same as `replacing` for several files: all are complete on the disk before any takes its place."""
    parts = [path.with_name(f".{path.name}.{secrets.token_hex(8)}.part") for path in paths]
    try:
        with contextlib.ExitStack() as files:
            yield [files.enter_context(part.open("xb")) for part in parts]
        for path in paths:  # all are checked before the first is replaced
            refuse_folder(path)
        for part, path in zip(parts, paths, strict=True):
            os.replace(part, path)
    except BaseException:
        for part in parts:
            with contextlib.suppress(OSError):  # the first error is the one to raise
                part.unlink()
        raise


@contextlib.contextmanager
def written(what: Path, advice: str = "") -> Iterator[None]:
    """Turns an OSError in the block, such as a full disk, into a JaxqkvError that says what to do."""
    try:
        yield
    except OSError as error:
        raise JaxqkvError(f"{what}: cannot be written ({error.strerror or error}){advice}") from None


def read_whole(path: Path, most: int) -> bytes:
    """Reads a file of at most `most` bytes.

    Raises:
      OSError: also for a larger file, and for a pipe or a device, which may have no end.
    """
    refuse_endless(path)
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size > most:
            raise OSError(errno.EFBIG, f"it is larger than {most / 1e6:,.0f} MB", str(path))
        return file.read()


def refuse_endless(path: Path) -> None:
    """Raises OSError for a pipe or a device: reading one may never end."""
    if path.exists() and not path.is_file():
        raise OSError("it is no regular file")


def refuse_pointer(path: Path) -> None:
    """Refuses a Git LFS pointer in the place of a checkpoint's file, and says how to get the file.

    Raises:
      CheckpointError: naming the file.
    """
    with contextlib.suppress(OSError):  # the reader reports a file that cannot be opened
        refuse_endless(path)
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise CheckpointError(
                    f"{path}: a Git LFS pointer instead of the file; run `git lfs pull` in its folder"
                )


def refuse_folder(path: Path) -> None:
    """Raises OSError if there is a folder where a file is to be."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def make_writable(folder: Path) -> None:
    """Makes a folder, and checks that files can be made in it.

    Raises:
      OSError: when either fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def prepare_file(path: Path) -> None:
    """Checks that a file can be written at a path, before anything is computed."""
    with written(path, "; choose another place with --out"):
        make_writable(path.parent)
        refuse_folder(path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Waits until no other process is in such a block for the same folder.

    The operating system holds the lock on the folder itself: it leaves no file behind, and ends with the process. Where
    there are no such locks (Windows, some network file systems) nothing waits.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def fingerprint(path: Path, windows: int = 64, window: int = 65536) -> str:
    """Returns the SHA-256 of a file's size and of 64 evenly spaced windows of 64 KiB; of small files, of the whole.

    Any training step changes every window, and the cost does not grow with the file.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= windows * window:
            digest.update(file.read())
        else:
            for index in range(windows):
                file.seek((size - window) * index // (windows - 1))
                digest.update(file.read(window))
    return f"sampled-sha256:{digest.hexdigest()}"
