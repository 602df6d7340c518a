"""Models of transformers, mappings of tensors, and tokenizer objects, without a file."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import CONFIGS, GPT2, MODEL_LIMIT, changed, random_ids, random_tensors, relative_error, write_folder
from helpers.oracles import EVERYTHING, masked_batch, real

import jaxqkv
from jaxqkv.architectures.activations import FIELDS
from jaxqkv.checkpoints.weights import Weights
from jaxqkv.errors import CheckpointError, JaxqkvError, JaxqkvWarning, NoTokenizer

HEADS = {
    "gpt2": ("GPT2Model", "GPT2DoubleHeadsModel", "GPT2ForSequenceClassification", "GPT2ForTokenClassification"),
    "bert": ("BertForPreTraining", "BertForMaskedLM", "BertForSequenceClassification", "BertForQuestionAnswering"),
    "roberta": ("RobertaForMaskedLM", "RobertaForSequenceClassification", "RobertaForTokenClassification"),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertForSequenceClassification", "DistilBertForQuestionAnswering"),
}


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("transformers", exc_type=ImportError)
    return pytest.importorskip("torch", exc_type=ImportError)


@pytest.fixture(scope="module")
def reference(torch):
    from jaxqkv.model import torch_reference

    return torch_reference


MASK = np.array([[True] * 13, [True] * 9 + [False] * 4])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_intermediate_of_a_model(name, reference):
    config = CONFIGS[name]
    theirs = reference.build(config, seed=1)
    ids = random_ids(config, 2, 13)
    expected = reference.intermediates(theirs, config, ids, MASK)
    model = jaxqkv.load(theirs)
    assert model.checkpoint.spec == type(theirs).__name__
    batch = masked_batch(ids, MASK)
    acts = model.run(batch, capture=EVERYTHING)
    actual = {field: acts[field] for field in FIELDS} | {"hidden": model.hidden(batch)}
    actual |= {"logits": model.logits(batch)} if config.has_logits else {}
    assert actual.keys() == expected.keys()
    for field in expected:
        assert relative_error(real(actual[field], MASK, field), real(expected[field], MASK, field)) <= MODEL_LIMIT


@pytest.mark.parametrize(("name", "head"), [(name, head) for name in HEADS for head in HEADS[name]])
def test_models_with_other_heads(name, head, torch, reference):
    import transformers

    config = CONFIGS[name]
    about = reference.build(config, seed=1).config
    theirs = getattr(transformers, head)(about).eval()
    ids = random_ids(config, 2, 13)
    with torch.no_grad():
        expected = theirs.base_model(torch.tensor(ids).long()).last_hidden_state.numpy()
    model = jaxqkv.load(theirs)
    assert relative_error(model.hidden(ids), expected) <= MODEL_LIMIT
    if head.endswith("ForMaskedLM"):
        with torch.no_grad():
            logits = theirs(torch.tensor(ids).long()).logits.numpy()
        assert relative_error(model.logits(ids), logits) <= MODEL_LIMIT
    assert model.config == jaxqkv.load(reference.build(config, seed=1)).config


def test_an_output_embedding_that_is_not_tied(torch, reference):
    """As the tensors are, whatever the config says of them."""
    theirs = reference.build(changed(GPT2, tie_word_embeddings=False), seed=1)
    ids = random_ids(GPT2, 2, 5)
    with torch.no_grad():
        expected = theirs(torch.tensor(ids).long()).logits.numpy()
    assert relative_error(jaxqkv.load(theirs).logits(ids), expected) <= MODEL_LIMIT
    theirs.config.tie_word_embeddings = True
    with pytest.warns(JaxqkvWarning, match="GPT2LMHeadModel: lm_head.weight differs from transformer.wte.weight"):
        logits = jaxqkv.load(theirs).logits(ids)
    assert relative_error(logits, expected) <= MODEL_LIMIT


def test_later_changes_of_a_model_are_not_seen(torch, reference):
    theirs = reference.build(GPT2, seed=1)
    model, ids = jaxqkv.load(theirs), random_ids(GPT2, 2, 5)
    weights = {name: model.weights[name].copy() for name in model.weights.names}
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    for name, values in weights.items():
        np.testing.assert_array_equal(model.weights[name], values)
    assert np.asarray(model.logits(ids)).any()
    with pytest.raises(ValueError, match="read-only"):
        model.checkpoint.tensor("transformer.wte.weight")[0] = 1


def test_a_tied_tensor_is_copied_once(reference):
    checkpoint = jaxqkv.open_checkpoint(reference.build(GPT2, seed=1))
    one, two = (checkpoint.tensor(key) for key in ("transformer.wte.weight", "lm_head.weight"))
    assert one is two


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_tensors_of_every_dtype(dtype, torch, reference):
    """They are stored as they are, and computed with in float32."""
    theirs = reference.build(GPT2, seed=1).to(getattr(torch, dtype))
    model = jaxqkv.load(theirs.state_dict(), config=theirs.config)
    assert model.weights.stored == [{"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}[dtype]]
    for name, values in theirs.state_dict().items():
        np.testing.assert_array_equal(model.weights[name], values.float().numpy())
    assert model.logits(random_ids(GPT2, 1, 3)).dtype == jnp.float32


class Exchanged:
    """An array that has `__dlpack__` alone."""

    def __init__(self, values):
        self.__dlpack__, self.__dlpack_device__ = values.__dlpack__, values.__dlpack_device__


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, Exchanged, "parameter"])
@pytest.mark.parametrize("form", ["ours", "dict", "theirs"])
def test_a_mapping_of_arrays(config, folder, kind, form):
    """With each form of config."""
    if kind == "parameter":
        torch = pytest.importorskip("torch", exc_type=ImportError)
        kind = lambda x: torch.nn.Parameter(torch.tensor(x))  # noqa: E731
    about = {"ours": config, "dict": config.to_json()}.get(form)
    if form == "theirs":
        transformers = pytest.importorskip("transformers", exc_type=ImportError)
        about = transformers.AutoConfig.from_pretrained(folder)
    tensors = {key: kind(values) for key, values in random_tensors(config).items()}
    model, ids = jaxqkv.load(tensors, config=about), random_ids(config, 2, 5)
    assert model.config == config
    np.testing.assert_array_equal(model.hidden(ids), jaxqkv.load(folder).hidden(ids))


def test_what_a_checkpoint_in_memory_says(config):
    tensors = random_tensors(config)
    checkpoint = jaxqkv.open_checkpoint(tensors, config=config)
    assert jaxqkv.open_checkpoint(checkpoint) is checkpoint
    identity = checkpoint.identity()
    assert (identity["checkpoint"], identity["source"]) == ("state_dict", "memory")
    assert jaxqkv.open_checkpoint(dict(reversed(tensors.items())), config=config).identity() == identity
    key = next(iter(tensors))
    other = tensors | {key: tensors[key] + 1}
    assert jaxqkv.open_checkpoint(other, config=config).identity() != identity
    narrow = tensors | {key: tensors[key].astype(ml_dtypes.bfloat16)}
    assert Weights(jaxqkv.open_checkpoint(narrow, config=config)).stored == ["BF16", "F32"]
    assert "none; in memory" in Weights(checkpoint).summary()["files"]
    with pytest.raises(NoTokenizer, match=r"state_dict: a model in memory has no tokenizer; load\(…, tokenizer=…\)"):
        jaxqkv.load(checkpoint).tokenize("a")


TENSORS = random_tensors(GPT2)
KEY = next(iter(TENSORS))


@pytest.mark.parametrize(
    ("given", "config", "message"),
    [
        (TENSORS, None, "state_dict needs config=…: a dict with what config.json holds"),
        (TENSORS, 5, "state_dict: config: expected a dict, a config of transformers or one of jaxqkv, not int"),
        (TENSORS, {"model_type": "llama"}, "state_dict: config: model_type is 'llama'; supported are 'gpt2', 'bert'"),
        (TENSORS, GPT2.to_json() | {"add_cross_attention": True}, "state_dict: config: add_cross_attention = True"),
        (TENSORS, changed(GPT2, vocab_size=5), r"wrong shape wte.weight \[43, 35\], config says \[5, 35\]"),
        ({}, GPT2, "state_dict: tensors do not fit config.json: missing h.0.attn.c_attn.bias"),
        ({k: v for k, v in TENSORS.items() if k != KEY}, GPT2, f"missing {KEY}"),
        (TENSORS | {"adapter": TENSORS[KEY]}, GPT2, "unexpected adapter"),
        (TENSORS | {KEY: TENSORS[KEY].astype(np.int8)}, GPT2, f"state_dict: {KEY} is int8, expected one of F64"),
        (TENSORS | {KEY: object()}, GPT2, f"state_dict: {KEY} is object, expected one of F64|{KEY} \\[\\]"),
        ({"layers": [{}]}, GPT2, "state_dict: layers is a list, not an array"),
        ({3: TENSORS[KEY]}, GPT2, "state_dict: 3 is not the name of a tensor"),
        (3, None, "expected the name of a checkpoint, a folder, a model of transformers or a state_dict, not int"),
        ("demo-gpt2", GPT2, "config= goes with a state_dict"),
    ],
)
def test_what_is_refused(given, config, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        jaxqkv.load(given, config=config)
    assert "\n" not in str(caught.value)


def test_models_that_are_refused(torch, reference):
    import transformers

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=5, **small))
    theirs = reference.build(GPT2, seed=1)
    without = torch.nn.Linear(2, 2)
    for given, config, message in (
        (llama, None, "LlamaForCausalLM: config: model_type is 'llama'"),
        (theirs, GPT2, "GPT2LMHeadModel has a config of its own; config= goes with a state_dict"),
        (without, None, "Linear needs config=…"),
        (theirs.to("meta"), None, "GPT2LMHeadModel: transformer.wte.weight cannot be read as an array"),
    ):
        with pytest.raises(CheckpointError, match=message):
            jaxqkv.load(given, config=config)


def test_torch_is_not_imported():
    """Of a mapping of NumPy's arrays, and of a tokenizer of `tokenizers`."""
    code = """
import sys, tokenizers, jaxqkv
checkpoint = jaxqkv.open_checkpoint("demo-gpt2")
tokenizer = tokenizers.Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
tensors = {key: checkpoint.tensor(key) for key in checkpoint.shapes}
model = jaxqkv.load(tensors, config=checkpoint.config, tokenizer=tokenizer)
model.run(model.tokenize("the"), layers=0)
assert not {"torch", "transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- inside transformations: what is concrete is looked at, and what is traced is not ---


def test_concrete_batches_inside_a_program(model, config):
    """A batch in JAX's arrays that is known, and parameters that are not."""
    make = jnp.asarray
    ids, params = random_ids(config, 2, 5), model.params()
    whole = {"input_ids": make(ids), "attention_mask": make(MASK[:, 8:].astype(np.int32))}
    expected = model.hidden(whole)
    plain = model.hidden(ids)
    limit = MODEL_LIMIT * float(jnp.abs(expected).max())
    inside = jax.jit(lambda params: jaxqkv.hidden(params, whole, config))(params)
    np.testing.assert_allclose(inside, expected, atol=limit)
    np.testing.assert_allclose(jax.jit(lambda p: jaxqkv.hidden(p, make(ids), config))(params), plain, atol=limit)
    types = jaxqkv.Batch.of(make(ids), token_types=make(np.zeros_like(ids)))
    layers, some = make(np.array([2, 0])), {"q"}
    acts = jax.jit(lambda p: jaxqkv.forward(p, types, config, capture=some, layers=layers))(params)
    assert acts.layers == (2, 0)
    np.testing.assert_allclose(acts.q, model.run(ids, layers=[2, 0]).q, atol=MODEL_LIMIT * 10)
    gradient = jax.jit(jax.grad(lambda p: jaxqkv.hidden(p, whole, config).sum()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    scaled = jax.vmap(lambda factor: jaxqkv.hidden(jax.tree.map(lambda x: x * factor, params), whole, config))
    np.testing.assert_allclose(scaled(jnp.ones(2))[1], expected, atol=limit)
    rows = jax.vmap(lambda row: jaxqkv.hidden(params, row[None], config))(jnp.asarray(ids))
    np.testing.assert_allclose(rows[:, 0], plain, atol=limit)
    shift = make(np.ones(2, np.float32))
    reduced = jax.jit(
        lambda p: jaxqkv.forward(p, ids, config, reduce=lambda a, mask, shift: a.q.sum((1, 2, 3)) + shift, inputs=shift)
    )(params)
    assert reduced.shape == (config.n_layer, 2)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (jnp.full((1, 3), 43), "token ids reach from 43 to 43"),
        ({"ids": jnp.ones((1, 3), jnp.int32), "mask": jnp.full((1, 3), 2)}, "an integer mask is 1 at real tokens"),
        ({"ids": jnp.ones((1, 3), jnp.int32), "token_types": jnp.full((1, 3), 2)}, "token_types reach from 2 to 2"),
    ],
)
def test_wrong_values_inside_a_program_are_refused_by_name(gpt2_model, batch, message):
    with pytest.raises(JaxqkvError, match=message):
        jax.jit(lambda params: jaxqkv.hidden(params, batch, GPT2))(gpt2_model.params())


def test_the_check_of_a_reducer_needs_values(gpt2_model):
    ids = random_ids(GPT2, 2, 3)
    run = jax.jit(lambda p: jaxqkv.forward(p, ids, GPT2, reduce=lambda a, mask: a.q.sum((1, 2, 3)), check=True))
    with pytest.raises(JaxqkvError, match="`check` compares values, which are unknown inside"):
        run(gpt2_model.params())


def test_numbers_of_layers_of_weights_inside_a_program(gpt2_model):
    several = jnp.array([2, 0])
    inside = jax.jit(lambda x: x @ gpt2_model.weights.W_Q(several)[0])(jnp.eye(35))
    np.testing.assert_allclose(inside, gpt2_model.weights.W_Q(2), atol=1e-6)


def test_a_given_folder_still_works(tmp_path):
    assert jaxqkv.load(write_folder(tmp_path / "x", GPT2)).config == GPT2
