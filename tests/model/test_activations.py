"""`Activations` as one uses them: arithmetic, and a dataset of xarray."""

import dataclasses
import operator
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GPT2, random_ids

import jaxqkv
from jaxqkv.architectures.activations import Activations
from jaxqkv.errors import JaxqkvError

MASK = np.array([[True, True, True], [True, True, False]])


def made(seed, layers=(2, 0), mask=MASK, dtype=np.float32, **others):
    generator = np.random.default_rng(seed)
    pos = mask.shape[1]
    arrays = {"q": generator.normal(size=(len(layers), 2, 5, pos, 7)), "hidden": generator.normal(size=(2, pos, 11))}
    fields = {name: jnp.asarray(values.astype(dtype)) for name, values in arrays.items()}
    return Activations(mask=mask, layers=layers, **(fields | others))


@pytest.mark.parametrize("name", ["add", "sub", "mul", "truediv"])
def test_arithmetic_of_two(name):
    """Field by field; mask and layers are those of both."""
    one, other, function = made(0), made(1), getattr(operator, name)
    result = function(one, other)
    assert result.layers == (2, 0)
    np.testing.assert_array_equal(result.mask, MASK)
    assert result.mask.dtype == bool
    assert result.k is None
    for field in ("q", "hidden"):
        np.testing.assert_array_equal(result[field], function(np.asarray(one[field]), np.asarray(other[field])))


@pytest.mark.parametrize("number", [2, 0.5, np.float64(0.5), np.float32(3), np.int64(3), jnp.float32(0.25)])
def test_arithmetic_with_a_number(number):
    one = made(0, hidden=None)
    q, value = np.asarray(one.q), float(number)
    for result, expected in (
        (one * number, q * value),
        (number * one, q * value),
        (one - number, q - value),
        (number - one, value - q),
        (number + one, q + value),
        (one / number, q / value),
        (-one, -q),
        (abs(one), abs(q)),
    ):
        assert isinstance(result, Activations)
        assert result.q.dtype == jnp.float32
        np.testing.assert_allclose(result.q, expected, rtol=1e-6)
        assert result.mask is one.mask
    np.testing.assert_allclose((one**2).q, q**2, rtol=1e-6)


def test_a_function_of_every_field():
    one, other = made(0), made(1)
    np.testing.assert_array_equal(one.map(jnp.maximum, other).q, np.maximum(np.asarray(one.q), np.asarray(other.q)))
    narrow = made(0, dtype=jnp.bfloat16)
    assert (narrow * 2.0).q.dtype == jnp.bfloat16


def test_arithmetic_inside_transformations(gpt2_model):
    """As of two models' activations, in a program."""
    ids = random_ids(GPT2, 2, 11)
    difference = jax.jit(operator.sub)(made(0), made(1))
    for field in ("q", "hidden"):
        np.testing.assert_array_equal(difference[field], np.asarray(made(0)[field]) - np.asarray(made(1)[field]))
    np.testing.assert_array_equal(difference.mask, MASK)
    clean = gpt2_model.run(ids, capture={"z", "k"}, layers=0)

    def distance(params):
        return ((jaxqkv.forward(params, ids, GPT2, capture={"z", "k"}, layers=0) - clean) ** 2).z.sum()

    value, gradient = jax.jit(jax.value_and_grad(distance))(gpt2_model.params())
    assert value < 1e-6
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (made(1, layers=(0, 2)), "activations of different layers: 2, 0 and 0, 2; capture the same"),
        (made(1, hidden=None), "hidden was captured on one side only"),
        (made(1, mask=~MASK), "the masks differ: position 0 of sequence 0 is padded on one side only"),
        (made(1, mask=MASK[:, :2]), r"activations of different batches: their masks are \[2, 3\] and \[2, 2\]"),
    ],
)
def test_activations_that_do_not_go_together(other, message):
    with pytest.raises(JaxqkvError, match=message):
        made(0) - other


@pytest.mark.parametrize("other", ["a", None, True, np.ones(3), [1]])
def test_what_is_no_operand(other):
    with pytest.raises(TypeError, match="Activations"):
        made(0) * other


# --- xarray ---


def test_a_dataset_of_a_run(gpt2_model):
    xarray = pytest.importorskip("xarray", exc_type=ImportError)
    acts = gpt2_model.run(random_ids(GPT2, 2, 11), capture={"q", "pattern", "resid_post", "logits"}, layers=[2, 0])
    data = acts.to_xarray()
    assert isinstance(data, xarray.Dataset)
    assert {name: values.dims for name, values in data.items()} == {
        "q": ("layer", "batch", "head", "pos", "head_dim"),
        "pattern": ("layer", "batch", "head", "query", "key"),
        "resid_post": ("layer", "batch", "pos", "embed"),
        "logits": ("batch", "pos", "vocab"),
    }
    assert data.layer.values.tolist() == [2, 0]
    np.testing.assert_array_equal(data.q.sel(layer=0), np.asarray(acts.q)[1])
    np.testing.assert_array_equal(data.pattern.isel(head=3).sel(layer=2), np.asarray(acts.pattern)[0, :, 3])
    np.testing.assert_array_equal(data.logits, acts.logits)
    assert data.mask.dims == ("batch", "pos")
    assert data.mask.values.all()
    np.testing.assert_allclose(data.q.mean("pos"), np.asarray(acts.q).mean(axis=3), atol=1e-6)
    data.q[:] = 0  # a copy
    assert np.asarray(acts.q).any()


def test_a_dataset_of_outputs_and_of_bfloat16():
    pytest.importorskip("xarray", exc_type=ImportError)
    data = dataclasses.replace(made(0), q=None, layers=()).to_xarray()
    assert set(data.variables) == {"hidden", "mask"}
    narrow = made(0, dtype=jnp.bfloat16)
    data = narrow.to_xarray()
    assert data.q.dtype == np.float32
    np.testing.assert_array_equal(data.q, np.asarray(narrow.q, np.float32))
    assert set(data.mean("batch").data_vars) == {"q", "hidden"}


def test_without_xarray(monkeypatch):
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(JaxqkvError, match=r"^xarray is not installed; install it: pip install xarray$"):
        made(0).to_xarray()
