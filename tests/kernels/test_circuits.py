"""Circuits against whole matrices in float64, written from the definitions, and what must not change them."""

import itertools

import jax
import numpy as np
import pytest
from conftest import ROUNDING
from helpers.oracles import cosine
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
    return kernels.qk_circuit(q, k, GAMMA if fold else None, folded=fold)


def ov(fold=True, v=W_V, o=W_O):
    return kernels.ov_circuit(v, o, GAMMA if fold else None, folded=fold)


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
    for kernel, weights in ((kernels.qk_circuit, (W_Q, W_K)), (kernels.ov_circuit, (W_V, W_O))):
        with pytest.raises(KernelError, match="with folded=False leave it out"):
            kernel(*weights, GAMMA, folded=False)


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
    writes = space[:, :DIM] @ GENERATOR.normal(size=(HEADS, DIM, DIM)).astype(np.float32)
    other = np.tile(space[:, DIM:], (OTHERS, 1, 1))
    assert np.asarray(kernels.composition(W_Q, writes, other, LATER_Q)).max() < 1e-6


def test_composition_of_heads_that_write_and_read_along_one_direction():
    one = np.tile(np.linalg.qr(GENERATOR.normal(size=(EMBED, 1)))[0], (29, 1, 1))
    any_ = GENERATOR.normal(size=(29, EMBED, 1))
    close(kernels.composition(any_[:23], one[:23], one, any_), np.ones((23, 29)))


def test_the_mean_square_of_random_compositions_is_the_baseline():
    """Of 23 · 29 pairs of heads of rank one, whose squared cosine in n dimensions has mean 1/n and variance 2/n²."""
    one, two = GENERATOR.normal(size=(23, EMBED, 1)), GENERATOR.normal(size=(29, EMBED, 1))
    for centre, free in ((CENTRE, EMBED - 1), (np.eye(EMBED), EMBED)):
        earlier, later = centre @ one, centre @ two  # as a norm of scale 1 is folded in, and left out
        squares = np.asarray(kernels.composition(earlier, earlier, later, later), np.float64) ** 2
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
    one = qk()
    two = qk(True, *(np.concatenate([own, later[HEADS:]]) for own, later in ((W_Q, LATER_Q), (W_K, LATER_K))))
    expected = [[(a * b).sum() / norm(a) / norm(b) for b in whole(two)] for a in whole(one)]
    found = np.asarray(kernels.head_similarity(*one, *two))
    close(found, expected)
    close(np.diagonal(found), np.ones(HEADS))
    close(found[:, :HEADS], found[:, :HEADS].T)


def test_overlap_is_that_of_projections():
    def projection(w):
        return w @ np.linalg.inv(w.T @ w) @ w.T

    others = np.concatenate([W_Q, LATER_Q[HEADS:]])
    expected = [[np.trace(projection(a) @ projection(b)) / DIM for b in others] for a in W_Q]
    found = kernels.subspace_overlap(W_Q, others)
    close(found, expected)
    np.testing.assert_allclose(np.diagonal(found), 1, rtol=0, atol=LIMIT)
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
    assert np.abs(cosine(changed_q[0]) - cosine(W_Q[0])).max() > 0.3


def test_what_no_pattern_sees_moves_stored_weights_and_not_folded_ones():
    direction = GENERATOR.normal(size=(HEADS, 1, DIM))
    unseen = W_Q + direction / GAMMA[:, None]
    close(whole(qk(q=unseen)), whole(qk()))

    def similarity(fold):
        """Compares the heads with themselves moved, repeated so that one program serves other tests too."""
        others = (np.resize(each, LATER_Q.shape) for each in (W_Q, W_K))
        return kernels.head_similarity(*qk(fold, unseen), *qk(fold, *others))

    assert np.diagonal(np.asarray(similarity(False))).max() < 0.95
    close(np.diagonal(similarity(True)), np.ones(HEADS))


def test_divergence_of_patterns():
    query, key = 11, 13
    scores = GENERATOR.normal(size=(HEADS + OTHERS, query, key))
    scores = np.where(np.tril(np.ones((query, key), bool), 2), scores * 3, -np.inf)
    scores[0, :, ::2] = scores[-1, :, 1::2] = -np.inf  # no key in common
    patterns = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    one, two = patterns[:HEADS], patterns[HEADS:]
    two[1] = one[1]
    where = np.arange(query) % 3 > 0
    expected = np.zeros((HEADS, OTHERS))
    for a, b in itertools.product(range(HEADS), range(OTHERS)):
        expected[a, b] = np.mean([jensenshannon(p, q) ** 2 for p, q in zip(one[a][where], two[b][where], strict=True)])
    np.testing.assert_allclose(kernels.pattern_divergence(one, two, where), expected, rtol=key * ROUNDING * 4)
    whole_text = kernels.pattern_divergence(one, two)
    row = [[np.mean([jensenshannon(p, q) ** 2 for p, q in zip(a, b, strict=True)]) for b in two] for a in one]
    np.testing.assert_allclose(whole_text, row, rtol=key * ROUNDING * 4)
    whole_text = np.asarray(whole_text)
    assert whole_text[1, 1] == 0
    assert whole_text[0, -1] == pytest.approx(np.log(2), rel=1e-6)
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
        (kernels.composition, 4, 2),  # the second of what the first gives, here and below
        (kernels.circuit_singular_values, 2, 2),
        (kernels.subspace_overlap, 2, 2),
        (kernels.head_similarity, 4, 2),
    ):
        calls.clear()
        jax.eval_shape(function, *[wide] * count)
        assert calls == [(4, 3, 3)] * expected


def test_circuits_vmap_over_layers():
    layers = [np.stack(each) for each in ((W_Q, W_K), (W_K, W_V), (LATER_Q, LATER_K), (LATER_K, LATER_V))]
    together = jax.vmap(kernels.composition)(*layers)
    alone = [kernels.composition(*each) for each in zip(*layers, strict=True)]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


# --- scale, basis and rank ---

PAIRED = (kernels.composition, kernels.head_similarity)


@pytest.mark.parametrize(("one", "two"), [(1e-15, 1e-15), (1e-15, 1e15), (1e12, 1e15), (1e-30, 1e30)])
def test_the_scale_of_a_factor_changes_nothing(one, two):
    """Squares of such numbers are no float32, nor are the squares of these."""
    left, right, later = *map(np.asarray, qk()), qk(q=LATER_Q, k=LATER_K)
    given = np.float32(one) * left, np.float32(two) * right
    for kernel in PAIRED:
        close(kernel(*given, *later), kernel(left, right, *later))
        close(kernel(*later, *given), kernel(*later, left, right))
    close(kernels.subspace_overlap(given[0], later[0]), kernels.subspace_overlap(left, later[0]))
    close(kernels.copying_score(*given, np.float32(two) * CENTRE), kernels.copying_score(left, right, CENTRE))
    if 1e-30 < one * two < 1e20:
        expected = one * two * np.asarray(kernels.circuit_singular_values(left, right), np.float64)
        close(kernels.circuit_singular_values(*given), expected)


def test_each_head_has_its_own_scale():
    scale = np.array([1e-14, 1, 1e14], np.float32)[:, None, None]
    left, right = map(np.asarray, qk())
    for kernel in PAIRED:
        close(kernel(scale * left, right, *qk(q=LATER_Q, k=LATER_K)), kernel(left, right, *qk(q=LATER_Q, k=LATER_K)))
    left = left.copy()
    left[1] = 0
    for kernel in PAIRED:
        found = np.asarray(kernel(left, right, *qk(q=LATER_Q, k=LATER_K)))
        assert np.isnan(found[1]).all()
        assert np.isfinite(found[[0, 2]]).all()


@pytest.mark.parametrize("condition", [1e3, 1e4])
def test_an_ill_conditioned_basis_inside_a_head(condition):
    """The rounding of the factors themselves moves W by `condition` roundings; nothing is to be lost beside."""
    turns = np.linalg.qr(GENERATOR.normal(size=(2, HEADS, DIM, DIM)))[0]
    change = turns[0] * np.geomspace(1, 1 / condition, DIM) @ turns[1]
    back = np.linalg.inv(change).swapaxes(1, 2)
    one = [np.float32(each) for each in (W_Q @ change, W_K @ back)]
    later = [np.float32(each) for each in (LATER_Q, LATER_K)]
    of_one, of_later = whole(one), whole(later)
    cosine = [[(a * b).sum() / norm(a) / norm(b) for b in of_later] for a in of_one]
    both_ways = [(a @ b, b @ a, norm(a) * norm(b)) for a, b in itertools.product(of_one, of_later)]
    writes, reads = (np.reshape([norm(each[way]) / each[2] for each in both_ways], (HEADS, OTHERS)) for way in (0, 1))
    bases = [[np.linalg.qr(each.astype(np.float64))[0] for each in factors[0]] for factors in (one, later)]
    overlap = [[norm(a.T @ b) ** 2 / DIM for b in bases[1]] for a in bases[0]]
    limit = 2 * condition * ROUNDING * DIM
    np.testing.assert_allclose(kernels.head_similarity(*one, *later), cosine, rtol=0, atol=limit)
    np.testing.assert_allclose(kernels.composition(*one, *later), writes, rtol=0, atol=limit)
    np.testing.assert_allclose(kernels.composition(*later, *one), reads.T, rtol=0, atol=limit)
    np.testing.assert_allclose(kernels.subspace_overlap(one[0], later[0]), overlap, rtol=0, atol=limit)
    values = [np.linalg.svd(matrix, compute_uv=False)[:DIM] for matrix in of_one]
    close(kernels.circuit_singular_values(*one), values, limit)
    expected = []
    for a in of_one:
        found = np.linalg.eigvals(CENTRE @ a)
        expected.append(found.real.sum() / np.abs(found).sum())
    np.testing.assert_allclose(kernels.copying_score(*one, CENTRE), expected, rtol=0, atol=10 * limit)


def test_overlap_of_columns_that_are_not_independent():
    """Of what they span, with the ranks in the place of head_dim; a folded square W_Q has one dimension less."""
    square = GENERATOR.normal(size=(2, 13, 13)).astype(np.float32)
    read = square - square.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(kernels.subspace_overlap(read, read), 1, rtol=0, atol=LIMIT)  # all that is centred
    low = W_Q[..., :4] @ GENERATOR.normal(size=(HEADS, 4, DIM))  # of rank 4 in 7 columns
    bases = [np.linalg.qr(each[:, :4])[0] for each in W_Q], [np.linalg.qr(each)[0] for each in LATER_Q]
    expected = [[norm(a.T @ b) ** 2 / (4 * DIM) ** 0.5 for b in bases[1]] for a in bases[0]]
    close(kernels.subspace_overlap(low, LATER_Q), expected)
    close(np.diagonal(kernels.subspace_overlap(low, np.resize(low, LATER_Q.shape))), np.ones(HEADS))


def test_no_heads():
    """Kernels of pairs of heads, of none on either side."""
    none, some = np.zeros((0, EMBED, DIM)), W_Q

    @jax.jit
    def every():
        sides = ((none, some), (some, none), (none, none))
        pairs = [kernel(one, one, two, two) for kernel in PAIRED for one, two in sides]
        overlaps = [kernels.subspace_overlap(one, two) for one, two in sides[:2]]
        return [*pairs, *overlaps, kernels.circuit_singular_values(none, none)]

    shapes = [(0, HEADS), (HEADS, 0), (0, 0)]
    assert [each.shape for each in every()] == [*shapes, *shapes, *shapes[:2], (0, DIM)]
    assert kernels.copying_score(none, none, CENTRE).shape == (0,)


def test_derivatives():
    """Along a direction, against differences of the definitions in float64."""

    def overlap(x, y):
        a, b = (np.linalg.qr(each)[0] for each in (x, y))
        return np.linalg.norm(a.T @ b) ** 2 / DIM

    def cosine_of_two(a, b, c, d):
        one, two = a @ b.T, c @ d.T
        return (one * two).sum() / norm(one) / norm(two)

    def composed(a, b, c, d):
        one, two = a @ b.T, c @ d.T
        return norm(one @ two) / norm(one) / norm(two)

    def values(a, b):
        return np.linalg.svd(a @ b.T, compute_uv=False)[:DIM] @ np.arange(1, DIM + 1)

    factors = np.stack([W_Q[0], W_K[0], LATER_Q[0], LATER_K[0]])
    direction, step = GENERATOR.normal(size=factors.shape), 1e-5
    cases = (
        (kernels.subspace_overlap, 2, overlap),
        (kernels.head_similarity, 4, cosine_of_two),
        (kernels.composition, 4, composed),
        (kernels.circuit_singular_values, 2, values),
    )

    @jax.jit
    def gradients(*given):
        found = []
        for kernel, count, _ in cases:
            many = kernel is kernels.circuit_singular_values
            weights = np.arange(1, DIM + 1, dtype=np.float32) if many else np.ones(1)
            of_kernel = jax.grad(lambda *x, f=kernel, w=weights: (f(*x)[0] * w).sum(), argnums=range(count))
            found.append(of_kernel(*given[:count]))
        return found

    for (_, count, definition), slopes in zip(cases, gradients(*np.float32(factors)[:, None]), strict=True):
        actual = sum((np.asarray(slope, np.float64)[0] * d).sum() for slope, d in zip(slopes, direction, strict=False))
        ends = [definition(*(factors + sign * step * direction)[:count]) for sign in (1, -1)]
        assert actual == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3, abs=1e-4)


def test_copying_is_not_for_the_inside_of_jit():
    by_readout = jax.vmap(kernels.copying_score, in_axes=(None, None, 0))
    for transformed, readout in ((jax.jit(kernels.copying_score), CENTRE), (by_readout, CENTRE[None])):
        with pytest.raises(KernelError, match="copying_score runs on the host: call it outside of jit, vmap and grad"):
            transformed(W_Q, W_K, readout)
