"""RoBERTa and DistilBERT with every command and study; architectures from outside the package."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import (
    CONFIGS,
    DISTILBERT,
    ROBERTA,
    changed,
    random_ids,
    random_tensors,
    write_folder,
    write_word_tokenizer,
)
from helpers.checkpoints import WORDS

import jaxqkv
from jaxqkv.architectures import REGISTRY
from jaxqkv.architectures.roberta import CamembertConfig, XLMRobertaConfig
from jaxqkv.errors import CheckpointError

NEW = ("roberta", "distilbert")
SAME_CLASS = {"xlm-roberta": XLMRobertaConfig, "camembert": CamembertConfig}


@pytest.fixture(scope="module", params=NEW)
def folder(request, tmp_path_factory):
    """A checkpoint with a tokenizer of whole words."""
    config = changed(CONFIGS[request.param], vocab_size=len(WORDS), n_positions=61, initializer_range=0.2)
    path = write_folder(tmp_path_factory.mktemp("new") / request.param, config)
    return write_word_tokenizer(path, WORDS)


@pytest.mark.parametrize("name", NEW)
def test_a_config_is_read_as_it_is_written(name):
    assert REGISTRY.parse(CONFIGS[name].to_json(), "here") == CONFIGS[name]


def test_positions_of_roberta_begin_after_the_padding_index():
    """The file's max_position_embeddings counts the rows before, which belong to no token."""
    data = ROBERTA.to_json()
    assert data["max_position_embeddings"] == ROBERTA.n_positions + 3
    assert REGISTRY.known["roberta-base"].to_json()["max_position_embeddings"] == 514
    with pytest.raises(CheckpointError, match="max_position_embeddings = 3 leaves no position after pad_token_id = 2"):
        REGISTRY.parse(data | {"max_position_embeddings": 3}, "here")
    del data["pad_token_id"]
    with pytest.raises(CheckpointError, match='pad_token_id is missing; add "pad_token_id": 1'):
        REGISTRY.parse(data, "here")


@pytest.mark.parametrize("name", SAME_CLASS)
def test_the_same_class_under_another_name(name, tmp_path):
    """XLM-RoBERTa and CamemBERT compute what RoBERTa does."""
    other = SAME_CLASS[name](**dataclasses.asdict(ROBERTA))
    tensors = random_tensors(ROBERTA)
    folders = [write_folder(tmp_path / each.model_type, each, tensors) for each in (ROBERTA, other)]
    assert json.loads((folders[1] / "config.json").read_text())["model_type"] == name
    ids = random_ids(ROBERTA, 2, 11)
    one, two = (np.asarray(jaxqkv.load(folder).hidden(ids)) for folder in folders)
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_changes_nothing(folder, padding_side):
    model = jaxqkv.load(folder)
    alone = np.asarray(model.hidden(model.tokenize(" w1 w2 w3")))
    padded = model.tokenize([" w1 w2 w3", " w1 w2 w3 w1 w2"], padding_side=padding_side)
    row = np.asarray(model.hidden(padded))[0][np.asarray(padded.mask[0])]
    np.testing.assert_allclose(row, alone[0], rtol=0, atol=1e-5 * np.abs(alone).max())


def test_distilbert_has_no_token_types():
    batch = jaxqkv.Batch(ids=np.ones((1, 3), np.int32), mask=np.ones((1, 3), bool), token_types=np.ones((1, 3), int))
    params = {"embed": {}, "layers": [], "final": {}}
    with pytest.raises(jaxqkv.JaxqkvError, match=r"0 alone \(distilbert\)"):
        jaxqkv.forward(params, batch, DISTILBERT)
