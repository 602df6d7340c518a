import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BERT, CONFIGS, GPT2, changed, write_folder

import jaxqkv
from jaxqkv.architectures import REGISTRY
from jaxqkv.architectures.layers import ACTIVATION_FUNCTIONS
from jaxqkv.checkpoints.config import ACTIVATIONS
from jaxqkv.errors import CheckpointError, JaxqkvWarning
from jaxqkv.model import comparison


def test_what_is_written_is_read_back(config):
    assert REGISTRY.parse(config.to_json(), "here") == config


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
    assert REGISTRY.parse(data, "here") == REGISTRY.known["gpt2"]


def test_sizes_known_by_name():
    sizes = {name: (c.n_embd, c.n_layer, c.n_head, c.head_dim, c.n_inner) for name, c in REGISTRY.known.items()}
    assert sizes == {
        "gpt2": (768, 12, 12, 64, 3072),
        "gpt2-medium": (1024, 24, 16, 64, 4096),
        "gpt2-large": (1280, 36, 20, 64, 5120),
        "gpt2-xl": (1600, 48, 25, 64, 6400),
        "bert-base-uncased": (768, 12, 12, 64, 3072),
        "bert-large-uncased": (1024, 24, 16, 64, 4096),
        "roberta-base": (768, 12, 12, 64, 3072),
        "roberta-large": (1024, 24, 16, 64, 4096),
        "distilbert-base-uncased": (768, 6, 12, 64, 3072),
    }


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (
            GPT2,
            {"model_type": "llama"},
            "model_type is 'llama'; supported are 'gpt2', 'bert', 'roberta', 'xlm-roberta'",
        ),
        (GPT2, {"model_type": None}, "model_type is None"),
        (GPT2, {"reorder_and_upcast_attn": 1}, "reorder_and_upcast_attn = 1 is not true or false"),
        (
            GPT2,
            {"per_layer_config": {"0": {"n_inner": 3}}},
            "per_layer_config = {'0': {'n_inner': 3}} is not supported",
        ),
        (GPT2, {"pruned_heads": {"0": [1]}}, "pruned_heads = {'0': [1]} is not supported"),
        (GPT2, {"hidden_size": 70}, "hidden_size = 70 contradicts n_embd = 35, which means the same"),
        (BERT, {"tie_word_embeddings": None}, "tie_word_embeddings = None is not true or false"),
        (BERT, {"add_cross_attention": True}, "add_cross_attention = True is not supported"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention = True is not supported"),
        (GPT2, {"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        (
            GPT2,
            {"activation_function": "xielu"},
            "activation_function = 'xielu' is not supported; supported are gelu_new",
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
        REGISTRY.parse(base.to_json() | change, "folder/config.json")
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
        REGISTRY.read(path)


def test_null_inner_width_is_four_times_the_width(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GPT2.to_json() | {"n_inner": None}))
    assert REGISTRY.read(tmp_path / "config.json").n_inner == 4 * GPT2.n_embd


# --- keys that are missing, and keys of other names ---


@pytest.mark.parametrize(
    ("base", "key"), [(config, key) for config in CONFIGS.values() for key in config.keys.values() if key != "n_inner"]
)
def test_a_missing_key_has_no_default_and_the_message_says_the_line(base, key):
    data = {name: value for name, value in base.to_json().items() if name != key}
    with pytest.raises(CheckpointError) as error:
        REGISTRY.parse(data, "config.json")
    line = f'"{key}": {json.dumps(base.usual[key])}'
    assert str(error.value).startswith(f"config.json: {key} is missing; add {line} to config.json")


def test_fresh_weights_need_a_range(tmp_path, config):
    folder = write_folder(tmp_path / "x", config, initializer_range=None)
    with pytest.raises(CheckpointError, match=r'initializer_range is missing; add "initializer_range": 0\.02 to'):
        jaxqkv.load(f"random:{folder}")


def test_what_the_messages_propose_is_what_transformers_takes(config):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    theirs = {"gpt2": transformers.GPT2Config(), "bert": transformers.BertConfig()}[config.model_type]
    assert set(config.keys.values()) - {"n_inner"} <= set(config.usual)
    assert {key: getattr(theirs, key) for key in config.usual} == config.usual
    assert {key: getattr(theirs, key) for key in config.switches} == config.switches


@pytest.mark.parametrize("alias", sorted(GPT2.aliases))
def test_a_key_under_its_other_name(tmp_path, alias):
    data = GPT2.to_json()
    value = data.pop(GPT2.aliases[alias])
    assert REGISTRY.parse(data | {alias: value}, "here") == GPT2
    with pytest.raises(CheckpointError, match=f"{alias} = 'x' is not a positive integer"):
        REGISTRY.parse(data | {alias: "x"}, "here")
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    assert getattr(transformers.GPT2Config(**data, **{alias: value}), GPT2.aliases[alias]) == value


# --- keys that are not known ---


@pytest.mark.parametrize("key", ["trainer_note", "rope_theta", "head_dim", "auto_map"])
def test_an_unknown_key_is_named_and_ignored(config, key):
    with pytest.warns(JaxqkvWarning, match=f"^here: unknown key {key}; jaxqkv ignores it: if it changes how") as caught:
        assert REGISTRY.parse(config.to_json() | {key: 3}, "here") == config
    assert len(caught) == 1


def test_unknown_keys_are_named_together_and_never_hide_an_error(config):
    data = config.to_json() | {f"own{number}": number for number in range(20)}
    with pytest.warns(
        JaxqkvWarning, match=r"unknown keys own0, own1, own10, .*, and 8 more; jaxqkv ignores them: if any"
    ):
        REGISTRY.parse(data, "here")
    with pytest.raises(CheckpointError, match="vocab_size = 0"):
        REGISTRY.parse(data | {"vocab_size": 0}, "here")


def test_every_key_that_transformers_writes_is_known(config):
    """Warnings are errors."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    theirs = {"gpt2": transformers.GPT2Config(), "bert": transformers.BertConfig()}[config.model_type]
    data = theirs.to_dict() | dict.fromkeys(transformers.GenerationConfig._get_default_generation_params())
    expected = config.to_json()
    assert REGISTRY.parse(data | expected, "here") == config


@pytest.mark.parametrize(
    ("base", "keys"),
    [
        (GPT2, {"n_ctx": 17, "resid_pdrop": 0.1, "summary_type": "cls_index", "is_decoder": True, "output_past": True}),
        (GPT2, {"task_specific_params": {"a": {}}, "torch_dtype": "float16", "use_bfloat16": True, "_num_labels": 1}),
        (BERT, {"directionality": "bidi", "pooler_fc_size": 768, "gradient_checkpointing": False, "pad_token_id": 0}),
        (BERT, {"id2label": {"0": "a"}, "label2id": {"a": 0}, "finetuning_task": "ner", "chunk_size_feed_forward": 3}),
    ],
)  # fmt: skip
def test_keys_of_files_on_the_hub_that_change_nothing(base, keys):
    assert REGISTRY.parse(base.to_json() | keys, "here") == base


# --- activations ---

X = np.concatenate([np.linspace(-12, 12, 4801), [-1e3, 1e3]])


@functools.cache
def computed(function):
    """An activation of `X`, in float64."""
    with comparison._double_precision():
        return np.asarray(ACTIVATION_FUNCTIONS[function](jnp.asarray(X)))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations_are_those_of_transformers(name):
    """In float64, so that only another formula can differ; gelu_fast has a constant of ten digits."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    activations = pytest.importorskip("transformers.activations", exc_type=ImportError)
    expected = activations.ACT2FN[name](torch.tensor(X)).numpy()
    atol = 1e-10 if name == "gelu_fast" else 1e-13
    np.testing.assert_allclose(computed(ACTIVATIONS[name]), expected, rtol=1e-9, atol=atol)


def test_activations_that_are_refused_are_other_functions():
    """Each differs from all that are implemented, so that no name is refused without need."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    activations = pytest.importorskip("transformers.activations", exc_type=ImportError)
    x = torch.linspace(-12, 12, 481, dtype=torch.float64)
    implemented = [activations.ACT2FN[name](x) for name in ACTIVATIONS]
    refused = set(activations.ACT2FN) - set(ACTIVATIONS)
    assert refused >= {"gelu_10", "hardswish", "leaky_relu"}
    for name in refused - {"prelu", "xielu"}:  # with parameters of their own
        assert min(float((activations.ACT2FN[name](x) - each).abs().max()) for each in implemented) > 1e-3, name


def test_an_activation_of_another_name_runs(tmp_path):
    silu, swish = (jaxqkv.load(write_folder(tmp_path / n, changed(GPT2, activation=n))) for n in ("silu", "swish"))
    np.testing.assert_array_equal(silu.hidden([[1, 2]]), swish.hidden([[1, 2]]))


def test_a_pointer_of_git_lfs(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 665\n")
    with pytest.raises(CheckpointError, match=r"config.json: a Git LFS pointer instead .*; run `git lfs pull`"):
        REGISTRY.read(path)
