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


# Errors of scores of up to 60 are exponents': 60 roundings of the dot products' 5 terms.
LIMIT = 60 * (HEAD_DIM + 2) * 2.0**-24


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_against_the_whole_pattern(causal, scale):
    found = kernels.attention_statistics(Q, K, MASK, KEYS, scale, causal=causal)
    values = expected(Q, K, MASK, KEYS, causal, HEAD_DIM**-0.5 if scale is None else scale)
    for name, actual, value in zip(found._fields, jax.device_get(found), values, strict=True):
        assert actual.dtype == jnp.float32
        assert actual.shape == (BATCH, HEADS, POS)
        if name == "logsumexp":
            np.testing.assert_array_equal(np.isinf(actual), np.isinf(value))
        finite = np.isfinite(value)
        largest = np.abs(value[finite]).max()
        np.testing.assert_allclose(actual[finite], value[finite], atol=LIMIT * largest, rtol=0, err_msg=name)


def test_queries_that_see_nothing():
    """The first four of the second text, causally: before its first token."""
    found = jax.device_get(kernels.attention_statistics(Q, K, MASK, causal=True))
    assert np.isneginf(found.logsumexp[1, :, :4]).all()
    assert all((each[1, :, :4] == 0).all() for each in found[1:])
    assert np.isfinite(found.logsumexp[1, :, 4:]).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_without_a_pattern(causal, value):
    """A query sees them, or is one: no numbers of it; of other queries the same as without."""
    q, k = np.abs(Q[:1, :1]), np.abs(K[:1, :1]).copy()
    plain = kernels.attention_statistics(q, k, MASK[:1], causal=causal)
    k[0, 0, 9, 2] = value
    found = kernels.attention_statistics(q, k, MASK[:1], causal=causal)
    sees = (np.arange(POS) >= 9) | (not causal)
    for name, actual, expected in zip(found._fields, *map(jax.device_get, (found, plain)), strict=True):
        np.testing.assert_array_equal(actual[0, 0, ~sees], expected[0, 0, ~sees])
        broken = actual[0, 0, sees]
        assert (np.isposinf(broken) if name == "logsumexp" and value == np.inf else np.isnan(broken)).all(), name
    q = np.where(np.arange(POS)[:, None] == 3, np.float32(np.nan), q)
    found = kernels.attention_statistics(q, K[:1, :1], MASK[:1], causal=causal)
    for actual in jax.device_get(found):
        assert np.flatnonzero(np.isnan(actual[0, 0])).tolist() == [3]


def test_the_mass_is_of_the_first_real_token_unless_others_are_given():
    found = kernels.attention_statistics(Q, K, MASK, causal=False)
    first = np.arange(POS) == np.array([[0], [4]])
    np.testing.assert_array_equal(found.mass, kernels.attention_statistics(Q, K, MASK, first, causal=False).mass)


def test_on_every_backend_the_same():
    """One head after another, as on a CPU, and all at once, as elsewhere."""
    whole = jax.vmap(lambda q, k: kernels.attention_statistics(q[None], k[None], MASK[:1], causal=True))
    for one, two in zip(
        jax.device_get(jax.jit(whole)(Q, K)), kernels.attention_statistics(Q, K, MASK[[0, 0]], causal=True), strict=True
    ):
        np.testing.assert_allclose(one[:, 0], two, rtol=1e-5, atol=1e-6)


def test_derivatives():
    def loss(q):
        found = kernels.attention_statistics(q, K[:1, :1], MASK[:1], causal=True)
        return found.entropy.sum() + found.distance.sum() / 9 + found.logsumexp.sum()

    def plain(q):
        scores = jnp.where(np.tri(POS, dtype=bool), jnp.einsum("bhqd,bhkd->bhqk", q, K[:1, :1]) / HEAD_DIM**0.5, -1e30)
        log = jax.nn.log_softmax(scores)
        distance = np.abs(np.arange(POS)[:, None] - np.arange(POS)).astype(np.float32)[None, None]
        together = -(jnp.exp(log) * log).sum() + (jnp.exp(log) * distance).sum() / 9
        return together + jax.nn.logsumexp(scores, axis=-1).sum()

    q = jnp.asarray(Q[:1, :1]) / 8
    actual, value = (jax.jit(jax.grad(each))(q) for each in (loss, plain))
    np.testing.assert_allclose(actual, value, atol=1e-5 * np.abs(value).max())


def test_as_a_reducer(gpt2_model):
    ids = GENERATOR.integers(0, 43, (2, 11)).astype(np.int32)
    acts = gpt2_model.run(ids, capture={"pattern"})
    entropy = gpt2_model.run(
        ids, reduce=lambda a, mask: kernels.attention_statistics(a.q, a.k, mask, causal=True).entropy
    )
    pattern = np.asarray(acts.pattern, np.float64)
    plain = -np.where(pattern > 0, pattern * np.log(np.where(pattern > 0, pattern, 1)), 0).sum(axis=-1)
    np.testing.assert_allclose(entropy, plain, atol=1e-5)


def test_a_text_of_no_token_is_refused():
    with pytest.raises(KernelError, match="a text has at least one token"):
        kernels.attention_statistics(Q[:, :, :0], K[:, :, :0], MASK[:, :0], causal=True)
