"""Several processes of one job, through JAX's own runtime: each reads its share, all know the sums.

Every process runs the same program. Within a process the devices form a mesh (`devices.make_mesh`);
between processes only statistics travel.
"""

import inspect
import os
import sys
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Shaped

from jaxqkv.errors import JaxqkvError, first_line

# Seconds until a process that has died, or never came, stops the others.
PATIENCE = 60
# Seconds that the others wait at their end for the first, which draws, while it lives.
DRAWING = 24 * 3600

_joined = False


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, patience: int = PATIENCE
) -> None:
    """Joins the job; before anything else of JAX is used.

    Args:
      coordinator: address and port of the first process. It and the next two are found in the
        environment where JAX knows it: SLURM, Open MPI, Cloud TPU.
      processes: how many there are.
      process: which one this is, from 0.
      patience: seconds to wait for the others, and until a dead one is noticed.

    Raises:
      JaxqkvError: when the others are not there in time, or nothing says who they are.
    """
    settings: dict[str, Any] = {"initialization_timeout": patience}
    known = inspect.signature(jax.distributed.initialize).parameters
    settings |= {"heartbeat_timeout_seconds": patience} if "heartbeat_timeout_seconds" in known else {}
    settings |= {"shutdown_timeout_seconds": DRAWING} if "shutdown_timeout_seconds" in known else {}
    # CPUs talk through gloo unless told otherwise; older versions of JAX hide the setting, and would not talk.
    if getattr(jax.config, "jax_cpu_collectives_implementation", None) in (None, "none"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, processes, process, **settings)
        global _joined
        _joined = True
    except Exception as error:  # JAX raises what its runtime or the job's environment does
        raise JaxqkvError(
            f"the processes did not find each other: {first_line(error)}; give --coordinator HOST:PORT, --processes N "
            "and --process I, or start them with srun or mpirun"
        ) from None


def leave(status: int) -> None:
    """Ends a process that failed at once, without waiting for the others, who may be waiting for it."""
    if _joined:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def count() -> int:
    """How many processes there are; 1 without `start`."""
    return jax.process_count()


def index() -> int:
    """Which one this is; the first writes the figures."""
    return jax.process_index()


def gather(values: Shaped[np.ndarray, "row *shape"]) -> list[Shaped[np.ndarray, "_ *shape"]]:
    """Every process's array, exactly; they may differ in their first axis.

    Raises:
      JaxqkvError: when another process is gone.
    """
    if count() == 1:
        return [values]
    values = np.ascontiguousarray(values)
    lengths = _gathered(np.array([len(values)], np.int32))[:, 0]
    if not any(lengths):
        return [values] * count()
    filled = np.zeros((max(lengths), *values.shape[1:]), values.dtype)
    filled[: len(values)] = values
    # As bytes: JAX would make 32 bits of 64.
    every = _gathered(filled.reshape(-1).view(np.uint8))
    return [part.view(values.dtype).reshape(filled.shape)[:length] for part, length in zip(every, lengths, strict=True)]


def total(values: Shaped[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    """The sum over all processes, each with an array of the same shape."""
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
    """All processes' rows, sorted by their numbers, of which each process has its own."""
    order = np.argsort(np.concatenate(gather(numbers)), kind="stable")
    return np.concatenate(gather(values))[order]
