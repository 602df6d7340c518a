import json

import ml_dtypes
import numpy as np
import pytest
from conftest import BERT, GPT2, changed, random_tensors, write_folder
from helpers.checkpoints import write_sharded
from safetensors.numpy import load_file, save_file

import jaxqkv
from jaxqkv.architectures import open_checkpoint
from jaxqkv.checkpoints.mapped import MappedFile
from jaxqkv.checkpoints.weights import Weights
from jaxqkv.cli.main import main
from jaxqkv.errors import CheckpointError, JaxqkvWarning
from jaxqkv.runtime.files import fingerprint


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
    gpt2 = {key: rule.shape for key, rule in GPT2.table().rules(GPT2.n_layer).items()}
    buffers = {f"h.{i}.attn.{name}": (1, 1, 17, 17) for i in range(3) for name in ("bias", "masked_bias")}
    assert resolve(GPT2.table(), GPT2.n_layer, gpt2 | buffers, "x") == {key: key for key in gpt2}
    prefixed = {f"transformer.{key}": shape for key, shape in (gpt2 | buffers).items()} | {"lm_head.weight": (43, 35)}
    own = {"lm_head.weight": "lm_head.weight"}  # whose values decide whether it is the token embedding
    assert resolve(GPT2.table(), GPT2.n_layer, prefixed, "x") == {key: f"transformer.{key}" for key in gpt2} | own

    bert = {key: rule.shape for key, rule in BERT.table().rules(BERT.n_layer).items()}
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
    found = resolve(BERT.table(), BERT.n_layer, old | extras, "x")
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


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../b", "..\\b", "C:b"])
def test_an_index_cannot_leave_its_folder(tmp_path, name):
    folder = write_sharded(tmp_path / "x", GPT2, rename=lambda _: name)
    assert "names a file outside its folder" in refusal(folder)


def change_index(folder, **places):
    """Other places in the index; None takes a tensor out."""
    path = folder / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"] | places
    path.write_text(json.dumps({"weight_map": {key: name for key, name in places.items() if name is not None}}))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def test_broken_indexes(tmp_path):
    folder = write_sharded(tmp_path / "x", GPT2)
    index = folder / "model.safetensors.index.json"
    change_index(folder, **{"wte.weight": "model-00009.safetensors"})
    (folder / FIRST).rename(folder / "elsewhere")
    message = refusal(folder)
    assert "wte.weight [43, 35] (the index places it in model-00009.safetensors, which does not exist)" in message
    assert "missing h.0.ln_1.weight [35], " in message
    assert f", and 7 more (the index places it in {FIRST}, which does not exist)" in message
    assert "wpe.weight" not in message
    (folder / SECOND).unlink()
    assert f"names files that do not exist: model-00009.safetensors, {SECOND}, {FIRST}" in refusal(folder)
    for text in ("{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": ["b"]}}'):
        index.write_text(text)
        assert "not a readable index" in refusal(folder)


def without(folder, key):
    """Takes a tensor out of the file that has it."""
    for path in folder.glob("*.safetensors"):
        if key in (tensors := load_file(path)):
            save_file({name: values for name, values in tensors.items() if name != key}, path)


def test_a_tensor_that_no_file_has(tmp_path):
    folder = write_sharded(tmp_path / "x", GPT2)
    without(folder, "wte.weight")
    message = refusal(folder)
    assert message.endswith(f"missing wte.weight [43, 35] (the index places it in {FIRST}, which does not have it)")


@pytest.mark.parametrize(
    "places",
    [
        {"ghost.weight": FIRST},
        {"ghost.weight": "model-00009.safetensors"},
        {"h.7.ln_1.weight": "h7.safetensors", "wpe.weight": SECOND},
        {"wte.weight": None, "h.1.attn.c_attn.weight": None},
        {"wte.weight": SECOND},
        {"wte.weight": "model-00009.safetensors"},
    ],
    ids=["stale", "no file", "no layer", "unnamed", "in another file", "in another file than one that is gone"],
)
def test_an_index_that_is_wrong_about_what_is_there(tmp_path, places):
    """Every tensor that is needed is there, so that all are read."""
    folder = write_sharded(tmp_path / "x", GPT2)
    change_index(folder, **places)
    weights = weights_of(folder)
    for key, tensor in random_tensors(GPT2).items():
        np.testing.assert_array_equal(weights[key], tensor)


@pytest.mark.parametrize(("named", "other"), [(FIRST, SECOND), (SECOND, FIRST)])
def test_a_tensor_in_two_files_is_that_of_the_index_and_named(tmp_path, named, other):
    folder = write_sharded(tmp_path / "x", GPT2)
    right = random_tensors(GPT2)["wte.weight"]
    for name, factor in ((named, 1), (other, 3)):
        save_file(load_file(folder / name) | {"wte.weight": factor * right}, folder / name)
    change_index(folder, **{"wte.weight": named})
    with pytest.warns(JaxqkvWarning, match=f"index.json: wte.weight is in {other} too, but taken from {named}$"):
        weights = weights_of(folder)
    np.testing.assert_array_equal(weights["wte.weight"], right)


@pytest.mark.parametrize("name", ["model.safetensors", FIRST, "model.safetensors.index.json"])
def test_a_pointer_of_git_lfs(tmp_path, name):
    folder = write_folder(tmp_path / "x", GPT2) if name == "model.safetensors" else write_sharded(tmp_path / "x", GPT2)
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n")
    assert (
        refusal(folder) == f"{folder / name}: a Git LFS pointer instead of the file; run `git lfs pull` in its folder"
    )


# --- tensors under another name, and tensors of other heads ---

TIED = {
    "gpt2": ("wte.weight", "lm_head.weight", "transformer."),
    "bert": ("embeddings.word_embeddings.weight", "cls.predictions.decoder.weight", "bert."),
}


@pytest.mark.parametrize("prefixed", [False, True], ids=["bare", "prefixed"])
def test_a_tied_tensor_under_its_other_name(config, tmp_path, prefixed):
    key, other, prefix = TIED[config.model_type]
    tensors = {(prefix if prefixed else "") + name: each for name, each in random_tensors(config).items()}
    tensors[other] = tensors.pop(prefix + key if prefixed else key)
    model = jaxqkv.load(write_folder(tmp_path / "x", config, tensors))
    np.testing.assert_array_equal(model.weights[key], tensors[other])
    assert model.weights.left_out == []
    assert sorted(model.weights.names) == sorted(random_tensors(config))
    ids = np.random.default_rng(0).integers(0, 43, (2, 5))
    plain = jaxqkv.load(write_folder(tmp_path / "plain", config))
    np.testing.assert_array_equal(model.hidden(ids), plain.hidden(ids))
    if config is GPT2:
        np.testing.assert_array_equal(model.logits(ids), plain.logits(ids))
    # Where they are said not to be the same, one cannot be taken for the other.
    untied = write_folder(tmp_path / "untied", changed(config, tie_word_embeddings=False), tensors)
    assert f"missing {key} [43, 35]" in refusal(untied)


def test_what_lacks_the_prefix_is_a_head(config, tmp_path, capsys):
    prefix = TIED[config.model_type][2]
    tensors = {prefix + name: each for name, each in random_tensors(config).items()}
    heads = {"v_head.summary.weight": 3, "v_head.summary.bias": 1, "qa_outputs.weight": 2, "linear.bias": 5}
    heads |= {"crf.transitions": 7, "h.9.own": 2}
    tensors |= {key: np.zeros(size, np.float32) for key, size in heads.items()}
    folder = write_folder(tmp_path / "x\ny", config, tensors)
    weights = weights_of(folder)
    assert sorted(weights.left_out) == sorted(heads)
    assert sorted(weights.names) == sorted(random_tensors(config))
    assert main(["info", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{'checkpoint:':22}{tmp_path}/x\\ny"  # the name's line break as an escape sequence
    line = next(line for line in lines if line.startswith("left out:"))
    assert sorted(line.removeprefix("left out:").strip().split(", ")) == [
        "crf (1 tensor)", "h (1 tensor)", "linear (1 tensor)", "qa_outputs (1 tensor)", "v_head (2 tensors)",
    ]  # fmt: skip
    assert main(["info", str(folder), "--json"]) == 0
    assert sorted(json.loads(capsys.readouterr().out)["left out"]) == sorted(heads)


@pytest.mark.parametrize("prefixed", [False, True], ids=["bare", "prefixed"])
def test_inside_the_backbone_nothing_is_left_out(config, tmp_path, prefixed):
    prefix = TIED[config.model_type][2] if prefixed else ""
    tensors = {prefix + name: each for name, each in random_tensors(config).items()}
    tensors[f"{prefix}adapter.weight"] = np.zeros(3, np.float32)
    message = refusal(write_folder(tmp_path / "x", config, tensors))
    assert message.endswith(f"tensors do not fit config.json: unexpected {prefix}adapter.weight [3]")


def test_buffers_are_no_heads_and_are_not_listed(tmp_path):
    tensors = random_tensors(GPT2) | {"h.0.attn.bias": np.zeros((1, 1, 17, 17), np.float32)}
    weights = weights_of(write_folder(tmp_path / "x", GPT2, tensors))
    assert weights.left_out == []
    assert "left out" not in weights.summary()


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
