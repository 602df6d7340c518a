"""Weights by the field's names, against the tensors of the file and the model's own numbers."""

import numpy as np
import pytest
from conftest import BERT, CONFIGS, GPT2, changed, random_ids, random_tensors, write_folder

import jaxqkv
from jaxqkv.errors import JaxqkvError


@pytest.fixture(params=sorted(CONFIGS))
def weights(request, tmp_path):
    return jaxqkv.load(write_folder(tmp_path / "x", CONFIGS[request.param])).weights


def test_several_layers_are_stacked(weights):
    for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V"):
        for by_head in (False, True):
            one = [getattr(weights, name)(layer, by_head=by_head) for layer in range(3)]
            for layers in (range(3), np.arange(3), [0, 1, 2]):
                np.testing.assert_array_equal(getattr(weights, name)(layers, by_head=by_head), np.stack(one))
            np.testing.assert_array_equal(getattr(weights, name)([2, 0], by_head=by_head), np.stack([one[2], one[0]]))
            np.testing.assert_array_equal(getattr(weights, name)(np.int32(1), by_head=by_head), one[1])
    for name in ("W_in", "W_out", "b_in", "b_out", "b_O"):
        stacked = getattr(weights, name)(range(3))
        np.testing.assert_array_equal(stacked, np.stack([getattr(weights, name)(layer) for layer in range(3)]))
        with pytest.raises(ValueError, match="read-only"):
            stacked[0] = 0


def test_the_numbers_of_a_layer(model, config):
    """q, attn_out and mlp_out from these weights, in float64."""
    acts, weights = model.run(random_ids(config, 2, 5), capture={"q", "z", "attn_out", "resid_pre"}), model.weights
    for layer in range(3):
        q, z, out, x = (np.asarray(acts[name][layer], np.float64) for name in ("q", "z", "attn_out", "resid_pre"))
        by_head = np.einsum("bhpd,hde->bpe", z, weights.W_O(layer, by_head=True)) + weights.b_O(layer)
        np.testing.assert_allclose(out, by_head, atol=1e-5)
        if not config.causal:  # whose attention reads the stream itself
            q_again = np.einsum("bpe,hed->bhpd", x, weights.W_Q(layer, by_head=True))
            q_again += weights.b_Q(layer, by_head=True)[None, :, None]
            np.testing.assert_allclose(q, q_again, atol=1e-5)
    assert weights.W_in(0).shape == (config.n_embd, config.n_inner)
    assert weights.W_out(0).shape == (config.n_inner, config.n_embd)


def test_embeddings(tmp_path):
    tensors = random_tensors(GPT2)
    tied = jaxqkv.load(write_folder(tmp_path / "tied", GPT2, tensors)).weights
    np.testing.assert_array_equal(tied.W_E, tensors["wte.weight"])
    np.testing.assert_array_equal(tied.W_pos, tensors["wpe.weight"])
    np.testing.assert_array_equal(tied.W_U, tensors["wte.weight"].T)
    config = changed(GPT2, tie_word_embeddings=False)
    model = jaxqkv.load(write_folder(tmp_path / "own", config))
    np.testing.assert_array_equal(model.weights.W_U, random_tensors(config)["lm_head.weight"].T)
    ids = random_ids(config, 1, 3)
    acts = model.run(ids, capture={"hidden", "logits"})
    np.testing.assert_allclose(acts.logits, np.asarray(acts.hidden, np.float64) @ model.weights.W_U, atol=1e-4)
    bert = jaxqkv.load(write_folder(tmp_path / "bert", BERT)).weights
    with pytest.raises(JaxqkvError, match="bert has no next-token logits, and so no W_U"):
        _ = bert.W_U


def test_layers_that_do_not_exist(weights):
    for layers, message in ((3, "no layer 3"), ([0, -1], "no layer -1"), ([], "no layer selected")):
        with pytest.raises(JaxqkvError, match=message):
            weights.b_Q(layers)
