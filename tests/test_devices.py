"""Programs compiled early, and the same program in every process."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxqkv.devices import compile_early, jit

PRINT_PROGRAMS = """
import jax, numpy as np
from jaxqkv.studies import attention_scores, qkv_weights
q, mask = jax.ShapeDtypeStruct((1, 3, 7, 5), np.float32), jax.ShapeDtypeStruct((1, 7), bool)
print(attention_scores._reduce.lower(q, q, mask, names=frozenset(attention_scores.REDUCTIONS)).as_text())
wide = jax.ShapeDtypeStruct((15, 45), np.float32)
print(qkv_weights._reduce.lower(wide, n_head=3, names=frozenset(qkv_weights.REDUCTIONS)).as_text())
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


def test_programs_are_the_same_in_every_process():
    """Or the compilation cache would not know them again: sets of strings have another order in each."""
    texts = [
        subprocess.run(
            [sys.executable, "-c", PRINT_PROGRAMS],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    ]
    assert "func.func" in texts[0]
    assert texts[0] == texts[1] == texts[2]
