"""Several processes of one job, through JAX's own runtime: each reads its share, and all have the sums.

Every process runs the same program. Within a process the devices form a mesh (`devices.make_mesh`); between processes
only statistics are sent.
"""

import inspect
import os
import sys
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Shaped

from jaxqkv.errors import JaxqkvError, first_line

# Seconds until a process that has died or has not started stops the others.
PATIENCE = 60
# Seconds that the other processes wait at the end for the first, which draws.
DRAWING = 24 * 3600

_joined = False


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, patience: int = PATIENCE
) -> None:
    """Joins the job; to be called before anything else of JAX is used.

    Args:
      coordinator: address and port of the first process. Under SLURM, Open MPI and Cloud TPU, JAX finds this and the
        next two in the environment.
      processes: number of processes.
      process: number of this process, from 0.
      patience: seconds to wait for the others, and until a dead one is noticed.

    Raises:
      JaxqkvError: when the others do not join in time, or cannot be found.
    """
    settings: dict[str, Any] = {"initialization_timeout": patience}
    known = inspect.signature(jax.distributed.initialize).parameters
    settings |= {"heartbeat_timeout_seconds": patience} if "heartbeat_timeout_seconds" in known else {}
    settings |= {"shutdown_timeout_seconds": DRAWING} if "shutdown_timeout_seconds" in known else {}
    # CPUs communicate through gloo unless set otherwise; older versions of JAX hide the setting and have no default.
    if getattr(jax.config, "jax_cpu_collectives_implementation", None) in (None, "none"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, processes, process, **settings)
        global _joined
        _joined = True
    except Exception as error:  # of any kind, depending on the runtime and the job's environment
        raise JaxqkvError(
            f"the processes did not find each other: {first_line(error)}; give --coordinator HOST:PORT, --processes N "
            "and --process I, or start them with srun or mpirun"
        ) from None


def leave(status: int) -> None:
    """Ends a failed process at once, without waiting for the others, which may be waiting for it."""
    if _joined:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def count() -> int:
    """Returns the number of processes; 1 without `start`."""
    return jax.process_count()


def index() -> int:
    """Returns the number of this process; the first, 0, writes the figures."""
    return jax.process_index()


def gather(values: Shaped[np.ndarray, "row *shape"]) -> list[Shaped[np.ndarray, "_ *shape"]]:
    """Returns every process's array, exactly; their first axes may have different lengths.

    Raises:
      JaxqkvError: when another process has ended.
    """
    if count() == 1:
        return [values]
    values = np.ascontiguousarray(values)
    lengths = _gathered(np.array([len(values)], np.int32))[:, 0]
    if not any(lengths):
        return [values] * count()
    filled = np.zeros((max(lengths), *values.shape[1:]), values.dtype)
    filled[: len(values)] = values
    # As bytes, since JAX would convert 64 bits to 32.
    every = _gathered(filled.reshape(-1).view(np.uint8))
    return [part.view(values.dtype).reshape(filled.shape)[:length] for part, length in zip(every, lengths, strict=True)]


def total(values: Shaped[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    """Returns the sum over all processes, each with an array of the same shape."""
    return np.sum(gather(values), axis=0, dtype=values.dtype)


def _gathered(values: np.ndarray) -> np.ndarray:
    from jax.experimental import multihost_utils

    try:
        return np.asarray(multihost_utils.process_allgather(values))
    except Exception as error:
        raise JaxqkvError(f"another process of the job is gone: {first_line(error)}") from None


def in_order(
    values: Shaped[np.ndarray, "row *shape"], numbers: Int[np.ndarray, "row"]
) -> Shaped[np.ndarray, "_ *shape"]:
    """Returns the rows of all processes, sorted by their numbers; each process gives its own of both."""
    order = np.argsort(np.concatenate(gather(numbers)), kind="stable")
    return np.concatenate(gather(values))[order]
