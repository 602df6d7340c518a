"""Every public kernel and every architecture's block can be compiled for CPUs, NVIDIA's and AMD's GPUs, and TPUs.

`jax.export` lowers a program for a backend without such a device.
"""

from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIGS, write_folder
from kernels.test_calling import CALLS, EDGES
from packaging.version import Version

import jaxqkv
from jaxqkv import kernels
from jaxqkv.architectures import attention
from jaxqkv.runtime.devices import Execution

export = pytest.importorskip("jax.export", exc_type=ImportError)

BACKENDS = ("cpu", "cuda", "rocm", "tpu")
# Before jaxlib 0.5 a GPU's solvers come with the plugin for that GPU, and it is XLA that leaves one of two ways out.
OLD = Version(version("jaxlib")) < Version("0.5")
SOLVERS = ("linear_regression", "principal_components", "spectrum") if OLD else ()
# Of arrays of NumPy: they run on the host.
HOST = ("bin_index", "copying_score", "freedman_diaconis_histogram", "percentile_edges", "require_finite")


def lowered(function, *arrays, platforms=BACKENDS):
    return export.export(jax.jit(function), platforms=platforms)(*arrays)


@pytest.mark.parametrize("name", sorted(CALLS.keys() - {*HOST, *SOLVERS}))
def test_kernels(name):
    arrays, settings = CALLS[name]
    kernel = getattr(kernels, name)
    traced = [number for number, array in enumerate(arrays) if array is not EDGES]  # edges are float64 of the host

    def call(*given):
        return kernel(*(given[traced.index(n)] if n in traced else arrays[n] for n in range(len(arrays))), **settings)

    program = lowered(call, *(jnp.asarray(arrays[number]) for number in traced))
    assert program.platforms == BACKENDS


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks(name, tmp_path, monkeypatch):
    """Large heads, as far as `attend` knows, are taken one after another on a CPU alone."""
    monkeypatch.setattr(attention, "SLICED_FROM", 1)
    config = CONFIGS[name]
    model = jaxqkv.load(write_folder(tmp_path / "model", config))
    visible = attention.visible_keys(np.ones((2, 11), bool), config.causal)
    stream = np.random.default_rng(0).normal(size=(2, 11, config.n_embd)).astype(np.float32)

    def run(params, x):
        return config.block(params, x, visible, jnp.int32(0), Execution())

    arrays = model.params()["layers"][0], jnp.asarray(stream)
    if name == "gpt2":  # all architectures share the attention
        loops = {each: "stablehlo.while" in lowered(run, *arrays, platforms=[each]).mlir_module() for each in BACKENDS}
        assert loops == {"cpu": True, "cuda": OLD, "rocm": OLD, "tpu": OLD}
    else:
        assert lowered(run, *arrays).platforms == BACKENDS
