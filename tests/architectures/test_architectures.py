"""RoBERTa and DistilBERT with every command and the studies of weights; DistilBERT with those of activations, too."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import (
    CONFIGS,
    DISTILBERT,
    MODEL_LIMIT,
    ROBERTA,
    changed,
    figures_of,
    random_ids,
    random_tensors,
    relative_error,
    write_folder,
    write_word_tokenizer,
)
from helpers.checkpoints import WORDS
from helpers.oracles import cosine
from safetensors import safe_open

import jaxqkv
from jaxqkv.architectures import REGISTRY
from jaxqkv.architectures.roberta import CamembertConfig, XLMRobertaConfig
from jaxqkv.cli.main import main
from jaxqkv.errors import CheckpointError

NEW = ("roberta", "distilbert")
SAME_CLASS = {"xlm-roberta": XLMRobertaConfig, "camembert": CamembertConfig}


@pytest.fixture(scope="module", params=NEW)
def folder(request, tmp_path_factory):
    """A checkpoint with a tokenizer of whole words."""
    config = changed(CONFIGS[request.param], n_positions=61, initializer_range=0.2)
    path = write_folder(tmp_path_factory.mktemp("new") / request.param, config)
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return write_word_tokenizer(path, [*WORDS, *(f" w{number}" for number in range(36))])


@pytest.fixture(scope="module")
def model(folder):
    return jaxqkv.load(folder)


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


def test_distilbert_has_no_token_types():
    batch = jaxqkv.Batch(ids=np.ones((1, 3), np.int32), mask=np.ones((1, 3), bool), token_types=np.ones((1, 3), int))
    params = {"embed": {}, "layers": [], "final": {}}
    with pytest.raises(jaxqkv.JaxqkvError, match=r"0 alone \(distilbert\)"):
        jaxqkv.forward(params, batch, DISTILBERT)


TEXT = "a cat saw her run home"


def tensor(folder, layer, name):
    """A tensor of a layer by the end of its name, as a matrix `[in, out]`."""
    with safe_open(folder / "model.safetensors", "numpy") as file:
        (key,) = (key for key in file.keys() if f"layer.{layer}." in key and key.endswith(name))  # noqa: SIM118
        return file.get_tensor(key).T


def test_qkv_weights(folder, tmp_path):
    names = ("q_lin", "k_lin", "v_lin") if folder.name == "distilbert" else ("query", "key", "value")
    figures = figures_of("qkv-weights", tmp_path, folder, "2a", "2d")
    wide = np.concatenate([tensor(folder, 1, f"{name}.weight") for name in names], axis=1)
    np.testing.assert_array_equal(figures["2a"]["weights"], wide)
    means = [[tensor(folder, layer, f"{name}.weight").mean(dtype=np.float64) for name in names] for layer in range(3)]
    np.testing.assert_allclose(figures["2d"]["mean"], means, rtol=0, atol=1e-6)


# Studies of activations see a run, whose architecture test_parity.py checks.
OF_ACTIVATIONS = pytest.mark.parametrize("folder", ["distilbert"], indirect=True)


@OF_ACTIVATIONS
def test_attention_scores(folder, model, tmp_path):
    figures = figures_of("attention-scores", tmp_path, folder, "3", "9", "--text", TEXT)
    acts = model.run(model.tokenize(TEXT), capture={"q", "scores"})
    assert relative_error(figures["3"]["q"], np.asarray(acts.q)[1, 0]) <= MODEL_LIMIT
    mean = np.asarray(acts.scores)[1, 0].mean(axis=0)
    np.testing.assert_allclose(figures["9"]["mean_of_heads"], mean, rtol=0, atol=1e-5)


@OF_ACTIVATIONS
def test_token_frequency(folder, tmp_path):
    words = [*WORDS[1:], *(f" w{number}" for number in range(36))]
    (tmp_path / "texts").mkdir()
    texts = ["a" + "".join(np.random.default_rng(seed).choice(words, 30)) for seed in range(3)]
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    sizes = ["--tokens", "50", "--batch", "2", "--length", "7", "--no-cache"]
    figures = figures_of("token-frequency", tmp_path, folder, "1", "4a", "--corpus", str(tmp_path / "texts"), *sizes)
    # Whole documents are counted, until there are 50 tokens.
    batch = jaxqkv.load(folder).tokenize(texts[:2])
    ids = np.asarray(batch.ids)[np.asarray(batch.mask)]
    np.testing.assert_array_equal(figures["1"]["counts"], np.bincount(ids, minlength=43))
    assert np.isfinite(figures["4a"]["adjustment"]).all()


def test_weight_tour(folder, tmp_path):
    figures = figures_of("weight-tour", tmp_path, folder, "positions", "architecture")
    (key,) = (key for key in random_tensors(CONFIGS[folder.name]) if "position_embeddings" in key)
    with safe_open(folder / "model.safetensors", "numpy") as file:
        np.testing.assert_array_equal(figures["positions"]["positions"], file.get_tensor(key))
        assert figures["architecture"]["total"] == sum(file.get_tensor(key).size for key in file.keys())  # noqa: SIM118


@OF_ACTIVATIONS
def test_token_similarity(folder, model, tmp_path):
    sentences = ("a cat saw her run", "a run saw her home", "a cat run her home")
    (tmp_path / "sentences.txt").write_text("\n".join(sentences))
    line = ["means", "cosine", "--sentences", str(tmp_path / "sentences.txt")]
    figures = figures_of("token-similarity", tmp_path, folder, *line)
    acts = model.run(model.tokenize(list(sentences)), capture={"q", "k", "v"}, layers=1)
    # " her" is the fourth token of each.
    target = np.concatenate([np.asarray(x[0, :, :, 3], np.float64).reshape(3, -1) for x in (acts.q, acts.k, acts.v)], 1)
    np.testing.assert_allclose(figures["means"]["mean"], target.mean(axis=0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(figures["cosine"]["similarity"], cosine(target), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("folder", "spec"), [("roberta", "{}"), ("distilbert", "{}"), ("roberta", "random:{}")], indirect=["folder"]
)
def test_verify(folder, tmp_path, spec, capsys):
    pytest.importorskip("torch", exc_type=ImportError)
    path = tmp_path / "verify.json"
    assert main(["verify", spec.format(folder), "--text", TEXT, "a cat", "--out", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["passed"]
    assert max(report["tensors"]["pattern"]["difference"]) < 2e-5
    assert "passed: " in capsys.readouterr().out


def test_view(folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["view", str(folder), "--text", TEXT, "--out", str(page)]) == 0
    assert f"{folder.name}: 6 tokens, 3 layers of 5 heads" in capsys.readouterr().out


def test_info(folder, capsys):
    assert main(["info", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["config"]["model_type"] == folder.name
    assert facts["parameters"]["all"] == sum(
        values.size for values in random_tensors(changed(CONFIGS[folder.name], n_positions=61)).values()
    )
