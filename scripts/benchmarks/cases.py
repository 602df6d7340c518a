"""Cases timed inside a process, by kind, and the matrix product that measures the machine.

A case is described by a dict that is sent to each side's process, where `work` makes it runnable. A
side imports only what it needs itself: jaxqkv's process has no PyTorch in memory.
"""

import numpy as np

from benchmarks.kernels import kernel
from benchmarks.passes import forward
from benchmarks.sides import Spec, Work, jax_work, on_torch, torch_work
from benchmarks.sweeps import sweep


def work(side: str, spec: Spec) -> Work:
    """Returns a case as `side` runs it: `jaxqkv`, `tuned` or `notebook`."""
    return KINDS[spec["kind"]](side, spec)


def _product(side: str, spec: Spec) -> Work:
    x = np.random.default_rng(0).normal(size=(spec["size"], spec["size"])).astype(np.float32)
    if side == "jaxqkv":
        import jax.numpy as jnp

        from jaxqkv.runtime.devices import jit

        product, on_device = jit(jnp.dot), jnp.asarray(x)
        return jax_work(lambda: product(on_device, on_device))
    put, *_ = on_torch(spec["device"])
    tensor = put(x)
    return torch_work(lambda: tensor @ tensor, spec)


KINDS = {"forward": forward, "sweep": sweep, "kernel": kernel, "product": _product}
