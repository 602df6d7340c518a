"""Circuits against whole matrices in float64, written from the definitions, and what must not change them."""

import itertools

import jax
import numpy as np
import pytest
from conftest import ROUNDING
from scipy.spatial.distance import jensenshannon

from jaxqkv import kernels
from jaxqkv.errors import KernelError

EMBED, DIM, HEADS, OTHERS, VOCAB = 31, 7, 3, 5, 37
GENERATOR = np.random.default_rng(3)
W_Q, W_K, W_V = GENERATOR.normal(size=(3, HEADS, EMBED, DIM))
W_O = GENERATOR.normal(size=(HEADS, DIM, EMBED))
LATER_Q, LATER_K, LATER_V = GENERATOR.normal(size=(3, OTHERS, EMBED, DIM))
LATER_O = GENERATOR.normal(size=(OTHERS, DIM, EMBED))
GAMMA = GENERATOR.uniform(0.3, 2, EMBED)
CENTRE = np.eye(EMBED) - 1 / EMBED
# Sums of EMBED · DIM products of numbers near 1, and what follows them.
LIMIT = EMBED * DIM * ROUNDING


def whole(circuit):
    return [
        left.astype(np.float64) @ right.astype(np.float64).T
        for left, right in zip(*map(np.asarray, circuit), strict=True)
    ]


def folded(weights):
    return CENTRE @ np.diag(GAMMA) @ weights


def norm(matrix):
    return np.linalg.norm(matrix)


def close(actual, expected, limit=LIMIT):
    expected = np.asarray(expected)
    assert np.shape(actual) == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=limit * np.abs(expected).max())


def qk(fold=True, q=W_Q, k=W_K):
    return kernels.qk_circuit(q, k, GAMMA, folded=fold)


def ov(fold=True, v=W_V, o=W_O):
    return kernels.ov_circuit(v, o, GAMMA, folded=fold)


def test_factors_are_the_definitions():
    close(whole(qk()), [folded(q) @ folded(k).T / DIM**0.5 for q, k in zip(W_Q, W_K, strict=True)])
    close(whole(qk(False)), [q @ k.T / DIM**0.5 for q, k in zip(W_Q, W_K, strict=True)])
    close(
        whole(kernels.qk_circuit(W_Q, W_K, GAMMA, 0.25)),
        [folded(q) @ folded(k).T / 4 for q, k in zip(W_Q, W_K, strict=True)],
    )
    close(whole(ov()), [folded(v) @ o @ CENTRE for v, o in zip(W_V, W_O, strict=True)])
    close(whole(ov(False)), [v @ o for v, o in zip(W_V, W_O, strict=True)])
    close(whole(kernels.ov_circuit(W_V, W_O, folded=False)), [v @ o for v, o in zip(W_V, W_O, strict=True)])
    for call in (lambda: kernels.qk_circuit(W_Q, W_K), lambda: kernels.ov_circuit(W_V, W_O)):
        with pytest.raises(KernelError, match="folded weights take gamma, the scale of the norm before attention"):
            call()


def test_scores_are_those_of_the_circuit_but_for_a_term_a_query_and_a_term_a_key():
    """Through the norm, with biases everywhere."""
    x, y = GENERATOR.normal(size=(2, 11, EMBED))
    beta, b_q, b_k = GENERATOR.normal(size=EMBED), GENERATOR.normal(size=DIM), GENERATOR.normal(size=DIM)

    def read(rows, weights, bias):
        centred = rows @ CENTRE
        return (centred / centred.std(axis=1, keepdims=True) * GAMMA + beta) @ weights + bias

    scores = read(x, W_Q[1], b_q) @ read(y, W_K[1], b_k).T / DIM**0.5
    core = x @ whole(qk())[1] @ y.T / np.outer(x.std(axis=1), y.std(axis=1))
    rest = scores - core
    interaction = rest - rest.mean(0, keepdims=True) - rest.mean(1, keepdims=True) + rest.mean()
    assert np.abs(interaction).max() < LIMIT * np.abs(core).max()


def test_singular_values():
    for circuit in (qk(), ov(False)):
        expected = [np.linalg.svd(matrix, compute_uv=False)[:DIM] for matrix in whole(circuit)]
        close(kernels.circuit_singular_values(*circuit), expected)


def test_small_singular_values_keep_their_digits():
    """Down to 1e-6 of the largest, of factors that share them; a Gram matrix alone would lose those below 3e-4."""
    expected = 10.0 ** -np.arange(DIM)
    left, right = (np.linalg.qr(each)[0] for each in (W_Q, W_K))
    turn = np.linalg.qr(GENERATOR.normal(size=(DIM, DIM)))[0]
    actual = kernels.circuit_singular_values(left * np.sqrt(expected) @ turn, right * np.sqrt(expected) @ turn)
    np.testing.assert_allclose(actual, np.tile(expected, (HEADS, 1)), rtol=2e-2, atol=1e-6)
    np.testing.assert_allclose(np.asarray(actual)[:, :4], np.tile(expected[:4], (HEADS, 1)), rtol=2e-3)


@pytest.mark.parametrize("fold", [True, False])
def test_composition_is_that_of_whole_matrices(fold):
    writers, query, values = ov(fold), qk(fold, LATER_Q, LATER_K), ov(fold, LATER_V, LATER_O)
    for later, transposed in ((query, False), (query, True), (values, False)):
        others = [matrix.T if transposed else matrix for matrix in whole(later)]
        expected = [[norm(a @ b) / norm(a) / norm(b) for b in others] for a in whole(writers)]
        given = later[::-1] if transposed else later
        close(kernels.composition(*writers, *given), expected)


def test_composition_of_heads_that_have_or_have_not_a_subspace_in_common():
    space = np.linalg.qr(GENERATOR.normal(size=(EMBED, 2 * DIM)))[0]
    reads, other = space[None, :, :DIM], space[None, :, DIM:]
    writes = reads @ GENERATOR.normal(size=(DIM, DIM)).astype(np.float32)
    orthogonal = GENERATOR.normal(size=(1, EMBED, DIM))
    assert kernels.composition(orthogonal, writes, other, orthogonal)[0, 0] < 1e-6
    one = space[None, :, :1]  # what is written and read along one direction alone
    close(kernels.composition(orthogonal[..., :1], one, one, orthogonal[..., :1]), [[1.0]])


def test_the_mean_square_of_random_compositions_is_the_baseline():
    """Of 23 · 29 pairs of heads of rank one, whose squared cosine in n dimensions has mean 1/n and variance 2/n²."""
    one, two, unit = GENERATOR.normal(size=(23, EMBED, 1)), GENERATOR.normal(size=(29, EMBED, 1)), np.ones(EMBED)
    for fold, free in ((True, EMBED - 1), (False, EMBED)):
        earlier = kernels.ov_circuit(one, one.swapaxes(1, 2), unit, folded=fold)
        later = kernels.qk_circuit(two, two, unit, folded=fold)
        squares = np.asarray(kernels.composition(*earlier, *later), np.float64) ** 2
        # Rows and columns share their heads, so that the smaller number of heads counts.
        assert abs(squares.mean() * free - 1) < 4 * (2 / 23) ** 0.5


def test_copying_is_that_of_the_vocabulary():
    embedding, unembedding = GENERATOR.normal(size=(VOCAB, EMBED)), GENERATOR.normal(size=(EMBED, VOCAB))
    final = GENERATOR.uniform(0.5, 1.5, EMBED)
    readout = np.diag(final) @ unembedding @ embedding
    circuit = ov()
    expected = []
    for matrix in whole(circuit):
        values = np.linalg.eigvals(embedding @ matrix @ np.diag(final) @ unembedding)
        expected.append(values.real.sum() / np.abs(values).sum())
    actual = kernels.copying_score(*circuit, readout)
    # A ratio whose numerator is a sum of eigenvalues of both signs, each good to the matrix's norm.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


def test_copying_of_what_copies_and_what_does_the_opposite():
    space = np.linalg.qr(GENERATOR.normal(size=(EMBED, 2 * DIM)))[0]
    identity = np.eye(EMBED)
    one, other = space[None, :, :DIM], space[None, :, DIM:]
    assert kernels.copying_score(one, one, identity)[0] == pytest.approx(1, abs=1e-6)
    assert kernels.copying_score(one, -one, identity)[0] == pytest.approx(-1, abs=1e-6)
    assert np.isnan(kernels.copying_score(0 * one, other, identity))[0]
    assert np.isnan(kernels.copying_score(np.nan * one, other, identity))[0]


def test_similarity_is_the_cosine_of_whole_matrices():
    one, two = qk(), qk(q=LATER_Q, k=LATER_K)
    expected = [[(a * b).sum() / norm(a) / norm(b) for b in whole(two)] for a in whole(one)]
    close(kernels.head_similarity(*one, *two), expected)
    own = kernels.head_similarity(*one, *one)
    close(np.diagonal(own), np.ones(HEADS))
    close(own, np.asarray(own).T)


def test_overlap_is_that_of_projections():
    def projection(w):
        return w @ np.linalg.inv(w.T @ w) @ w.T

    expected = [[np.trace(projection(a) @ projection(b)) / DIM for b in LATER_Q] for a in W_Q]
    close(kernels.subspace_overlap(W_Q, LATER_Q), expected)
    np.testing.assert_allclose(np.diagonal(kernels.subspace_overlap(W_Q, W_Q)), 1, rtol=0, atol=LIMIT)
    assert np.isnan(kernels.subspace_overlap(0 * W_Q, LATER_Q)).all()


def test_the_basis_inside_a_head_changes_nothing_but_column_cosines():
    change = GENERATOR.normal(size=(HEADS, DIM, DIM)) + 2 * np.eye(DIM)
    changed_q, changed_k = W_Q @ change, W_K @ np.linalg.inv(change).swapaxes(1, 2)
    changed_v, changed_o = W_V @ change, np.linalg.inv(change) @ W_O
    later = qk(q=LATER_Q, k=LATER_K)
    # The condition of the change multiplies what the factors' rounding does.
    limit = LIMIT * max(np.linalg.cond(each) for each in change)
    for one, two in ((qk(), qk(q=changed_q, k=changed_k)), (ov(), ov(v=changed_v, o=changed_o))):
        close(kernels.circuit_singular_values(*two), kernels.circuit_singular_values(*one), limit)
        close(kernels.head_similarity(*two, *later), kernels.head_similarity(*one, *later), limit)
        close(kernels.subspace_overlap(two[0], later[0]), kernels.subspace_overlap(one[0], later[0]), limit)
        close(kernels.composition(*two, *later), kernels.composition(*one, *later), limit)
        close(kernels.copying_score(*two, CENTRE), kernels.copying_score(*one, CENTRE), 10 * limit)
    moved = np.asarray(kernels.column_cosine(changed_q[0])) - np.asarray(kernels.column_cosine(W_Q[0]))
    assert np.abs(moved).max() > 0.3


def test_what_no_pattern_sees_moves_stored_weights_and_not_folded_ones():
    direction = GENERATOR.normal(size=(HEADS, 1, DIM))
    unseen = W_Q + direction / GAMMA[:, None]
    close(whole(qk(q=unseen)), whole(qk()))
    stored = [kernels.head_similarity(*qk(False, q), *qk(False)) for q in (W_Q, unseen)]
    assert np.diagonal(np.asarray(stored[1])).max() < 0.95
    close(np.diagonal(kernels.head_similarity(*qk(q=unseen), *qk())), np.ones(HEADS))


def test_divergence_of_patterns():
    query, key = 11, 13
    scores = GENERATOR.normal(size=(HEADS + OTHERS, query, key))
    scores = np.where(np.tril(np.ones((query, key), bool), 2), scores * 3, -np.inf)
    patterns = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    one, two = patterns[:HEADS], patterns[HEADS:]
    where = np.arange(query) % 3 > 0
    expected = np.zeros((HEADS, OTHERS))
    for a, b in itertools.product(range(HEADS), range(OTHERS)):
        expected[a, b] = np.mean([jensenshannon(p, q) ** 2 for p, q in zip(one[a][where], two[b][where], strict=True)])
    np.testing.assert_allclose(kernels.pattern_divergence(one, two, where), expected, rtol=key * ROUNDING * 4)
    whole_text = kernels.pattern_divergence(one, two)
    row = [[np.mean([jensenshannon(p, q) ** 2 for p, q in zip(a, b, strict=True)]) for b in two] for a in one]
    np.testing.assert_allclose(whole_text, row, rtol=key * ROUNDING * 4)
    assert not np.diagonal(np.asarray(kernels.pattern_divergence(one, one))).any()
    apart = np.eye(2)[None, None]
    np.testing.assert_allclose(kernels.pattern_divergence(apart[0][:, :1], apart[0][:, 1:]), [[np.log(2)]], rtol=1e-6)
    assert np.isnan(kernels.pattern_divergence(one, two, np.zeros(query, bool))).all()


def test_divergence_never_holds_all_pairs():
    heads, others, pos = 29, 31, 37
    shapes = [jax.ShapeDtypeStruct((count, pos, pos), np.float32) for count in (heads, others)]
    compiled = jax.jit(kernels.pattern_divergence).lower(*shapes).compile()
    # Some copies of what one head is compared with, beside the results.
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * 4 * others * pos * pos


def test_no_head_makes_a_matrix_of_the_width_squared():
    wide = jax.ShapeDtypeStruct((2, 997, 3), np.float32)
    for function, count in (
        (kernels.composition, 4),
        (kernels.head_similarity, 4),
        (kernels.circuit_singular_values, 2),
    ):
        text = jax.jit(function).lower(*[wide] * count).as_text()
        assert "997x997" not in text


def test_eigenvectors_are_asked_for_once_at_a_time(monkeypatch):
    """Two batched `eigh` that do not wait for each other's results may wait for each other's threads for ever."""
    wide, eigh, calls = jax.ShapeDtypeStruct((2, 83, 3), np.float32), jax.numpy.linalg.eigh, []
    monkeypatch.setattr(jax.numpy.linalg, "eigh", lambda gram: calls.append(gram.shape) or eigh(gram))
    for function, count, expected in (
        (kernels.composition, 4, 1),
        (kernels.circuit_singular_values, 2, 2),  # the second of what the first gives
        (kernels.subspace_overlap, 2, 2),
        (kernels.head_similarity, 4, 0),
    ):
        calls.clear()
        jax.eval_shape(function, *[wide] * count)
        assert calls == [(4, 3, 3)] * expected


def test_circuits_vmap_over_layers():
    layers = np.stack([W_Q, W_K]), np.stack([W_K, W_V])
    together = jax.vmap(kernels.composition)(*layers, *layers)
    alone = [kernels.composition(q, k, q, k) for q, k in zip(*layers, strict=True)]
    np.testing.assert_allclose(together, alone, rtol=1e-5)
