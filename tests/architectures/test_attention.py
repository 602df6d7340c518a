"""The functions of `attention.py` against loops written from the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROUNDING

from jaxqkv.architectures import attention

BATCH, HEAD, POS, HEAD_DIM = 2, 3, 5, 7


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    return [jnp.asarray(generator.normal(size=(BATCH, HEAD, POS, HEAD_DIM)), jnp.float32) for _ in range(3)]


def test_heads_are_consecutive_columns_and_merge_undoes_split():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, POS, HEAD * HEAD_DIM)), jnp.float32)
    heads = attention.split_heads(x, HEAD)
    assert heads.shape == (BATCH, HEAD, POS, HEAD_DIM)
    for head in range(HEAD):
        np.testing.assert_array_equal(heads[:, head], x[:, :, head * HEAD_DIM : (head + 1) * HEAD_DIM])
    np.testing.assert_array_equal(attention.merge_heads(heads), x)


def test_scores(arrays):
    q, k, _ = (np.asarray(a, np.float64) for a in arrays)
    scores = attention.scaled_scores(*arrays[:2])
    for b, h, i, j in np.ndindex(scores.shape):
        assert scores[b, h, i, j] == pytest.approx(q[b, h, i] @ k[b, h, j] / np.sqrt(HEAD_DIM), abs=1e-6)
    np.testing.assert_allclose(attention.scaled_scores(*arrays[:2], 0.25), 0.25 * np.sqrt(HEAD_DIM) * scores, rtol=1e-5)


def test_visible_keys():
    mask = np.array([[True, True, False], [False, True, True]])
    for causal in (False, True):
        visible = attention.visible_keys(jnp.asarray(mask), causal)
        for b, query, key in np.ndindex(visible.shape):
            assert visible[b, query, key] == (mask[b, key] and (key <= query or not causal))


def test_pattern_is_a_softmax_over_what_is_visible(arrays):
    scores = attention.scaled_scores(*arrays[:2])
    mask = jnp.asarray(np.array([[True, True, True, True, True], [False, False, True, True, True]]))
    visible = attention.visible_keys(mask, causal=True)
    pattern = attention.attention_pattern(scores, visible[:, None])
    for b, h, query in np.ndindex(BATCH, HEAD, POS):
        keys = np.asarray(visible[b, query])
        expected = np.zeros(POS)
        if keys.any():
            exponentials = np.exp(np.asarray(scores[b, h, query], np.float64)[keys])
            expected[keys] = exponentials / exponentials.sum()
        np.testing.assert_allclose(pattern[b, h, query], expected, atol=10 * ROUNDING)


def test_enormous_scores_neither_overflow_nor_pass_for_masked_ones():
    scores = jnp.asarray([[3e38, -3e38, 1.0]], jnp.float32)
    np.testing.assert_array_equal(attention.attention_pattern(scores, jnp.asarray([[True, True, True]])), [[1, 0, 0]])
    np.testing.assert_array_equal(attention.attention_pattern(scores, jnp.asarray([[False, True, False]])), [[0, 1, 0]])


def test_pattern_has_finite_gradients_where_nothing_is_visible():
    visible = jnp.zeros((3, 3), bool)
    gradient = jax.grad(lambda s: attention.attention_pattern(s, visible).sum())(jnp.ones((3, 3)))
    np.testing.assert_array_equal(gradient, np.zeros((3, 3)))


def test_mix(arrays):
    pattern = attention.attention_pattern(attention.scaled_scores(*arrays[:2]), jnp.ones((POS, POS), bool)[None, None])
    z = attention.mix(pattern, arrays[2])
    for b, h, query in np.ndindex(BATCH, HEAD, POS):
        expected = sum(pattern[b, h, query, key] * arrays[2][b, h, key] for key in range(POS))
        np.testing.assert_allclose(z[b, h, query], expected, atol=1e-6)


class TestAttend:
    POS = 131  # large enough to be sliced

    @pytest.fixture
    def heads(self):
        generator = np.random.default_rng(2)
        return [jnp.asarray(generator.normal(size=(BATCH, HEAD, self.POS, HEAD_DIM)), jnp.float32) for _ in range(3)]

    @pytest.fixture(params=[False, True], ids=["both ways", "causal"])
    def visible(self, request):
        mask = np.ones((BATCH, self.POS), bool)
        mask[0, :17] = mask[1, -29:] = False
        return attention.visible_keys(jnp.asarray(mask), request.param)

    def test_sliced_and_whole_are_the_same_numbers(self, heads, visible):
        whole = jax.jit(attention.attend_whole)(*heads, visible, 0.3)
        sliced = jax.jit(attention.attend_sliced)(*heads, visible, 0.3)
        for name in attention.Attended._fields:
            np.testing.assert_allclose(getattr(sliced, name), getattr(whole, name), rtol=1e-5, atol=1e-6, err_msg=name)

    def test_definition(self, heads, visible):
        q, k, v = (np.asarray(x, np.float64) for x in heads)
        attended = attention.attend(*heads, visible)
        for b, h in np.ndindex(BATCH, HEAD):
            scores = q[b, h] @ k[b, h].T / np.sqrt(HEAD_DIM)
            exponentials = np.where(visible[b], np.exp(scores), 0)
            total = exponentials.sum(axis=1, keepdims=True)
            pattern = exponentials / np.where(total > 0, total, 1)
            np.testing.assert_allclose(attended.scores[b, h], scores, atol=1e-5)
            np.testing.assert_allclose(attended.pattern[b, h], pattern, atol=1e-6)
            np.testing.assert_allclose(attended.z[b, h], pattern @ v[b, h], atol=50 * ROUNDING)

    def test_sliced_makes_no_matrix_of_scores_for_z_alone(self, heads, visible):
        def bytes_of(attend):
            compiled = jax.jit(lambda *arrays: attend(*arrays).z).lower(*heads, visible).compile()
            return compiled.memory_analysis().temp_size_in_bytes

        scores = BATCH * HEAD * self.POS**2 * 4
        assert bytes_of(attention.attend_sliced) < scores < bytes_of(attention.attend_whole)

    def test_gradients_are_the_same(self, heads, visible):
        def loss(attend):
            return jax.jit(jax.grad(lambda q, k, v: (attend(q, k, v, visible).z ** 2).sum(), argnums=(0, 1, 2)))

        for whole, sliced in zip(
            loss(attention.attend_whole)(*heads), loss(attention.attend_sliced)(*heads), strict=True
        ):
            np.testing.assert_allclose(sliced, whole, rtol=1e-4, atol=1e-5)

        def bytes_of(attend):
            return loss(attend).lower(*heads).compile().memory_analysis().temp_size_in_bytes

        scores = BATCH * HEAD * self.POS**2 * 4
        assert bytes_of(attention.attend_sliced) < scores < bytes_of(attention.attend_whole)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    @pytest.mark.parametrize("attend", [attention.attend_whole, attention.attend_sliced])
    def test_upcast_scores_are_those_of_float32(self, heads, visible, dtype, attend):
        """What is of 16 bits goes in and comes out; scores and softmax between are as exact as float32."""
        q, k, v = (x.astype(dtype) for x in (8 * heads[0], heads[1], heads[2]))
        upcast = jax.jit(lambda *arrays: attend(*arrays, visible, upcast=True))(q, k, v)
        exact = jax.jit(lambda *arrays: attend(*arrays, visible))(*(x.astype(jnp.float32) for x in (q, k, v)))
        plain = jax.jit(lambda *arrays: attend(*arrays, visible))(q, k, v)
        assert (upcast.scores.dtype, upcast.pattern.dtype, upcast.z.dtype) == (jnp.float32, dtype, dtype)
        np.testing.assert_allclose(upcast.scores, exact.scores, rtol=1e-5, atol=1e-5)
        rounded = np.asarray(exact.pattern.astype(dtype), np.float32)
        unit = float(jnp.finfo(dtype).eps)
        difference = np.abs(np.asarray(upcast.pattern, np.float32) - rounded)
        assert (difference <= unit * rounded + 1e-7).all()  # of the last bit, where float32 rounded the other way
        assert np.abs(np.asarray(plain.pattern, np.float32) - rounded).max() > 3 * unit  # it matters

    def test_upcast_changes_nothing_in_float32(self, heads, visible):
        for one, other in zip(
            attention.attend(*heads, visible, upcast=True), attention.attend(*heads, visible), strict=True
        ):
            np.testing.assert_array_equal(one, other)
