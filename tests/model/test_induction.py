"""The checkpoint made by hand does what it is made for."""

import numpy as np
from helpers.induction import INDUCTION, PREVIOUS, SIZE, write_induction

import jaxqkv


def test_its_heads_find_the_previous_token_and_what_followed_the_same_token(tmp_path):
    half = 25
    tokens = np.random.default_rng(1).permutation(SIZE)[:half]
    ids = np.tile(tokens, 2)[None].astype(np.int32)
    model = jaxqkv.load(write_induction(tmp_path / "induction"))
    activations = model.run(ids, capture={"pattern", "logits"})
    pattern = np.asarray(activations.pattern)[:, 0]
    later, second = np.arange(1, 2 * half), np.arange(half + 1, 2 * half)
    assert pattern[PREVIOUS][later, later - 1].min() > 0.99
    assert pattern[INDUCTION][second, second - half + 1].min() > 0.99
    others = np.delete(pattern.reshape(-1, 2 * half, 2 * half), [PREVIOUS[1], 6 + INDUCTION[1]], axis=0)
    assert others[:, later, later - 1][:, 20:].max() < 0.1
    assert others[:, second, second - half + 1].max() < 0.1
    predicted = np.asarray(activations.logits)[0].argmax(-1)
    # The first token is its own previous one, so that its induction head sees two places.
    np.testing.assert_array_equal(predicted[second[:-1]], tokens[2:])
