import numpy as np
import pytest
from conftest import GPT2, random_tensors

import jaxqkv
from jaxqkv.checkpoints.folder import tensors_from_params
from jaxqkv.errors import JaxqkvError


def projections(config, layer):
    """W_Q, W_K, W_V, W_O as `[in, out]`, straight from the definition of each format."""
    tensors = random_tensors(config)
    if config is GPT2:
        wide, d = tensors[f"h.{layer}.attn.c_attn.weight"], config.n_embd
        return wide[:, :d], wide[:, d : 2 * d], wide[:, 2 * d :], tensors[f"h.{layer}.attn.c_proj.weight"]
    at = f"encoder.layer.{layer}.attention"
    names = (f"{at}.self.query", f"{at}.self.key", f"{at}.self.value", f"{at}.output.dense")
    return tuple(tensors[f"{name}.weight"].T for name in names)


def test_projections_whole_and_by_head(config, model):
    head_dim = config.head_dim
    getters = (model.weights.W_Q, model.weights.W_K, model.weights.W_V, model.weights.W_O)
    for get, expected in zip(getters, projections(config, 2), strict=True):
        np.testing.assert_array_equal(get(2), expected)
    for get, expected in zip(getters[:3], projections(config, 1), strict=False):
        for head in range(config.n_head):
            columns = slice(head * head_dim, (head + 1) * head_dim)
            np.testing.assert_array_equal(get(1, by_head=True)[head], expected[:, columns])
    for head in range(config.n_head):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        np.testing.assert_array_equal(model.weights.W_O(1, by_head=True)[head], projections(config, 1)[3][rows])


def test_wide_matrix_is_q_k_v_side_by_side(config, model):
    np.testing.assert_array_equal(model.weights.W_QKV(1), np.concatenate(projections(config, 1)[:3], axis=1))


def test_by_name_with_and_without_prefix(config, model):
    prefix = {"gpt2": "transformer.", "bert": "bert."}[config.model_type]
    for key, tensor in random_tensors(config).items():
        np.testing.assert_array_equal(model.weights[prefix + key], tensor)


def test_what_is_not_there(model):
    with pytest.raises(JaxqkvError, match=r"no tensor named h\.99\.nothing"):
        model.weights["h.99.nothing"]
    with pytest.raises(JaxqkvError, match=r"no layer 3; its layers are 0 to 2"):
        model.weights.W_Q(3)
    with pytest.raises(JaxqkvError, match=r"no layer -1"):
        model.weights.W_O(-1)


def test_params_and_back(config, model):
    tensors = tensors_from_params(model.params(), config)
    expected = random_tensors(config)
    assert sorted(tensors) == sorted(expected)
    for key, tensor in expected.items():
        np.testing.assert_array_equal(tensors[key], tensor)


def test_summary_counts_every_parameter_once():
    """The totals that are known of the real checkpoints."""
    totals = {
        "gpt2": "124,439,808",
        "gpt2-medium": "354,823,168",
        "gpt2-large": "774,030,080",
        "gpt2-xl": "1,557,611,200",
        "bert-base-uncased": "108,891,648",
        "bert-large-uncased": "334,092,288",
    }
    for name, total in totals.items():
        summary = jaxqkv.load(f"random:{name}").weights.summary()
        assert summary["parameters"] == total
        parts = [int(summary[f"  {part}"].replace(",", "")) for part in ("embeddings", "attention", "MLP", "norms")]
        assert sum(parts) == int(total.replace(",", ""))
