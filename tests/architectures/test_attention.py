"""The functions of `attention.py` against loops written from the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROUNDING

from jaxqkv.architectures import attention

BATCH, HEAD, POS, HEAD_DIM = 2, 3, 5, 7


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def arrays():
    return list(normal(0, 3, BATCH, HEAD, POS, HEAD_DIM))


def test_heads_are_consecutive_columns_and_merge_undoes_split():
    x = normal(1, BATCH, POS, HEAD * HEAD_DIM)
    heads = np.asarray(attention.split_heads(x, HEAD))
    assert heads.shape == (BATCH, HEAD, POS, HEAD_DIM)
    for head in range(HEAD):
        np.testing.assert_array_equal(heads[:, head], x[:, :, head * HEAD_DIM : (head + 1) * HEAD_DIM])
    np.testing.assert_array_equal(attention.merge_heads(heads), x)


def test_scores(arrays):
    q, k, _ = (a.astype(np.float64) for a in arrays)
    scores, scaled = map(
        np.asarray,
        jax.jit(lambda q, k: (attention.scaled_scores(q, k), attention.scaled_scores(q, k, 0.25)))(*arrays[:2]),
    )
    for b, h, i, j in np.ndindex(scores.shape):
        assert scores[b, h, i, j] == pytest.approx(q[b, h, i] @ k[b, h, j] / np.sqrt(HEAD_DIM), abs=1e-6)
    np.testing.assert_allclose(scaled, 0.25 * np.sqrt(HEAD_DIM) * scores, rtol=1e-5)


def test_visible_keys():
    mask = np.array([[True, True, False], [False, True, True]])
    both = jax.jit(lambda mask: [attention.visible_keys(mask, causal) for causal in (False, True)])(mask)
    for causal, visible in enumerate(map(np.asarray, both)):
        for b, query, key in np.ndindex(visible.shape):
            assert visible[b, query, key] == (mask[b, key] and (key <= query or not causal))


def test_pattern_is_a_softmax_over_what_is_visible(arrays):
    mask = np.array([[True, True, True, True, True], [False, False, True, True, True]])

    @jax.jit
    def compute(q, k):
        scores, visible = attention.scaled_scores(q, k), attention.visible_keys(mask, causal=True)
        return scores, visible, attention.attention_pattern(scores, visible[:, None])

    scores, visible, pattern = map(np.asarray, compute(*arrays[:2]))
    for b, h, query in np.ndindex(BATCH, HEAD, POS):
        keys = visible[b, query]
        expected = np.zeros(POS)
        if keys.any():
            exponentials = np.exp(scores[b, h, query].astype(np.float64)[keys])
            expected[keys] = exponentials / exponentials.sum()
        np.testing.assert_allclose(pattern[b, h, query], expected, atol=10 * ROUNDING)


def test_enormous_scores_neither_overflow_nor_pass_for_masked_ones():
    scores = np.array([[3e38, -3e38, 1.0], [3e38, -3e38, 1.0]], np.float32)
    visible = np.array([[True, True, True], [False, True, False]])
    pattern = jax.jit(attention.attention_pattern)(scores, visible)
    np.testing.assert_array_equal(pattern, [[1, 0, 0], [0, 1, 0]])


def test_pattern_has_finite_gradients_where_nothing_is_visible():
    visible = np.zeros((3, 3), bool)
    gradient = jax.jit(jax.grad(lambda s: attention.attention_pattern(s, visible).sum()))(np.ones((3, 3), np.float32))
    np.testing.assert_array_equal(gradient, np.zeros((3, 3)))


def test_mix(arrays):
    @jax.jit
    def compute(q, k, v):
        pattern = attention.attention_pattern(attention.scaled_scores(q, k), np.ones((1, 1, POS, POS), bool))
        return pattern, attention.mix(pattern, v)

    pattern, z = map(np.asarray, compute(*arrays))
    for b, h, query in np.ndindex(BATCH, HEAD, POS):
        expected = sum(pattern[b, h, query, key] * arrays[2][b, h, key] for key in range(POS))
        np.testing.assert_allclose(z[b, h, query], expected, atol=1e-6)


SLICED_POS = 131  # large enough to be sliced
HEADS = list(normal(2, 3, BATCH, HEAD, SLICED_POS, HEAD_DIM))
# The bytes of the scores of all heads.
SCORES = BATCH * HEAD * SLICED_POS**2 * 4


def visible_of(causal):
    """Which keys are seen in two texts padded on either side; `[batch, query, key]`."""
    mask = np.ones((BATCH, SLICED_POS), bool)
    mask[0, :17] = mask[1, -29:] = False
    visible = np.broadcast_to(mask[:, None], (BATCH, SLICED_POS, SLICED_POS))
    return np.tril(visible) if causal else visible


@functools.cache
def compiled(attend, what):
    """A program of q, k, v and what is seen: all that `attend` gives, with another scale, z alone, or z²'s gradient."""
    functions = {
        "all": attend,
        "scaled": functools.partial(attend, scale=0.3),
        "z": lambda *arrays: attend(*arrays).z,
        "gradient": jax.grad(lambda q, k, v, visible: (attend(q, k, v, visible).z ** 2).sum(), argnums=(0, 1, 2)),
    }
    return jax.jit(functions[what]).lower(*HEADS, visible_of(True)).compile()


@pytest.fixture(scope="module", params=[False, True], ids=["both ways", "causal"])
def visible(request):
    return visible_of(request.param)


def test_sliced_and_whole_are_the_same_numbers(visible):
    whole = compiled(attention.attend_whole, "scaled")(*HEADS, visible)
    sliced = compiled(attention.attend_sliced, "scaled")(*HEADS, visible)
    for name in attention.Attended._fields:
        np.testing.assert_allclose(getattr(sliced, name), getattr(whole, name), rtol=1e-5, atol=1e-6, err_msg=name)


def test_definition(visible):
    q, k, v = (x.astype(np.float64) for x in HEADS)
    attended = attention.Attended(*map(np.asarray, compiled(attention.attend, "all")(*HEADS, visible)))
    for b, h in np.ndindex(BATCH, HEAD):
        scores = q[b, h] @ k[b, h].T / np.sqrt(HEAD_DIM)
        exponentials = np.where(visible[b], np.exp(scores), 0)
        total = exponentials.sum(axis=1, keepdims=True)
        pattern = exponentials / np.where(total > 0, total, 1)
        np.testing.assert_allclose(attended.scores[b, h], scores, atol=1e-5)
        np.testing.assert_allclose(attended.pattern[b, h], pattern, atol=1e-6)
        np.testing.assert_allclose(attended.z[b, h], pattern @ v[b, h], atol=50 * ROUNDING)


@pytest.mark.parametrize("what", ["z", "gradient"])
def test_sliced_makes_no_matrix_of_scores_for_z_alone(what):
    sliced, whole = (compiled(each, what) for each in (attention.attend_sliced, attention.attend_whole))
    assert sliced.memory_analysis().temp_size_in_bytes < SCORES < whole.memory_analysis().temp_size_in_bytes


def test_gradients_are_the_same(visible):
    gradients = (compiled(each, "gradient") for each in (attention.attend_whole, attention.attend_sliced))
    whole, sliced = (gradient(*HEADS, visible) for gradient in gradients)
    for one, other in zip(whole, sliced, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "attend"), [(jnp.float16, attention.attend_whole), (jnp.bfloat16, attention.attend_sliced)]
)
def test_upcast_scores_are_those_of_float32(dtype, attend):
    """Takes and returns 16 bits; scores and softmax between are as exact as float32."""
    visible = visible_of(True)
    narrow = [x.astype(dtype) for x in (8 * HEADS[0], HEADS[1], HEADS[2])]

    @jax.jit
    def compute(q, k, v):
        wide = (x.astype(jnp.float32) for x in (q, k, v))
        plain = attend(q, k, v, visible).pattern
        return attend(q, k, v, visible, upcast=True), attend(*wide, visible), plain

    upcast, exact, plain = compute(*narrow)
    assert (upcast.scores.dtype, upcast.pattern.dtype, upcast.z.dtype) == (jnp.float32, dtype, dtype)
    np.testing.assert_allclose(upcast.scores, exact.scores, rtol=1e-5, atol=1e-5)
    rounded = np.asarray(exact.pattern).astype(dtype).astype(np.float32)
    unit = float(jnp.finfo(dtype).eps)
    difference = np.abs(np.asarray(upcast.pattern, np.float32) - rounded)
    assert (difference <= unit * rounded + 1e-7).all()  # of the last bit, where float32 rounded the other way
    assert np.abs(np.asarray(plain, np.float32) - rounded).max() > 3 * unit  # it matters


def test_upcast_changes_nothing_in_float32():
    upcast = jax.jit(functools.partial(attention.attend, upcast=True))(*HEADS, visible_of(True))
    for one, other in zip(upcast, compiled(attention.attend, "all")(*HEADS, visible_of(True)), strict=True):
        np.testing.assert_array_equal(one, other)
