import json

import ml_dtypes
import numpy as np
import pytest
from conftest import BERT, GPT2, changed, random_tensors, write_folder
from safetensors.numpy import save_file

import jaxqkv
from jaxqkv.checkpoints.checkpoint import MappedFile, fingerprint, open_checkpoint
from jaxqkv.checkpoints.weights import Weights
from jaxqkv.errors import CheckpointError


def weights_of(path):
    return Weights(open_checkpoint(path))


def refusal(path):
    with pytest.raises(CheckpointError) as error:
        jaxqkv.load(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tensors_come_as_they_were_saved(config, folder):
    weights = weights_of(folder)
    for key, tensor in random_tensors(config).items():
        np.testing.assert_array_equal(weights[key], tensor)
        assert not weights[key].flags.writeable
    assert sorted(weights.names) == sorted(random_tensors(config))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_dtypes_become_float32(config, tmp_path, dtype):
    tensors = {key: tensor.astype(dtype) for key, tensor in random_tensors(config).items()}
    weights = weights_of(write_folder(tmp_path / "x", config, tensors))
    for key, tensor in tensors.items():
        assert weights[key].dtype == np.float32
        np.testing.assert_array_equal(weights[key], tensor.astype(np.float32))


def test_prefix_buffers_and_heads_are_known():
    """`resolve` on the key lists of real files."""
    resolve = jaxqkv.checkpoints.tables.resolve
    gpt2 = {key: rule.shape for key, rule in jaxqkv.checkpoints.tables.table(GPT2).rules(GPT2.n_layer).items()}
    buffers = {f"h.{i}.attn.{name}": (1, 1, 17, 17) for i in range(3) for name in ("bias", "masked_bias")}
    assert resolve(GPT2, gpt2 | buffers, "x") == {key: key for key in gpt2}
    prefixed = {f"transformer.{key}": shape for key, shape in (gpt2 | buffers).items()} | {"lm_head.weight": (43, 35)}
    assert resolve(GPT2, prefixed, "x") == {key: f"transformer.{key}" for key in gpt2}

    bert = {key: rule.shape for key, rule in jaxqkv.checkpoints.tables.table(BERT).rules(BERT.n_layer).items()}
    old = {
        "bert." + key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): shape
        for key, shape in bert.items()
    }
    extras = {
        "bert.embeddings.position_ids": (1, 17),
        "bert.pooler.dense.weight": (35, 35),
        "cls.predictions.bias": (43,),
        "cls.predictions.transform.LayerNorm.gamma": (35,),
        "cls.seq_relationship.weight": (2, 35),
    }
    found = resolve(BERT, old | extras, "x")
    assert found["encoder.layer.2.output.LayerNorm.weight"] == "bert.encoder.layer.2.output.LayerNorm.gamma"
    assert sorted(found) == sorted(bert)


def test_all_that_is_wrong_with_the_keys_is_listed_at_once(tmp_path):
    tensors = random_tensors(GPT2)
    del tensors["h.1.ln_1.bias"], tensors["wpe.weight"]
    tensors["h.0.attn.c_attn.weight"] = tensors["h.0.attn.c_attn.weight"].T.copy()
    tensors["h.7.mlp.c_fc.bias"] = np.zeros(29, np.float32)
    tensors["transformer.ln_f.bias"] = np.zeros(35, np.float32)
    message = refusal(write_folder(tmp_path / "x", GPT2, tensors))
    assert "missing h.1.ln_1.bias [35]" in message
    assert "missing wpe.weight [17, 35]" in message
    assert "wrong shape h.0.attn.c_attn.weight [105, 35], config says [35, 105]" in message
    assert "unexpected h.7.mlp.c_fc.bias [29]" in message
    assert "repeated" in message
    assert "ln_f.bias" in message


def test_sharded(config, tmp_path):
    folder = write_sharded(tmp_path / "x", config)
    weights = weights_of(folder)
    for key, tensor in random_tensors(config).items():
        np.testing.assert_array_equal(weights[key], tensor)


def write_sharded(folder, config, rename=lambda name: name):
    write_folder(folder, config)
    tensors = random_tensors(config)
    (folder / "model.safetensors").unlink()
    places = {key: f"model-{index % 2 + 1:05d}-of-00002.safetensors" for index, key in enumerate(tensors)}
    for name in set(places.values()):
        save_file({key: tensors[key] for key in tensors if places[key] == name}, folder / name)
    index = {"metadata": {}, "weight_map": {key: rename(name) for key, name in places.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../b", "..\\b", "C:b"])
def test_an_index_cannot_leave_its_folder(tmp_path, name):
    folder = write_sharded(tmp_path / "x", GPT2, rename=lambda _: name)
    assert "names a file outside its folder" in refusal(folder)


def test_broken_indexes(tmp_path):
    folder = write_sharded(tmp_path / "x", GPT2)
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": places | {"ghost.weight": "model-00001-of-00002.safetensors"}}))
    assert "the index places ghost.weight here" in refusal(folder)
    index.write_text(json.dumps({"weight_map": places | {"wte.weight": "model-00009.safetensors"}}))
    assert "names files that are not there: model-00009.safetensors" in refusal(folder)
    for text in ("{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": ["b"]}}'):
        index.write_text(text)
        assert "not a readable index" in refusal(folder)


def test_pickles_are_never_opened(tmp_path):
    folder = write_folder(tmp_path / "x", GPT2)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "only pytorch_model.bin, and pickles are never opened" in message
    assert "save_pretrained" in message
    (folder / "pytorch_model.bin").unlink()
    assert "no model.safetensors and no model.safetensors.index.json" in refusal(folder)


def test_only_the_tensor_asked_for_is_read(tmp_path, monkeypatch):
    weights = weights_of(write_folder(tmp_path / "x", GPT2))
    read = []
    original = MappedFile.tensor
    monkeypatch.setattr(MappedFile, "tensor", lambda self, key: read.append(key) or original(self, key))
    weights.W_Q(1)
    assert read == ["h.1.attn.c_attn.weight"]


def test_random_weights_depend_on_seed_and_key_only():
    one, same, other = (open_checkpoint("random:gpt2", seed=seed) for seed in (3, 3, 4))
    key = "h.5.attn.c_proj.weight"
    same.tensor("h.5.attn.c_attn.weight")  # the order of reading does not matter
    np.testing.assert_array_equal(one.tensor(key), same.tensor(key))
    assert np.abs(one.tensor(key) - other.tensor(key)).max() > 0.01


def test_random_weights_are_distributed_as_initialised():
    gpt2 = open_checkpoint("random:gpt2")
    assert gpt2.tensor("h.0.attn.c_attn.weight").std() == pytest.approx(0.02, rel=0.01)
    assert gpt2.tensor("h.0.mlp.c_proj.weight").std() == pytest.approx(0.02 / 24**0.5, rel=0.01)
    assert (gpt2.tensor("h.0.ln_1.weight") == 1).all()
    assert (gpt2.tensor("h.0.ln_1.bias") == 0).all()
    assert not gpt2.tensor("wpe.weight").flags.writeable
    bert = open_checkpoint("random:bert-base-uncased")
    assert bert.tensor("encoder.layer.3.output.dense.weight").shape == (768, 3072)
    assert bert.tensor("encoder.layer.3.output.dense.weight").std() == pytest.approx(0.02, rel=0.01)


def test_random_from_a_folder_takes_its_architecture(config, folder):
    checkpoint = open_checkpoint(f"random:{folder}")
    assert checkpoint.config == config
    assert checkpoint.name == f"random:{folder.name}"
    assert Weights(checkpoint).names == Weights(open_checkpoint(folder)).names


def test_random_of_nothing():
    for spec in ("random:", "random:random:gpt2"):
        with pytest.raises(CheckpointError, match="expected a checkpoint after 'random:'"):
            open_checkpoint(spec)


def test_untied_output_embedding_is_needed(tmp_path):
    untied = changed(GPT2, tie_word_embeddings=False)
    message = refusal(write_folder(tmp_path / "x", untied, random_tensors(GPT2)))
    assert "x: model.safetensors: tensors do not fit config.json: missing lm_head.weight [43, 35]" in message


def test_fingerprint(tmp_path):
    path = tmp_path / "file"
    content = np.random.default_rng(0).bytes(5 << 20)
    path.write_bytes(content)
    before = fingerprint(path)
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert before.startswith("sampled-sha256:")
    assert fingerprint(path) != before
    path.write_bytes(content)
    assert fingerprint(path) == before
