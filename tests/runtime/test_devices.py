"""Programs compiled early, and the same program in every process; the precision of products."""

import os
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import GPT2, random_ids
from helpers.processes import COMMAND, fork

import jaxqkv.studies.attention_scores.run as attention_scores
import jaxqkv.studies.qkv_weights.run as qkv_weights
from jaxqkv.runtime import devices
from jaxqkv.runtime.devices import compile_early, jit

PROGRAMS = """
import jax, numpy as np
import jaxqkv.studies.attention_scores.run as attention_scores
import jaxqkv.studies.qkv_weights.run as qkv_weights
q, mask = jax.ShapeDtypeStruct((1, 3, 7, 5), np.float32), jax.ShapeDtypeStruct((1, 7), bool)
wide = jax.ShapeDtypeStruct((15, 45), np.float32)
programs = [
    attention_scores._reduce.lower(q, q, mask, names=frozenset(attention_scores.REDUCTIONS)).as_text(),
    qkv_weights._reduce.lower(wide, n_head=3, names=frozenset(qkv_weights.FUNCTIONS)).as_text(),
]
"""


@jit(static_argnames="power")
def _scaled_power(x, factor, *, power):
    return factor * x**power


def test_a_program_compiled_early_computes_what_the_function_does():
    x = np.arange(7, dtype=np.float32)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    program = compile_early(_scaled_power, shape, np.float32(1), power=3)
    np.testing.assert_array_equal(program(x, np.float32(5)), 5 * x**3)
    np.testing.assert_array_equal(program(x + 1, np.float32(2)), 2 * (x + 1) ** 3)


def test_a_program_compiled_early_takes_its_own_shapes_alone():
    program = compile_early(_scaled_power, np.zeros(7, np.float32), np.float32(1), power=3)
    with pytest.raises(TypeError, match="float32\\[7\\]"):
        program(np.zeros(5, np.float32), np.float32(1))


@pytest.mark.slow
def test_programs_are_the_same_in_every_process():
    """Or the compilation cache would not know them again: sets of strings have another order in each."""
    ours = {}
    exec(PROGRAMS, ours)
    names = sorted(attention_scores.REDUCTIONS | qkv_weights.FUNCTIONS)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\nprint(*set(sys.argv[1:]))\n{PROGRAMS}\nprint(*programs)", *names],
        env=os.environ | {"PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    order, _, programs = done.stdout.partition("\n")
    assert order.split() != list(set(names))
    assert "func.func" in programs
    assert programs == " ".join(ours["programs"]) + "\n"


class TestPrecision:
    @pytest.fixture(autouse=True)
    def _restored(self):
        before = jax.config.jax_default_matmul_precision
        yield
        devices.set_precision("default")
        jax.config.update("jax_default_matmul_precision", before)

    @pytest.mark.parametrize("name", devices.PRECISIONS)
    def test_what_is_set_is_what_is_said(self, name):
        devices.set_precision(name)
        assert devices.precision() == name
        assert devices.execution(None).rounded == (name == "bfloat16")

    @pytest.mark.parametrize(
        ("name", "same"),
        [(None, "highest"), ("float32", "highest"), ("tensorfloat32", "high"), ("bfloat16", "default")],
    )
    def test_jaxs_own_names(self, name, same):
        with jax.default_matmul_precision(name):
            assert devices.precision() == same

    def test_rounded_products(self):
        """Against one in float64 of what bfloat16 leaves of the numbers."""
        generator = np.random.default_rng(0)
        x, kernel = (generator.normal(size=size).astype(np.float32) for size in ((3, 7, 53), (53, 11)))
        actual = jit(lambda x, kernel: devices.rounded_product(x, kernel, (((2,), (0,)), ((), ()))))(x, kernel)
        assert actual.dtype == np.float32
        expected = np.matmul(*(each.astype(ml_dtypes.bfloat16).astype(np.float64) for each in (x, kernel)))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
        assert np.abs(actual - np.matmul(x.astype(np.float64), kernel.astype(np.float64))).max() > 1e-3

    def test_other_dtypes_are_left_alone(self):
        x = np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3)
        assert devices.rounded_product(x, x.T, (((1,), (0,)), ((), ()))).dtype == ml_dtypes.bfloat16

    def test_a_model_is_rounded_when_that_is_set(self, gpt2_model):
        """And not when it is not any more: no program of before is used again. BERT's is in cli/test_verify.py."""
        ids, model = random_ids(GPT2, 2, 7), gpt2_model
        full = np.asarray(model.run(ids, capture={"q"}).q)
        devices.set_precision("bfloat16")
        rounded = np.asarray(model.run(ids, capture={"q"}).q)
        devices.set_precision("highest")
        assert 1e-4 < np.abs(rounded - full).max() / np.abs(full).max() < 0.05
        np.testing.assert_array_equal(model.run(ids, capture={"q"}).q, full)


def assert_missing(done, platforms):
    """One line says which."""
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"jaxqkv: error: JAX_PLATFORMS={platforms}: JAX has no such platform here")
    assert "; set JAX_PLATFORMS=cpu, or install JAX for that platform, as pip install 'jaxqkv[cuda]'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_platform_that_is_not_there(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "figures", "qkv-weights", "1", "--demo"],
        env=os.environ | {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert_missing(done, "cuda")


@pytest.mark.slow
def test_platforms_of_which_one_is_not_there(tmp_path):
    """Where JAX's own error says nothing."""
    told = 'import jax, sys\njax.config.update("jax_platforms", sys.argv.pop())\n'  # as JAX's import reads it
    done = fork(told + COMMAND, "view", "demo-gpt2", "--text", "I saw her", "nonsense,cpu", cwd=tmp_path).completed()
    assert_missing(done, "nonsense,cpu")


def test_a_platform_that_is_there():
    assert devices.missing_platform() is None
