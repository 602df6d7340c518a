"""Reducers: what they are compiled for, and that they treat each sequence by itself."""

import dataclasses
import functools
import gc
import types
import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GPT2, MODEL_LIMIT, random_ids, relative_error, write_folder
from helpers.oracles import masked_batch

import jaxqkv
from jaxqkv import metrics
from jaxqkv.errors import JaxqkvError
from jaxqkv.model import driver, reducers
from jaxqkv.model.reducers import Bound

THRESHOLD = 1.0


def shifted(attention, mask, by):
    return attention.q[:, 0, 0, 0] + by


def of_a_global(attention, mask):
    return shifted(attention, mask, THRESHOLD)


class Method:
    def __init__(self, by):
        self.by, self.unused = by, []

    def reduce(self, attention, mask):
        return shifted(attention, mask, self._value())

    __call__ = reduce

    def _value(self):
        return self.by


@dataclasses.dataclass
class Setting:
    by: float


def changing(kind):
    """A reducer that adds a number, and how the number is changed without another object."""
    if kind == "closure":
        by = 1.0

        def change(to):
            nonlocal by
            by = to

        return lambda attention, mask: shifted(attention, mask, by), change
    if kind == "array":
        array = np.ones(2, np.float32)
        return lambda attention, mask: shifted(attention, mask, array), lambda to: array.fill(to)
    if kind == "list":
        values = [1.0]
        return lambda attention, mask: shifted(attention, mask, values[0]), lambda to: values.__setitem__(0, to)
    if kind in ("dataclass", "namespace"):
        setting = Setting(1.0) if kind == "dataclass" else types.SimpleNamespace(by=1.0)
        return lambda attention, mask: shifted(attention, mask, setting.by), lambda to: setattr(setting, "by", to)
    if kind == "nested":
        setting = {"inner": [Setting(1.0)]}
        return (
            lambda attention, mask: shifted(attention, mask, setting["inner"][0].by),
            lambda to: setattr(setting["inner"][0], "by", to),
        )
    if kind in ("method", "called"):
        held = Method(1.0)
        return held.reduce if kind == "method" else held, lambda to: setattr(held, "by", to)
    if kind == "partial":
        setting = Setting(1.0)
        return (
            functools.partial(lambda attention, mask, s: shifted(attention, mask, s.by), s=setting),
            lambda to: setattr(setting, "by", to),
        )
    if kind == "defaults":

        def reduce(attention, mask, by=1.0):
            return shifted(attention, mask, by)

        return reduce, lambda to: setattr(reduce, "__defaults__", (to,))
    return of_a_global, lambda to: globals().__setitem__("THRESHOLD", to)


# All runs here take one shape, and most stop after the first layer, whose block is compiled by itself.
IDS = random_ids(GPT2, 2, 11)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return jaxqkv.load(write_folder(tmp_path_factory.mktemp("folder") / "gpt2", GPT2))


KINDS = ("closure", "array", "list", "dataclass", "namespace", "nested", "method", "called", "partial", "defaults")


@pytest.mark.parametrize("kind", [*KINDS, "global"])
def test_what_has_changed_has_another_program(kind):
    """The key of compiled programs changes with the number that it adds, and is the same again with the first one."""
    reduce, change = changing(kind)
    attention = types.SimpleNamespace(q=np.zeros((2, 1, 1, 1), np.float32))
    before = Bound(reduce)
    programs = functools.lru_cache(driver._run_block_with.__wrapped__)  # not the package's own: none of them is run
    program = programs(before, None)
    assert programs(Bound(reduce), None) is program
    try:
        for by in (1.0, 2.0):
            change(by)
            np.testing.assert_array_equal(Bound(reduce)(attention, None), [by, by])
            assert (before == Bound(reduce)) == (by == 1.0)
            assert (programs(Bound(reduce), None) is program) == (by == 1.0)
    finally:
        change(1.0)
    assert before == Bound(reduce)


def test_what_has_changed_is_computed_with(gpt2):
    """For one kind; of all others the key of the program is looked at above."""
    q = np.asarray(gpt2.run(IDS, capture={"q"}, layers=0).q)[:, :, 0, 0, 0]
    reduce, change = changing("global")
    try:
        for by in (1.0, 2.0):
            change(by)
            assert relative_error(gpt2.run(IDS, reduce=reduce, layers=0), q + np.float32(by)) <= MODEL_LIMIT
    finally:
        change(1.0)


def test_a_function_made_anew_is_compiled_once(gpt2):
    traced = []

    def made(by, count):
        return lambda attention, mask: (count(1), shifted(attention, mask, by))[1]

    count = traced.append
    for by in (1.0, 1.0, 2.0, 1.0, 2.0):
        gpt2.run(IDS, reduce=made(by, count), layers=0)
    assert len(traced) == 2


def test_what_is_compared_by_value_and_what_is_not():
    def made(value):
        return Bound(lambda attention, mask: value)

    for one, two in ((1, 1.0), (1, True), (0.0, -0.0), ([1], (1,)), (np.float32(1), 1.0), ("1", 1)):
        assert made(one) != made(two)
    nan, array = float("nan"), jnp.arange(3)
    for one, two in ((nan, float("nan")), ({"a": [1]}, {"a": [1]}), ({1, 2}, {2, 1}), (np.arange(3), np.arange(3))):
        assert made(one) == made(two)
        assert hash(made(one)) == hash(made(two))
    assert made(array) == made(array)
    assert made(array) != made(jnp.arange(3))
    assert made(np.arange(3)) != made(np.arange(3.0))


def test_functions_that_name_themselves_and_each_other():
    def made(by):
        def one(n):
            return two(n - 1) if n else by

        def two(n):
            return one(n - 1) if n else by

        return Bound(lambda attention, mask: one(3))

    assert made(1) == made(1)
    assert made(1) != made(2)


def test_attributes_that_a_method_does_not_name_do_not_matter():
    held = Method(1.0)
    before = Bound(held.reduce)
    held.unused.append(bytearray(1))
    assert before == Bound(held.reduce)


def test_what_cannot_be_compared_is_refused(gpt2):
    buffer = bytearray(1)
    with pytest.raises(JaxqkvError, match=r"`reduce` depends on `buffer`, a bytearray, .* give arrays as `inputs=`"):
        gpt2.run(IDS, reduce=lambda attention, mask: buffer[0] + attention.q)


def test_an_object_that_cannot_be_hashed_is_called(gpt2):
    @dataclasses.dataclass
    class Reduce:
        by: float

        def __call__(self, attention, mask):
            return shifted(attention, mask, self.by)

    one, two = (np.asarray(gpt2.run(IDS, reduce=Reduce(by), layers=0)) for by in (1.0, 3.0))
    np.testing.assert_allclose(two - one, 2, atol=1e-6)


@pytest.mark.parametrize("role", ["reduce", "edit", "metric"])
def test_an_equal_function_is_compiled_for_a_new_length_with_its_own_values(gpt2, role):
    """The first one, which sees another number by then, is not what is compiled."""

    def times(setting):
        def of_two(value, other):
            return value * setting.by

        return of_two if role == "edit" else lambda attention, mask: attention.q[:, 0, 0, 0] * setting.by

    def run(setting, ids):
        if role == "reduce":
            return gpt2.run(ids, reduce=times(setting), layers=0)
        if role == "edit":
            return gpt2.run(ids, edit={"q": times(setting)}, layers=0).q
        return gpt2.measure(ids, metrics.of_hidden(lambda hidden: hidden[:, 0] * setting.by))

    first = types.SimpleNamespace(by=2.0)
    run(first, IDS[:, :4])
    first.by = 1.0
    once = run(first, IDS)
    assert relative_error(run(types.SimpleNamespace(by=2.0), IDS), 2 * np.asarray(once)) <= MODEL_LIMIT


def test_programs_used_longest_ago_are_let_go(gpt2, monkeypatch):
    limited = functools.lru_cache(maxsize=2)(driver._run_block_with.__wrapped__)
    monkeypatch.setattr(driver, "_run_block_with", limited)
    alive = []
    for by in range(3):
        held = Method(float(by))
        held.by = jnp.float32(by)  # by identity, and so kept as long as the program
        alive.append(weakref.ref(held.by))
        gpt2.run(IDS, reduce=held.reduce, layers=0)
        del held
    gc.collect()
    assert [each() is not None for each in alive] == [False, True, True]


# --- sequences by themselves ---


def mean_of_batch(attention, mask):
    return attention.q.max(axis=(1, 2, 3)) - attention.q.mean()


def masked_mean(attention, mask):
    total = jnp.where(mask[:, :, None], attention.attn_out, 0).sum(axis=1)
    return {"mean": total / mask.sum(axis=1, keepdims=True).astype(total.dtype), "tokens": mask.sum(axis=1)}


@pytest.mark.parametrize("padded", [True, False])
def test_a_check_of_reducers(gpt2, padded):
    mask = np.ones(IDS.shape, bool)
    mask[1, 4:] = not padded
    batch = masked_batch(IDS, mask)
    expected = gpt2.run(batch, reduce=masked_mean, layers=0)
    checked = gpt2.run(batch, reduce=masked_mean, layers=0, check=True)
    for name, values in expected.items():
        np.testing.assert_array_equal(checked[name], values)
    run = functools.partial(gpt2.run, batch, check=True, layers=0)
    with pytest.raises(JaxqkvError, match="depends on other sequences of the batch: its result of layer 0 differs by"):
        run(reduce=mean_of_batch)
    with pytest.raises(JaxqkvError, match=r"depends on values at pads: \['a'\] of layer 0 differs by"):
        run(reduce=lambda attention, mask: {"a": attention.attn_out.mean(axis=(1, 2))})
    weights = np.array([1, 2], np.float32)
    weighted, q = run(reduce=lambda a, mask, w: (a.q[:, 0, 0, 0] * w, a.q), inputs=weights, layers=[1, 0])
    np.testing.assert_array_equal(weighted, np.asarray(q)[:, :, 0, 0, 0] * weights)


def test_a_check_without_a_reducer(gpt2):
    with pytest.raises(JaxqkvError, match="`check` needs `reduce`"):
        gpt2.run(IDS, check=True)


def test_another_axis_of_the_batch_is_refused(gpt2):
    """Also where the batch fits in one piece, so that a larger one is no surprise; without a limit it is allowed."""

    def products(attention, mask):
        last = attention.q[:, 0, -1]
        return last @ last.T

    q = np.asarray(gpt2.run(IDS, capture={"q"}, layers=0).q)[:, :, 0, -1]
    found = gpt2.run(IDS, reduce=products, layers=0)
    np.testing.assert_allclose(found, q @ q.swapaxes(1, 2), rtol=1e-5, atol=1e-5)
    for memory in (1, "1GB"):
        with pytest.raises(JaxqkvError, match="has the batch as a further axis"):
            gpt2.run(IDS, reduce=products, memory=memory)


def test_every_reducer_of_the_package_can_be_compared():
    from jaxqkv.studies.token_frequency import reductions

    one, two = (Bound(reductions.reducer((reductions.BINNED,), None)) for _ in range(2))
    assert one == two
    assert one != Bound(reductions.reducer((reductions.PAIRS,), None))
    assert reducers.Bound(jaxqkv.kernels.moments) == Bound(jaxqkv.kernels.moments)
