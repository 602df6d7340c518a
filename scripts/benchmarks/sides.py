"""A side of a case in its process, and the transfer of its arrays to the device and back."""

import dataclasses
from collections.abc import Callable
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
    """

    run: Callable[[], Any]
    result: Callable[[Any], np.ndarray] = np.asarray
    device_peak: Callable[[], int | None] = lambda: None
    settle: Callable[[], None] = lambda: None


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

    statistics = jax.devices()[0].memory_stats()
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

    return Work(synchronised, result, device_peak)


def host(x: Any) -> np.ndarray:
    return np.asarray(x if isinstance(x, np.ndarray) else x.cpu())
