"""`Batch`: its sequences, and what other libraries give."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BERT, GPT2

from jaxqkv.errors import JaxqkvError
from jaxqkv.text.batches import Batch, as_batch

MASK = np.array([[True, True, False], [False, True, True], [False, True, False]])
IDS = np.arange(9).reshape(3, 3)


def test_first_last_and_rows():
    batch = Batch(ids=IDS, mask=MASK, token_types=np.zeros_like(IDS))
    assert batch.first.tolist() == [0, 1, 1]
    assert batch.last.tolist() == [1, 2, 1]
    assert len(batch) == 3
    assert batch[1].ids.tolist() == [[3, 4, 5]]
    assert batch[-1].mask.tolist() == [[False, True, False]]
    assert [row.ids.tolist() for row in batch] == [[row] for row in IDS.tolist()]
    for index in (slice(1, 3), [1, 2], np.array([False, True, True])):
        np.testing.assert_array_equal(batch[index].ids, IDS[1:])
        np.testing.assert_array_equal(batch[index].mask, MASK[1:])
    with pytest.raises(IndexError):
        batch[3]


def parts(batch):
    return [np.asarray(part).tolist() for part in (batch.ids, batch.mask, batch.token_types)]


def test_of_lists():
    batch = Batch.of([[1, 2, 3], [4]])
    assert parts(batch) == [[[1, 2, 3], [4, 0, 0]], [[True] * 3, [True, False, False]], [[0] * 3] * 2]
    assert Batch.of(batch) is batch
    same = Batch.of([[1, 2], [3, 4]], mask=[[1, 1], [1, 0]], token_types=[[0, 1], [0, 0]])
    assert parts(same) == [[[1, 2], [3, 4]], [[True, True], [True, False]], [[0, 1], [0, 0]]]


@pytest.mark.parametrize("kind", ["lists", "numpy", "jax", "torch", "array", "dlpack"])
def test_of_a_mapping_of_arrays(kind):
    class Array:
        def __init__(self, values):
            self.values = np.asarray(values)

        def __array__(self, dtype=None, copy=None):
            return self.values

    class Dlpack:
        def __init__(self, values):
            self.values = np.asarray(values)

        def __dlpack__(self, **options):
            return self.values.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.values.__dlpack_device__()

    def make(values):
        if kind == "torch":
            return pytest.importorskip("torch", exc_type=ImportError).tensor(values)
        return {"lists": list, "numpy": np.array, "jax": jnp.array, "array": Array, "dlpack": Dlpack}[kind](values)

    given = {"input_ids": make([[1, 2, 3]]), "attention_mask": make([[1, 1, 0]]), "token_type_ids": make([[0, 1, 1]])}
    for batch in (Batch.of(given), as_batch(given, BERT), Batch.of(types.MappingProxyType(given))):
        assert parts(batch) == [[[1, 2, 3]], [[True, True, False]], [[0, 1, 1]]]
    if kind != "lists":
        assert as_batch(given["input_ids"], GPT2).ids.tolist() == [[1, 2, 3]]
    given.pop("token_type_ids")
    assert parts(as_batch(given, GPT2))[2] == [[0, 0, 0]]


def test_of_a_tokenizer_of_transformers():
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    given = {"input_ids": [[1, 2], [3]], "token_type_ids": [[0, 1], [0]]}
    encoding = transformers.BatchEncoding(given | {"attention_mask": [[1, 1], [1]]})
    assert parts(as_batch(encoding, BERT)) == [[[1, 2], [3, 0]], [[True, True], [True, False]], [[0, 1], [0, 0]]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (({"input_ids": [[1]], "position_ids": [[0]]},), "a batch has no position_ids; it is made of input_ids"),
        (({"attention_mask": [[1]]},), "a batch needs input_ids"),
        (({"input_ids": [[1]], "mask": [[1]], "attention_mask": [[1]]},), "mask is given twice"),
        (([[1, 2]], [[1, 2]]), "an integer mask is 1 at real tokens and 0 at pads"),
        (([[1, 2]], [[1.0, 0.0]]), "mask is boolean"),
        (([[1, 2]], [[1]]), r"mask \[1, 1\] does not match ids \[1, 2\]"),
        (([[1, 2]], None, [[0.0, 1.0]]), "expected integer token_types"),
        (([1, 2],), r"expected integer ids \[batch, pos\], got int64 \[2\]"),
        (([["a"]],), "`tokenize` makes them of texts"),
    ],
)
def test_what_is_no_batch(given, message):
    with pytest.raises(JaxqkvError, match=message):
        Batch.of(*given)


def test_large_ids_are_not_cut_to_32_bits():
    with pytest.raises(JaxqkvError, match=f"reach from {2**32} to {2**32}"):
        as_batch(np.array([[2**32]]), GPT2)
