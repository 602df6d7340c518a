"""Logits of the heads that predict masked tokens: those of transformers, for each way that files store them."""

import numpy as np
import pytest
from conftest import CONFIGS, MODEL_LIMIT, changed, random_ids, relative_error, write_folder
from helpers.oracles import masked_batch

import jaxqkv
from jaxqkv import edits, metrics
from jaxqkv.errors import CheckpointError, JaxqkvError, JaxqkvWarning

torch = pytest.importorskip("torch", exc_type=ImportError)
transformers = pytest.importorskip("transformers", exc_type=ImportError)

POS = 11
MASK = np.ones((2, POS), bool)
MASK[0, 5:] = False
NAMES = ("bert", "roberta", "distilbert")


def of_transformers(config, tied=True):
    """A `…ForMaskedLM` whose weights are all random, and its tensors."""
    about = config.counterpart
    settings = {key: value for key, value in config.to_json().items() if key not in ("model_type", "architectures")}
    settings |= dict(about.settings) | {"tie_word_embeddings": tied}
    theirs = getattr(transformers, about.config)(**settings, attn_implementation="eager")
    model = getattr(transformers, about.head_model[0])(theirs).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise + 1 if name.endswith("weight") and parameter.ndim == 1 else noise)
    return model, {key: value.numpy().copy() for key, value in model.state_dict().items()}


def logits_of(model, config, ids):
    mask = torch.tensor(MASK).long()
    arguments = {"input_ids": torch.tensor(ids).long(), "attention_mask": mask}
    if config.counterpart.positions:
        arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0) + config.first_position
    with torch.no_grad():
        return model(**arguments).logits.numpy()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_are_those_of_transformers(name, tied, tmp_path):
    config = CONFIGS[name]
    theirs, tensors = of_transformers(config, tied)
    decoder = next(key for key in tensors if key.endswith(("decoder.weight", "projector.weight")))
    if tied:  # as files are: the decoder is not stored twice
        tensors.pop(decoder)
    config = changed(config, tie_word_embeddings=tied)
    model = jaxqkv.load(write_folder(tmp_path / "x", config, tensors))
    ids = random_ids(config, 2, POS)
    batch = masked_batch(ids, MASK)
    expected = logits_of(theirs, config, ids)
    found = model.logits(batch)
    assert found.shape == (2, POS, config.vocab_size)
    assert relative_error(np.asarray(found)[MASK], expected[MASK]) <= MODEL_LIMIT
    pure = jaxqkv.logits(model.params(), batch, config)
    assert relative_error(pure, found) <= MODEL_LIMIT
    streamed = jaxqkv.load(tmp_path / "x", stream=True).logits(batch)
    assert relative_error(streamed, found) <= MODEL_LIMIT


def test_logits_are_captured_and_measured(tmp_path):
    """Beside fields of layers, and in a sweep over what the model says in the place of a token."""
    config = CONFIGS["bert"]
    _, tensors = of_transformers(config)
    model = jaxqkv.load(write_folder(tmp_path / "x", config, tensors))
    batch = masked_batch(random_ids(config, 2, POS), MASK)
    found = model.logits(batch)
    captured = model.run(batch, capture={"logits", "q"})
    assert captured.q.shape == (3, 2, 5, POS, 7)
    assert relative_error(captured.logits, found) <= MODEL_LIMIT
    metric = metrics.log_probability(9, positions=3)
    swept = model.sweep(batch, edits.zero, metric, layers=1, per_text=True)
    edited = np.asarray(model.logits(batch, edit={"z": edits.zero([(1, 2)])}), np.float64)[:, 3]
    expected = edited[:, 9] - np.log(np.exp(edited).sum(-1))
    np.testing.assert_allclose(swept[:, 0, 2], expected, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_that_is_stored_too(name, tmp_path):
    """With the values of the token embedding it is that; with others it counts, and a warning says so."""
    config = CONFIGS[name]
    theirs, tensors = of_transformers(config)
    ids = random_ids(config, 2, POS)
    batch = masked_batch(ids, MASK)
    expected = logits_of(theirs, config, ids)
    same = jaxqkv.load(write_folder(tmp_path / "same", config, tensors))
    assert relative_error(np.asarray(same.logits(batch))[MASK], expected[MASK]) <= MODEL_LIMIT
    decoder = next(key for key in tensors if key.endswith(("decoder.weight", "projector.weight")))
    model = jaxqkv.load(write_folder(tmp_path / "other", config, tensors | {decoder: -tensors[decoder]}))
    bias = next(tensors[key] for key in tensors if key.endswith(("predictions.bias", "lm_head.bias", "projector.bias")))
    with pytest.warns(JaxqkvWarning, match="differs from"):
        found = np.asarray(model.logits(batch))
    assert relative_error((found - bias)[MASK], -(expected - bias)[MASK]) <= MODEL_LIMIT


def test_a_bias_under_its_other_name(tmp_path):
    config = CONFIGS["bert"]
    theirs, tensors = of_transformers(config)
    tensors["cls.predictions.decoder.bias"] = tensors.pop("cls.predictions.bias")
    ids = random_ids(config, 2, POS)
    found = jaxqkv.load(write_folder(tmp_path / "x", config, tensors)).logits(masked_batch(ids, MASK))
    assert relative_error(np.asarray(found)[MASK], logits_of(theirs, config, ids)[MASK]) <= MODEL_LIMIT


@pytest.mark.parametrize("name", NAMES)
def test_heads_that_are_not_there_or_broken(name, tmp_path):
    config = CONFIGS[name]
    ids = random_ids(config, 2, POS)
    with pytest.raises(
        JaxqkvError, match=f"{name} has no next-token logits, and this checkpoint no head that predicts"
    ):
        jaxqkv.load(write_folder(tmp_path / "none", config)).logits(ids)
    _, tensors = of_transformers(config)
    norm = next(
        key for key in tensors if key.endswith(("transform.LayerNorm.bias", "layer_norm.bias")) and "layer." not in key
    )
    part = jaxqkv.load(write_folder(tmp_path / "part", config, {key: x for key, x in tensors.items() if key != norm}))
    part.hidden(ids)
    part.params()
    with pytest.raises(CheckpointError, match=f"the head that predicts masked tokens is broken: missing {norm}"):
        part.logits(ids)
    shaped = jaxqkv.load(write_folder(tmp_path / "shape", config, tensors | {norm: np.zeros(3, np.float32)}))
    with pytest.raises(CheckpointError, match=rf"wrong shape {norm} \[3\], not \[35\]"):
        shaped.logits(ids)
    untied = changed(config, tie_word_embeddings=False)
    decoder = next(key for key in tensors if key.endswith(("decoder.weight", "projector.weight")))
    alone = jaxqkv.load(
        write_folder(tmp_path / "alone", untied, {key: x for key, x in tensors.items() if key != decoder})
    )
    with pytest.raises(CheckpointError, match=f"missing {decoder}, which config.json does not tie"):
        alone.logits(ids)


def test_the_demo_has_such_a_head():
    model = jaxqkv.load("demo-bert")
    ids = np.asarray(model.tokenize("She said that it was the end of the [MASK], and he went out.").ids)
    theirs = transformers.BertForMaskedLM.from_pretrained(
        model.checkpoint.folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids).long()).logits.numpy()
    assert relative_error(model.logits(ids), expected) <= MODEL_LIMIT
