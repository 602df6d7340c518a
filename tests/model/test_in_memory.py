"""Models of transformers, mappings of tensors, and tokenizer objects, without a file."""

import copy
import importlib.abc
import re
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from conftest import (
    BERT,
    CONFIGS,
    GPT2,
    MODEL_LIMIT,
    changed,
    random_ids,
    random_tensors,
    relative_error,
    write_folder,
)
from helpers.checkpoints import MANY_TEXT, write_checkpoint_of_words

import jaxqkv
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


@pytest.fixture(scope="module")
def plain(reference):
    """Lists for each architecture a config of transformers and what is read of it."""
    models = {name: reference.build(config, seed=1) for name, config in CONFIGS.items()}
    return {name: (theirs.config, jaxqkv.open_checkpoint(theirs).config) for name, theirs in models.items()}


# All runs here take one batch, and so one compiled block. Every intermediate of a model of transformers is in
# test_parity.py.
IDS = random_ids(GPT2, 2, 11)


@pytest.mark.parametrize(("name", "head"), [(name, head) for name in HEADS for head in HEADS[name]])
def test_models_with_other_heads(name, head, torch, plain):
    import transformers

    about, config = plain[name]
    theirs = getattr(transformers, head)(copy.deepcopy(about)).eval()
    model = jaxqkv.load(theirs)
    assert model.config == config
    stored = theirs.base_model.state_dict()
    for key in model.weights.names:  # of the backbone all, bit by bit
        if key in stored:
            np.testing.assert_array_equal(model.weights[key], stored.pop(key).numpy())
    assert all(
        re.match(r"pooler\.|.*position_ids|.*token_type_ids|h\.\d+\.attn\.(masked_)?bias", key) for key in stored
    )
    if head.endswith(("ForMaskedLM", "GPT2Model")):
        with torch.no_grad():
            expected = theirs.base_model(torch.tensor(IDS).long()).last_hidden_state.numpy()
        assert relative_error(model.hidden(IDS), expected) <= MODEL_LIMIT
    if head.endswith("ForMaskedLM"):
        with torch.no_grad():
            logits = theirs(torch.tensor(IDS).long()).logits.numpy()
        assert relative_error(model.logits(IDS), logits) <= MODEL_LIMIT


def test_an_output_embedding_that_is_not_tied(torch, reference):
    """As the tensors are, whatever the config says of them."""
    theirs = reference.build(changed(GPT2, tie_word_embeddings=False), seed=1)
    ids = IDS
    with torch.no_grad():
        expected = theirs(torch.tensor(ids).long()).logits.numpy()
    assert relative_error(jaxqkv.load(theirs).logits(ids), expected) <= MODEL_LIMIT
    theirs.config.tie_word_embeddings = True
    with pytest.warns(JaxqkvWarning, match="GPT2LMHeadModel: lm_head.weight differs from transformer.wte.weight"):
        logits = jaxqkv.load(theirs).logits(ids)
    assert relative_error(logits, expected) <= MODEL_LIMIT


def test_later_changes_of_a_model_are_not_seen(torch, reference):
    theirs = reference.build(GPT2, seed=1)
    model = jaxqkv.load(theirs)
    weights = {name: model.weights[name].copy() for name in model.weights.names}
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    for name, values in weights.items():
        np.testing.assert_array_equal(model.weights[name], values)
    assert np.asarray(model.logits(IDS)).any()
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
    assert model.logits(IDS).dtype == jnp.float32


class Exchanged:
    """An array that has `__dlpack__` alone."""

    def __init__(self, values):
        self.__dlpack__, self.__dlpack_device__ = values.__dlpack__, values.__dlpack_device__


@pytest.mark.parametrize(
    ("name", "kind", "form"),
    [
        ("gpt2", np.asarray, "ours"),
        ("gpt2", jnp.asarray, "dict"),
        ("gpt2", Exchanged, "theirs"),
        ("gpt2", "parameter", "ours"),
        ("bert", "parameter", "theirs"),
        ("bert", Exchanged, "dict"),
    ],
)
def test_a_mapping_of_arrays(name, kind, form, tmp_path):
    """With each form of config."""
    config = CONFIGS[name]
    if kind == "parameter":
        torch = pytest.importorskip("torch", exc_type=ImportError)
        kind = lambda x: torch.nn.Parameter(torch.tensor(x))  # noqa: E731
    folder = write_folder(tmp_path / "x", config)
    about = {"ours": config, "dict": config.to_json()}.get(form)
    if form == "theirs":
        transformers = pytest.importorskip("transformers", exc_type=ImportError)
        about = transformers.AutoConfig.from_pretrained(folder)
    tensors = {key: kind(values) for key, values in random_tensors(config).items()}
    model = jaxqkv.load(tensors, config=about)
    assert model.config == config
    np.testing.assert_array_equal(model.hidden(IDS), jaxqkv.load(folder).hidden(IDS))


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


class NotHere(importlib.abc.MetaPathFinder):
    """Fails, not as an import does that somebody may try, where one of two libraries is imported."""

    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] not in ("torch", "transformers"), name


def test_torch_is_not_imported(tmp_path, monkeypatch):
    """Of a mapping of NumPy's arrays, and of a tokenizer of `tokenizers`."""
    folder = write_checkpoint_of_words(tmp_path / "x")
    for name in ("torch", "transformers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [NotHere(), *sys.meta_path])
    checkpoint = jaxqkv.open_checkpoint(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tensors = {key: checkpoint.tensor(key) for key in checkpoint.shapes}
    model = jaxqkv.load(tensors, config=checkpoint.config, tokenizer=tokenizer)
    assert np.isfinite(model.hidden(model.tokenize([MANY_TEXT] * 2))).all()


# --- inside transformations: what is concrete is looked at, and what is traced is not ---


def test_concrete_batches_inside_a_program(tmp_path):
    """Batches in JAX's arrays that are known, and parameters that are not."""
    config, make = changed(BERT, n_layer=2), jnp.asarray
    model = jaxqkv.load(write_folder(tmp_path / "bert", config))
    params, mask = model.params(), np.ones(IDS.shape, np.int32)
    mask[1, 7:] = 0
    whole = {"input_ids": make(IDS), "attention_mask": make(mask)}
    types = jaxqkv.Batch.of(make(IDS), token_types=make(np.random.default_rng(1).integers(0, 2, IDS.shape)))
    layers, shift, capture = make(np.array([1, 0])), make(np.ones(2, np.float32)), {"q", "hidden"}

    @jax.jit
    def inside(params):
        acts = jaxqkv.forward(params, types, config, capture=capture, layers=layers)
        assert acts.layers == (1, 0)
        reduced = jaxqkv.forward(
            params, make(IDS), config, reduce=lambda a, mask, shift: a.q.sum((1, 2, 3)) + shift, inputs=shift, layers=0
        )
        rows = jax.vmap(lambda row: jaxqkv.hidden(params, row[None], config))(make(IDS))
        return acts.q, reduced, rows[:, 0]

    expected, plain = model.run(whole, capture=capture).hidden, model.run(IDS, capture=capture)
    limit = MODEL_LIMIT * float(np.abs(expected).max())
    # Of two checkpoints, which here are one.
    twice = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), jax.device_get(params))
    hidden = jax.jit(jax.vmap(lambda params: jaxqkv.hidden(params, whole, config)))(twice)
    np.testing.assert_allclose(hidden, np.stack([expected, expected]), atol=limit)
    q, reduced, rows = inside(params)
    assert relative_error(q, model.run(types, capture=capture, layers=[1, 0]).q) <= MODEL_LIMIT
    assert relative_error(reduced, np.asarray(plain.q)[:1].sum((2, 3, 4)) + 1) <= MODEL_LIMIT
    np.testing.assert_allclose(rows, plain.hidden, atol=limit)


ONES, TWOS = (jnp.asarray(np.full((1, 3), value, np.int32)) for value in (1, 2))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (jnp.asarray(np.full((1, 3), 43, np.int32)), "token ids reach from 43 to 43"),
        ({"ids": ONES, "mask": TWOS}, "an integer mask is 1 at real tokens"),
        ({"ids": ONES, "token_types": TWOS}, "token_types reach from 2 to 2"),
    ],
)
def test_wrong_values_inside_a_program_are_refused_by_name(gpt2_model, batch, message):
    with pytest.raises(JaxqkvError, match=message):
        jax.jit(lambda params: jaxqkv.hidden(params, batch, GPT2))(gpt2_model.params())


def test_the_check_of_a_reducer_needs_values(gpt2_model):
    ids = IDS
    run = jax.jit(lambda p: jaxqkv.forward(p, ids, GPT2, reduce=lambda a, mask: a.q.sum((1, 2, 3)), check=True))
    with pytest.raises(JaxqkvError, match="`check` compares values, which are unknown inside"):
        run(gpt2_model.params())


def test_numbers_of_layers_of_weights_inside_a_program(gpt2_model):
    several = jnp.asarray(np.array([2, 0]))
    inside = jax.jit(lambda x: x @ gpt2_model.weights.W_Q(several)[0])(np.eye(35, dtype=np.float32))
    np.testing.assert_allclose(inside, gpt2_model.weights.W_Q(2), atol=1e-6)


def test_a_given_folder_still_works(tmp_path):
    assert jaxqkv.load(write_folder(tmp_path / "x", GPT2)).config == GPT2
