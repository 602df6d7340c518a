"""How programs run: devices, the precision of matrix products, early compilation and the compilation cache."""

import functools
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxqkv.errors import JaxqkvError, first_line, printable
from jaxqkv.runtime.caches import cache_folder
from jaxqkv.runtime.files import make_writable
from jaxqkv.runtime.showing import plural

# Precisions of float32 matrix products → the name that every version of JAX knows. highest: full precision; high: a few
# passes of shorter numbers; default: one pass (TF32 on a GPU, bfloat16 on a TPU); a CPU computes all three in full.
# bfloat16: on every backend, inputs of dense layers are rounded to bfloat16 and sums are float32; on a CPU with such
# products 1.6 times as fast.
PRECISIONS = {"highest": "float32", "high": "tensorfloat32", "default": "bfloat16", "bfloat16": "bfloat16"}


_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


@overload
def jit(function: Callable[_Parameters, _Result], **options: Any) -> Callable[_Parameters, _Result]: ...


@overload
def jit(
    function: None = None, **options: Any
) -> Callable[[Callable[_Parameters, _Result]], Callable[_Parameters, _Result]]: ...


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """Compiles as `jax.jit` does, with float32 matrix products in full precision on every backend.

    Otherwise a GPU's TF32 or a TPU's bfloat16 would change results silently. A precision that the user has set
    (`jax.default_matmul_precision`) is left alone.
    """
    if function is None:
        return functools.partial(jit, **options)

    @functools.wraps(function)
    def precise(*args: Any, **kwargs: Any) -> Any:
        if setting("jax_default_matmul_precision") is not None:
            return function(*args, **kwargs)
        with jax.default_matmul_precision(PRECISIONS["highest"]):
            return function(*args, **kwargs)

    return jax.jit(precise, **options)


def setting(name: str) -> Any:
    """Returns one of JAX's settings by its full name, which JAX's own types leave out."""
    return getattr(jax.config, name)


def missing_platform() -> str | None:
    """Returns a message if JAX was told to use a platform (`JAX_PLATFORMS`) that it cannot; else None."""
    wanted = setting("jax_platforms")
    if not wanted:
        return None
    try:
        jax.devices()
    except Exception as error:  # of any kind, depending on the platform's plugin
        why = f" ({first_line(error)})" if str(error).strip() else ""
        advice = "set JAX_PLATFORMS=cpu, or install JAX for that platform, as pip install 'jaxqkv[cuda]' does for CUDA"
        return printable(f"JAX_PLATFORMS={wanted}: JAX has no such platform here{why}; {advice}")
    return None


class Execution(NamedTuple):
    """Static settings of a block; part of the jit key.

    Attributes:
      sharded: whether it runs on several devices.
      rounded: whether inputs of dense layers are rounded to bfloat16.
    """

    sharded: bool = False
    rounded: bool = False


def execution(mesh: Mesh | None) -> Execution:
    """Returns the settings for those devices, in the precision that is set."""
    return Execution(mesh is not None and mesh.size > 1, precision() == "bfloat16")


def rounded_product(x: Any, kernel: Any, dimension_numbers: Any, **options: Any) -> Any:
    """Computes `jax.lax.dot_general` of float32 numbers rounded to bfloat16, with sums in float32."""
    if x.dtype == jnp.float32:
        # `reduce_precision` rounds explicitly: some compilers remove a conversion back and forth.
        x, kernel = (jax.lax.reduce_precision(each, 8, 7).astype(jnp.bfloat16) for each in (x, kernel))
        options["preferred_element_type"] = jnp.float32
    return jax.lax.dot_general(x, kernel, dimension_numbers, **options)


# --- several devices ---

# Axes of a mesh: the batch is split over `data`, layers over `head`.
AXES = ("data", "head")
# Place in a layer's parameters → how it is split: Q, K and V by head, the MLP by its hidden width, and the projections
# after them by rows, so that the compiler sums the parts. All others are on every device.
SPLIT = {
    **{f"{module}/kernel": PartitionSpec(None, "head") for module in ("attn/q", "attn/k", "attn/v", "mlp/up")},
    **{f"{module}/bias": PartitionSpec("head") for module in ("attn/q", "attn/k", "attn/v", "mlp/up")},
    **{f"{module}/kernel": PartitionSpec("head", None) for module in ("attn/o", "mlp/down")},
}


def make_mesh(data: int | None = None, head: int = 1) -> Mesh:
    """Returns this process's devices as a grid of `data` by `head`.

    Args:
      data: parts of a batch; as many as there are devices for unless given.
      head: parts of a layer's width.

    Raises:
      JaxqkvError: when there are not enough devices.
    """
    devices = jax.local_devices()
    data = len(devices) // head if data is None else data
    if data < 1 or head < 1 or data * head > len(devices):
        kind = f"{len(devices)} {devices[0].platform} {plural(len(devices), 'device')}"
        raise JaxqkvError(f"a mesh of data={data}, head={head} needs {data * head} devices; here are {kind}")
    return Mesh(np.array(devices[: data * head]).reshape(data, head), AXES)


def check_split(parts: int, n_head: int, n_inner: int) -> None:
    """Refuses to cut a head, or to cut the hidden width into unequal parts.

    Raises:
      JaxqkvError: naming what does not divide.
    """
    for name, size in (("heads", n_head), ("hidden dimensions of the MLP", n_inner)):
        if size % parts:
            raise JaxqkvError(f"a mesh of head={parts} cannot split {size} {name} evenly")


def place_parameters(tree: Mapping[str, Any], mesh: Mesh) -> Any:
    """Puts parameters on the devices, split as `SPLIT` says."""

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        name = "/".join(str(step.key) for step in path)
        return jax.device_put(leaf, NamedSharding(mesh, SPLIT.get(name, PartitionSpec())))

    return jax.tree_util.tree_map_with_path(place, tree)


def place_batch(tree: Any, mesh: Mesh) -> Any:
    """Splits arrays `[batch, …]` over `data`; zeros, and a mask of False, fill the batch up to equal parts."""

    def place(leaf: Any) -> Any:
        pads = -leaf.shape[0] % mesh.shape["data"]
        if pads:
            pad = np.pad if isinstance(leaf, np.ndarray) else jnp.pad
            leaf = pad(leaf, [(0, pads)] + [(0, 0)] * (leaf.ndim - 1))
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("data")))

    return jax.tree.map(place, tree)


# --- compilation ---

_compilers = ThreadPoolExecutor(thread_name_prefix="compiler")


def compile_early(function: Any, *arguments: Any, **static: Any) -> Callable[..., Any]:
    """Compiles a jitted function for one set of shapes in the background.

    Args:
      function: from `jit`.
      arguments: its arrays, or `jax.ShapeDtypeStruct`s in their place.
      static: its static arguments.

    Returns:
      A function of arrays with those shapes; its first call waits until compilation is done.
    """
    future = _compilers.submit(function.lower(*arguments, **static).compile)
    return lambda *arrays: future.result()(*arrays)


_rounded = False


def set_precision(name: str) -> None:
    """Sets the precision of float32 matrix products from now on: one of `PRECISIONS`."""
    global _rounded
    jax.config.update("jax_default_matmul_precision", PRECISIONS[name])
    _rounded = name == "bfloat16"


def precision() -> str:
    """Returns the precision that is set; other names of JAX's (as TF32_TF32_F32) are "default" here."""
    name = setting("jax_default_matmul_precision")
    if name == "bfloat16":
        return "bfloat16" if _rounded else "default"
    same = {None: "highest", "float32": "highest", "F32_F32_F32": "highest"}
    same |= {"tensorfloat32": "high", "bfloat16_3x": "high"}
    return same.get(name, name if name in PRECISIONS else "default")


def cache(folder: str | os.PathLike[str] | None = None) -> Path:
    """Keeps all of XLA's compiled programs in a folder from now on, and returns the folder.

    The next process that calls this function reads them instead of compiling again.

    Args:
      folder: unless given, the folder set in JAX (`JAX_COMPILATION_CACHE_DIR`), or else the command's, in the user's
        cache folder; see `cache_folder`.

    Raises:
      JaxqkvError: when the folder cannot be written.
    """
    told = setting("jax_compilation_cache_dir") if folder is None else None
    place = Path(told or folder or cache_folder() / "xla").expanduser()
    if told is None:
        try:
            make_writable(place)
        except OSError as error:
            raise JaxqkvError(f"compiled programs are not kept: {place}: {error.strerror}") from None
        jax.config.update("jax_compilation_cache_dir", str(place.absolute()))
        compilation_cache.reset_cache()  # so that the new folder takes effect
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return place


def enable_compilation_cache() -> None:
    """Keeps compiled programs as `cache` does; prints a note if the folder cannot be written."""
    try:
        cache()
    except JaxqkvError as error:
        print(f"jaxqkv: {error}", file=sys.stderr)
