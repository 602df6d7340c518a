"""Statistics of attention by blocks, against the whole pattern in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxqkv import kernels
from jaxqkv.errors import KernelError
from jaxqkv.kernels import blockwise

BATCH, HEADS, POS, HEAD_DIM = 2, 3, 23, 5
GENERATOR = np.random.default_rng(0)
# Scores reach ±60, so that sums would overflow without the largest one.
Q, K = 8 * GENERATOR.normal(size=(2, BATCH, HEADS, POS, HEAD_DIM)).astype(np.float32)
MASK = np.arange(POS) >= np.array([[0], [4]])  # padding on the left in the second text
KEYS = GENERATOR.random((BATCH, POS)) < 0.3


@pytest.fixture(autouse=True, scope="module")
def blocks():
    """Four blocks, of which the last is not full. No other test has texts of POS, whose program would be taken."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(blockwise, "BLOCK", 7)
        yield


def expected(q, k, mask, keys, causal, scale):
    scores = np.einsum("bhqd,bhkd->bhqk", *(x.astype(np.float64) for x in (q, k))) * scale
    place = np.arange(q.shape[2])
    visible = np.broadcast_to(mask[:, None, None, :] & ((place <= place[:, None]) | (not causal)), scores.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        logsumexp = np.logaddexp.reduce(np.where(visible, scores, -np.inf), axis=-1)
        pattern = np.where(visible, np.exp(scores - logsumexp[..., None]), 0)
        entropy = -np.where(pattern > 0, pattern * np.log(pattern), 0).sum(axis=-1)
    distance = (pattern * np.abs(place[:, None] - place)).sum(axis=-1)
    return logsumexp, entropy, pattern.max(axis=-1), distance, (pattern * keys[:, None, None, :]).sum(axis=-1)


# The scale of each kind of attention here, None for 1/√head_dim: one program of each serves several tests.
SCALES = {True: None, False: 0.3}


def statistics(q, k, causal):
    return jax.device_get(kernels.attention_statistics(q, k, MASK, KEYS, SCALES[causal], causal=causal))


# Errors of scores of up to 60 are exponents': 60 roundings of the dot products' 5 terms.
LIMIT = 60 * (HEAD_DIM + 2) * 2.0**-24


@pytest.mark.parametrize("causal", SCALES)
def test_against_the_whole_pattern(causal):
    found = statistics(Q, K, causal)
    values = expected(Q, K, MASK, KEYS, causal, HEAD_DIM**-0.5 if SCALES[causal] is None else SCALES[causal])
    for name, actual, value in zip(found._fields, found, values, strict=True):
        assert actual.dtype == jnp.float32
        assert actual.shape == (BATCH, HEADS, POS)
        if name == "logsumexp":
            np.testing.assert_array_equal(np.isinf(actual), np.isinf(value))
        finite = np.isfinite(value)
        largest = np.abs(value[finite]).max()
        np.testing.assert_allclose(actual[finite], value[finite], atol=LIMIT * largest, rtol=0, err_msg=name)


def test_queries_that_see_nothing():
    """The first four of the second text, causally: before its first token."""
    found = statistics(Q, K, causal=True)
    assert np.isneginf(found.logsumexp[1, :, :4]).all()
    assert all((each[1, :, :4] == 0).all() for each in found[1:])
    assert np.isfinite(found.logsumexp[1, :, 4:]).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_without_a_pattern(causal, value):
    """A query sees them, or is one: no numbers of it; of other queries the same as without."""
    q, k = np.abs(Q), np.abs(K)
    plain = statistics(q, k, causal)
    k[1, 2, 9, 2] = value
    found = statistics(q, k, causal)
    sees = np.zeros(Q.shape[:3], bool)
    sees[1, 2] = (np.arange(POS) >= 9) | (not causal)
    for name, actual, expected in zip(found._fields, found, plain, strict=True):
        np.testing.assert_array_equal(actual[~sees], expected[~sees])
        broken = actual[sees]
        assert (np.isposinf(broken) if name == "logsumexp" and value == np.inf else np.isnan(broken)).all(), name
    q[0, 1, 3] = np.nan
    for actual in statistics(q, K, causal):
        assert np.argwhere(np.isnan(actual)).tolist() == [[0, 1, 3]]


def test_the_mass_is_of_the_first_real_token_unless_others_are_given():
    found = kernels.attention_statistics(Q, K, MASK, causal=True)
    first = np.arange(POS) == np.array([[0], [4]])
    np.testing.assert_array_equal(found.mass, kernels.attention_statistics(Q, K, MASK, first, causal=True).mass)


def test_on_every_backend_the_same():
    """One head after another, as on a CPU, and all at once, as elsewhere."""
    whole = jax.vmap(lambda q, k: kernels.attention_statistics(q[None], k[None], MASK[:1], causal=True))
    for one, two in zip(
        jax.device_get(jax.jit(whole)(Q, K)), kernels.attention_statistics(Q, K, MASK[[0, 0]], causal=True), strict=True
    ):
        np.testing.assert_allclose(one[:, 0], two, rtol=1e-5, atol=1e-6)


def test_derivatives():
    """Against central differences of the definitions in float64, of which a query's moves that query's alone."""
    weights = np.array([1, 1, 0, 1 / 9, 0])  # of logsumexp, entropy and distance

    def loss(q):
        found = kernels.attention_statistics(q, K[:1, :1], MASK[:1], causal=True)
        return found.entropy.sum() + found.distance.sum() / 9 + found.logsumexp.sum()

    def by_definition(q):
        return weights @ np.stack(expected(q, K[:1, :1], MASK[:1], KEYS[:1], True, HEAD_DIM**-0.5))[:, 0, 0]

    q, step = (Q[:1, :1] / 8).astype(np.float64), 1e-5
    moves = step * np.eye(HEAD_DIM)[:, None, None, None]
    value = np.stack([by_definition(q + move) - by_definition(q - move) for move in moves], axis=-1) / (2 * step)
    actual = jax.jit(jax.grad(loss))(q.astype(np.float32))[0, 0]
    np.testing.assert_allclose(actual, value, atol=1e-5 * np.abs(value).max())


def test_as_a_reducer(gpt2_model):
    """Compares with the pattern of the first layer's queries and keys, in one program."""

    def both(attention, mask):
        found = kernels.attention_statistics(attention.q, attention.k, mask, causal=True)
        return found.entropy, attention.pattern

    ids = GENERATOR.integers(0, 43, (2, 11)).astype(np.int32)
    entropy, pattern = gpt2_model.run(ids, reduce=both, layers=0)
    pattern = np.asarray(pattern, np.float64)
    plain = -np.where(pattern > 0, pattern * np.log(np.where(pattern > 0, pattern, 1)), 0).sum(axis=-1)
    np.testing.assert_allclose(entropy, plain, atol=1e-5)


def test_a_text_of_no_token_is_refused():
    with pytest.raises(KernelError, match="a text has at least one token"):
        kernels.attention_statistics(Q[:, :, :0], K[:, :, :0], MASK[:, :0], causal=True)
