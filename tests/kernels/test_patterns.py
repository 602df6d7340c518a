"""Kernels of what heads attend to, move and say of the next token: against loops in float64, from the definitions."""

import jax
import numpy as np
import pytest
from conftest import ROUNDING

from jaxqkv import kernels
from jaxqkv.errors import KernelError

GENERATOR = np.random.default_rng(0)


def pattern_of(batch, head, pos, causal):
    scores = GENERATOR.normal(0, 2, (batch, head, pos, pos))
    weights = np.exp(np.where(np.tril(np.ones((pos, pos), bool)) | (not causal), scores, -np.inf))
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


class TestHeadTypes:
    @pytest.mark.parametrize(("n", "causal"), [(2, True), (7, True), (7, False), (13, True)])
    def test_definition(self, n, causal):
        pattern = pattern_of(3, 5, 2 * n, causal)
        found = kernels.head_types(pattern)
        # A mean of up to 2n rounded terms of at most 1; of the entropy, of n products with logarithms of a few units.
        limit = 4 * n * ROUNDING
        for text, head in np.ndindex(3, 5):
            A = pattern[text, head].astype(np.float64)
            second, later = range(n + 1, 2 * n), range(1, 2 * n)
            expected = {
                "previous": np.mean([A[t, t - 1] for t in range(2, 2 * n)]),
                "duplicate": np.mean([A[t, t - n] for t in second]),
                "induction": np.mean([A[t, t - n + 1] for t in second]),
                "first": np.mean([A[t, 0] for t in later]),
                "entropy": np.mean([-sum(a * np.log(a) for a in A[t] if a > 0) for t in later]),
            }
            for name, value in expected.items():
                margin = 4 if name == "entropy" else 1
                assert getattr(found, name)[text, head] == pytest.approx(value, abs=margin * limit)

    def test_as_detectors_with_masks(self):
        """The share of a pattern that a detector's matrix covers, as in TransformerLens, but for the rows left out."""
        n, pattern = 11, pattern_of(1, 1, 22, True)
        A, rows = pattern[0, 0].astype(np.float64), np.arange(22)
        detectors = {"previous": np.eye(22, k=-1), "duplicate": np.eye(22, k=-n), "induction": np.eye(22, k=1 - n)}
        starts = {"previous": 2, "duplicate": n + 1, "induction": n + 1}
        found = kernels.head_types(pattern)
        for name, detector in detectors.items():
            detector[rows < starts[name]] = 0
            covered = (A * detector).sum() / A[rows >= starts[name]].sum()
            assert getattr(found, name)[0, 0] == pytest.approx(covered, abs=22 * 4 * ROUNDING)

    def test_heads_of_one_kind(self):
        n, t = 13, np.arange(26)
        kinds = {"previous": np.maximum(t - 1, 0), "duplicate": t % n, "induction": np.where(t >= n, t - n + 1, 0)}
        pattern = np.stack([np.eye(26)[keys] for keys in kinds.values()])[None].astype(np.float32)
        found = kernels.head_types(pattern)
        for place, name in enumerate(kinds):
            assert getattr(found, name)[0].tolist() == [float(index == place) for index in range(3)]
        assert found.entropy.tolist() == [[0, 0, 0]]
        even = np.tril(np.ones((26, 26))) / np.arange(1, 27)[:, None]
        entropy = kernels.head_types(even[None, None].astype(np.float32)).entropy[0, 0]
        assert entropy == pytest.approx(np.log(np.arange(2, 27)).mean(), rel=26 * ROUNDING)

    @pytest.mark.parametrize("pos", [2, 5])
    def test_what_is_refused(self, pos):
        with pytest.raises(KernelError, match=f"an even number of positions, at least 4, not {pos}"):
            kernels.head_types(np.ones((1, 1, pos, pos), np.float32))

    def test_patterns_that_are_not_square(self):
        with pytest.raises(KernelError, match=r"patterns of a whole text are square, \[pos, pos\], not \[7, 8\]"):
            kernels.head_types(np.ones((1, 1, 7, 8), np.float32))

    def test_nan_is_nan(self):
        pattern = pattern_of(1, 3, 10, True)
        pattern[0, 1] = np.nan
        pattern[0, 2, 9, 9] = np.nan  # of no mean but the entropy
        for name, values in kernels.head_types(pattern)._asdict().items():
            assert np.isnan(values[0]).tolist() == [False, True, name == "entropy"]


class TestWeightedAttention:
    def test_definition(self):
        """With vectors of size [query, key, embed], which the kernel does not make."""
        pattern = pattern_of(1, 3, 11, True)[0]
        v, output = (GENERATOR.normal(size=shape).astype(np.float32) for shape in ((3, 11, 7), (3, 7, 23)))
        moved = np.einsum("hqk,hkd,hde->hqke", *(x.astype(np.float64) for x in (pattern, v, output)))
        expected = np.linalg.norm(moved, axis=-1)
        # Of the root, half the relative error of a sum of 7·7 products of sums of 23.
        np.testing.assert_allclose(kernels.weighted_attention(pattern, v, output), expected, rtol=80 * ROUNDING)

    def test_nothing_of_query_key_embed_is_made(self):
        shapes = [(2, 17, 17), (2, 17, 5), (2, 5, 19)]
        program = jax.make_jaxpr(kernels.weighted_attention)(*(np.ones(shape, np.float32) for shape in shapes))
        sizes = [np.prod(each.aval.shape) for each in _values(program.jaxpr)]
        assert max(sizes) == 2 * 17 * 17 < 17 * 17 * 19

    def test_values_without_an_effect(self):
        zero = kernels.weighted_attention(np.ones((1, 2, 2)), np.ones((1, 2, 3)), np.zeros((1, 3, 5)))
        assert zero.tolist() == [[[0, 0], [0, 0]]]

    @pytest.mark.parametrize(("of_v", "of_output"), [(1e-12, 1e-12), (1e15, 1e10), (1e-30, 1e30)])
    def test_any_scale(self, of_v, of_output):
        pattern = pattern_of(1, 3, 11, True)[0]
        v, output = (GENERATOR.normal(size=shape).astype(np.float32) for shape in ((3, 11, 7), (3, 7, 23)))
        expected = of_v * of_output * np.asarray(kernels.weighted_attention(pattern, v, output), np.float64)
        found = kernels.weighted_attention(pattern, np.float32(of_v) * v, np.float32(of_output) * output)
        np.testing.assert_allclose(found, expected, rtol=80 * ROUNDING)


def _values(jaxpr):
    """Every value that a program computes, also inside of the programs that it calls."""
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _values(inner)


def layer_norm(x, scale, bias, epsilon):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * scale + bias


class TestAttribution:
    def test_definition_and_sum(self):
        parts = GENERATOR.normal(0.2, 1, (13, 29)).astype(np.float32)
        scale, bias, a, b = GENERATOR.normal(0.7, 0.4, (4, 29)).astype(np.float32)
        whole = parts.sum(axis=0)
        wide = [x.astype(np.float64) for x in (parts, whole, scale, a - b)]
        one, residual, gamma, u = wide
        sigma = np.sqrt(residual.var() + 1e-3)
        expected = [((part - part.mean()) / sigma) @ (gamma * u) for part in one]
        found = kernels.attribution(parts, whole, scale, a - b, epsilon=1e-3)
        limit = 3 * 29 * ROUNDING * np.abs(one).max() * np.abs(gamma * u).sum() / sigma
        np.testing.assert_allclose(found, expected, rtol=0, atol=limit)
        total = (layer_norm(residual, gamma, bias, 1e-3) - bias) @ u
        assert np.asarray(found, np.float64).sum() == pytest.approx(total, abs=13 * limit)


class TestLogitLens:
    def test_definition(self):
        residual = GENERATOR.normal(0.5, 2, (11, 29)).astype(np.float32)
        scale, bias = GENERATOR.normal(0.7, 0.4, (2, 29)).astype(np.float32)
        unembedding = GENERATOR.normal(size=(43, 29)).astype(np.float32)
        logits = layer_norm(residual.astype(np.float64), scale, bias, 1e-5) @ unembedding.T.astype(np.float64)
        probabilities = np.exp(logits - logits.max(-1, keepdims=True))
        probabilities /= probabilities.sum(-1, keepdims=True)
        token, probability = kernels.logit_lens(residual, scale, bias, unembedding, epsilon=1e-5)
        np.testing.assert_array_equal(token, logits.argmax(-1))
        # A logit is a sum of 29 products of up to 10; a probability is off by twice a logit's error.
        np.testing.assert_allclose(probability, probabilities.max(-1), rtol=2 * 29 * 10 * ROUNDING)

    def test_no_token_to_predict(self):
        with pytest.raises(KernelError, match="the output embedding has no token"):
            kernels.logit_lens(np.ones((2, 3)), np.ones(3), np.ones(3), np.ones((0, 3)), epsilon=1e-5)


def test_a_setting_as_an_array_of_one_number():
    """ε as JAX and NumPy have it: the same number; a traced one is refused."""
    parts, scale = GENERATOR.normal(size=(2, 29)).astype(np.float32), np.ones(29, np.float32)
    expected = kernels.attribution(parts, parts[0], scale, parts[1], epsilon=0.5)
    for epsilon in (jax.numpy.float32(0.5), np.float32(0.5), np.array(0.5)):
        np.testing.assert_array_equal(kernels.attribution(parts, parts[0], scale, parts[1], epsilon=epsilon), expected)
    with pytest.raises(KernelError, match="epsilon is a setting of the program"):
        jax.jit(lambda e: kernels.attribution(parts, parts[0], scale, parts[1], epsilon=e))(0.5)
    with pytest.raises(KernelError, match=r"epsilon is one number, not an array of shape \[2\]"):
        kernels.attribution(parts, parts[0], scale, parts[1], epsilon=np.ones(2))
