"""A side of a case in its process, and the transfer of its arrays to the device and back."""

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

# A case as sent to each side's process.
Spec = dict[str, Any]


@dataclasses.dataclass
class Work:
    """One side of a case.

    Attributes:
      run: computes the result, and returns when it is ready.
      result: converts it to an array to compare with the other sides'.
      device_peak: peak bytes of the accelerator's own memory, if it has any.
      settle: called once after the first run, to choose the faster variant.
      forget_peak: begins to measure `device_peak` anew, where that is possible.
    """

    run: Callable[[], Any]
    result: Callable[[Any], np.ndarray] = np.asarray
    device_peak: Callable[[], int | None] = lambda: None
    settle: Callable[[], None] = lambda: None
    forget_peak: Callable[[], None] = lambda: None


def choose_precision(side: str, tf32: bool) -> None:
    """Sets the precision of this process's float32 products: full, or TensorFloat-32 where the device has it."""
    if side == "jaxqkv":
        from jaxqkv.runtime.devices import set_precision

        if tf32:  # full precision is the package's own default
            set_precision("default")  # one pass, which is TensorFloat-32 on a GPU
        return
    import torch

    torch.set_float32_matmul_precision("high" if tf32 else "highest")


def fastest(variants: Iterable[Any], run: Callable[[Any], Any], device: str) -> Any:
    """Returns the variant with the shortest run; on an accelerator of two each, since a first one loads kernels."""
    _, synchronise, _ = on_torch(device)
    seconds = {}
    for variant in variants:
        for _ in range(1 if device == "cpu" else 2):
            start = time.perf_counter()
            run(variant)
            synchronise()
            seconds[variant] = min(seconds.get(variant, np.inf), time.perf_counter() - start)
    return min(seconds, key=seconds.__getitem__)


def on_torch(device: str) -> tuple[Callable[[Any], Any], Callable[[], None], Callable[[], int | None]]:
    """Returns functions that move arrays to the device, wait for it, and return its peak of memory."""
    import torch

    def put(values: Any) -> Any:
        return torch.as_tensor(values).to(device)

    if device == "cpu":
        return put, lambda: None, lambda: None
    return put, torch.cuda.synchronize, torch.cuda.max_memory_allocated


def _jax_peak() -> int | None:
    import jax

    statistics = jax.local_devices()[0].memory_stats()
    return statistics and statistics.get("peak_bytes_in_use")


def jax_work(run: Callable[[], Any], result: Callable[[Any], np.ndarray] = np.asarray) -> Work:
    import jax

    return Work(lambda: jax.block_until_ready(run()), result, _jax_peak)


def torch_work(run: Callable[[], Any], spec: Spec, result: Callable[[Any], np.ndarray] = lambda x: host(x)) -> Work:
    _, synchronise, device_peak = on_torch(spec["device"])

    def synchronised() -> Any:
        value = run()
        synchronise()
        return value

    forget = (lambda: None) if spec["device"] == "cpu" else _forget_torch_peak
    return Work(synchronised, result, device_peak, forget_peak=forget)


def _forget_torch_peak() -> None:
    import torch

    torch.cuda.reset_peak_memory_stats()


def host(x: Any) -> np.ndarray:
    return np.asarray(x if isinstance(x, np.ndarray) else x.cpu())
