"""How programs are compiled for a device: the precision of matrix products, when, and the compilation cache."""

import functools
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jaxqkv.files import make_writable


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """`jax.jit` with float32 matrix products in full precision on every backend.

    A GPU's TF32 or a TPU's bfloat16 passes would otherwise change results silently. A precision that
    the user has set (`jax.default_matmul_precision`) is left alone.
    """
    if function is None:
        return functools.partial(jit, **options)

    @functools.wraps(function)
    def precise(*args: Any, **kwargs: Any) -> Any:
        if jax.config.jax_default_matmul_precision is not None:
            return function(*args, **kwargs)
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return jax.jit(precise, **options)


_compilers = ThreadPoolExecutor(thread_name_prefix="compiler")


def compile_early(function: Callable[..., Any], *arguments: Any, **static: Any) -> Callable[..., Any]:
    """A jitted function's program for one set of shapes, compiled while the caller goes on.

    Args:
      function: from `jit`.
      arguments: its arrays, or `jax.ShapeDtypeStruct`s in their place.
      static: its static arguments.

    Returns:
      What takes arrays of those shapes; its first call waits until the program is there.
    """
    future = _compilers.submit(function.lower(*arguments, **static).compile)
    return lambda *arrays: future.result()(*arrays)


def cache_folder() -> Path:
    """The user's cache folder for this package; `JAXQKV_CACHE` or `XDG_CACHE_HOME` move it."""
    if own := os.environ.get("JAXQKV_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxqkv"


def enable_compilation_cache() -> None:
    """Keeps XLA's compiled programs in the user's cache folder, small and quick ones too.

    A folder that JAX was told of (`JAX_COMPILATION_CACHE_DIR`) is used instead; one that cannot be
    written is said, and left alone.
    """
    if jax.config.jax_compilation_cache_dir is None:
        folder = cache_folder() / "xla"
        try:
            make_writable(folder)
        except OSError as error:
            print(f"jaxqkv: compiled programs are not kept: {folder}: {error.strerror}", file=sys.stderr)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
