import json

import pytest
from conftest import BERT, GPT2

from jaxqkv.checkpoints.config import KNOWN, config_to_json, parse_config, read_config
from jaxqkv.errors import CheckpointError


def test_what_is_written_is_read_back(config):
    assert parse_config(config_to_json(config), "here") == config


def test_the_hubs_gpt2_file():
    """The keys of the hub's own file: no n_inner, no scale_attn_weights, no tie_word_embeddings."""
    data = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "task_specific_params": {"text-generation": {"do_sample": True}},
        "vocab_size": 50257,
    }
    assert parse_config(data, "here") == KNOWN["gpt2"]


def test_sizes_known_by_name():
    sizes = {name: (c.n_embd, c.n_layer, c.n_head, c.head_dim, c.n_inner) for name, c in KNOWN.items()}
    assert sizes == {
        "gpt2": (768, 12, 12, 64, 3072),
        "gpt2-medium": (1024, 24, 16, 64, 4096),
        "gpt2-large": (1280, 36, 20, 64, 5120),
        "gpt2-xl": (1600, 48, 25, 64, 6400),
        "bert-base-uncased": (768, 12, 12, 64, 3072),
        "bert-large-uncased": (1024, 24, 16, 64, 4096),
    }


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (GPT2, {"model_type": "llama"}, "model_type is 'llama'; supported are 'gpt2' and 'bert'"),
        (GPT2, {"model_type": None}, "model_type is None"),
        (GPT2, {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn = True is not supported"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention = True is not supported"),
        (GPT2, {"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        (
            GPT2,
            {"activation_function": "mish"},
            "activation_function = 'mish' is not supported; supported are gelu_new",
        ),
        (GPT2, {"n_head": 4}, "n_embd = 35 is not a multiple of n_head = 4"),
        (GPT2, {"n_layer": 0}, "n_layer = 0 is not a positive integer"),
        (GPT2, {"n_layer": "3"}, "n_layer = '3' is not a positive integer"),
        (GPT2, {"n_embd": True, "n_inner": None}, "n_embd = True is not a positive integer"),
        (GPT2, {"layer_norm_epsilon": None}, "layer_norm_epsilon is missing"),
        (GPT2, {"layer_norm_epsilon": "small"}, "layer_norm_epsilon = 'small' is not a number"),
        (GPT2, {"scale_attn_weights": 1}, "scale_attn_weights = 1 is not true or false"),
        (GPT2, {"activation_function": ["gelu"]}, "activation_function = ['gelu'] is not supported"),
        (
            BERT,
            {"position_embedding_type": "relative_key"},
            "position_embedding_type = 'relative_key' is not supported",
        ),
        (BERT, {"is_decoder": True}, "is_decoder = True is not supported"),
        (BERT, {"hidden_size": 34}, "hidden_size = 34 is not a multiple of num_attention_heads = 5"),
        (BERT, {"layer_norm_eps": None}, "layer_norm_eps is missing"),
    ],
)
def test_refused_by_name(base, change, message):
    with pytest.raises(CheckpointError) as error:
        parse_config(config_to_json(base) | change, "folder/config.json")
    assert str(error.value).startswith("folder/config.json: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("{", "not readable as JSON"), ("[1]", "expected a JSON object, found list"),
     ("[" * 100_000, "not readable as JSON")],
)  # fmt: skip
def test_unreadable_file(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_config(path)


def test_null_inner_width_is_four_times_the_width(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_to_json(GPT2) | {"n_inner": None}))
    assert read_config(tmp_path / "config.json").n_inner == 4 * GPT2.n_embd
