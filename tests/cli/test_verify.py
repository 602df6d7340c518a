"""`jaxqkv verify`: what it calls a difference, what it calls a failure."""

import contextlib
import json
import sys

import jax
import numpy as np
import pytest
from conftest import BERT, GPT2, MODEL_LIMIT, changed, random_tensors, write_folder, write_word_tokenizer
from helpers.broken import SPOILT, WORDS, spoil, tensors
from helpers.checkpoints import MANY_WORDS, write_checkpoint_of_words
from helpers.tokenizer_cases import write

import jaxqkv
from jaxqkv.architectures import open_checkpoint
from jaxqkv.cli.main import main
from jaxqkv.errors import JaxqkvWarning
from jaxqkv.model import comparison
from jaxqkv.studies.stimuli import stimuli

pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("transformers", exc_type=ImportError)
from jaxqkv.model import torch_reference


def compared(folder, dtype="float32"):
    checkpoint = open_checkpoint(folder)
    batch = comparison.batch_of(checkpoint, [], None)
    assert batch.mask.sum(axis=1).tolist() == [17, 8]
    return {each.name: each for each in comparison.compare(checkpoint, batch, dtype)}


@pytest.fixture
def gpt2(tmp_path):
    return write_folder(tmp_path / "gpt2", GPT2)


def test_both_architectures_pass_in_both_precisions(folder, config):
    results = compared(folder)
    logits = config.model_type == "gpt2"
    assert tuple(results) == (comparison.TENSORS if logits else comparison.TENSORS[:-1])
    for each in results.values():
        assert each.difference.shape == (1 if each.name in ("final_hidden", "logits") else config.n_layer,)
        assert each.double.max() < 1e-13
        assert each.passes("highest")


def test_bfloat16_has_its_own_error(gpt2):
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms go through float32
        results = compared(gpt2, "bfloat16")
    for each in results.values():
        # Numbers of 8 bits: far from float32's rounding, and of the right size.
        assert 1e-4 < each.error.max() < comparison.TOLERANCES["bfloat16"]
        assert each.torch_error.max() < MODEL_LIMIT
        assert not each.passes("highest")


def test_products_in_bfloat16_have_a_smaller_error_and_float64_none(tmp_path, monkeypatch):
    """Rounds products of BERT; GPT-2's are in runtime/test_devices.py."""
    monkeypatch.setattr("jaxqkv.runtime.devices.precision", lambda: "bfloat16")
    results = compared(write_folder(tmp_path / "x", BERT))
    for each in results.values():
        assert 1e-4 < each.error.max() < comparison.TOLERANCES["bfloat16"]
        assert each.double.max() < 1e-13


def test_a_difference_is_found_where_it_is(tmp_path, monkeypatch):
    """PyTorch's V of layer 1 a hundredth larger: that tensor and layer, by that much."""
    right = torch_reference.intermediates

    def wrong(*arguments):
        arrays = right(*arguments)
        arrays["v"] = arrays["v"].copy()
        arrays["v"][1] *= 1.01
        return arrays

    monkeypatch.setattr(torch_reference, "intermediates", wrong)
    results = compared(write_folder(tmp_path / "x", GPT2))
    assert results["v"].difference[1] == pytest.approx(0.01 / 1.01, rel=1e-3)
    assert results["v"].difference[[0, 2]].max() < MODEL_LIMIT
    failed = [name for name, each in results.items() if not each.passes("highest")]
    assert failed == ["v"]


@pytest.mark.parametrize("name", ["hidden", "logits"])
def test_a_difference_at_the_end_is_found(tmp_path, monkeypatch, name):
    right = torch_reference.intermediates
    monkeypatch.setattr(
        torch_reference, "intermediates", lambda *a: (arrays := right(*a)) | {name: np.float32(1.01) * arrays[name]}
    )
    results = compared(write_folder(tmp_path / "x", GPT2))
    failed = [each for each in results if not results[each].passes("highest")]
    assert failed == (["hidden", "final_hidden"] if name == "hidden" else ["logits"])
    assert results[failed[-1]].difference[0] == pytest.approx(0.01 / 1.01, rel=1e-3)


def stored_as(kind, folder):
    """A checkpoint whose file is not as plain ones are."""
    tensors = random_tensors(GPT2)
    if kind == "upcast":
        return write_folder(folder, changed(GPT2, reorder_and_upcast_attn=True))
    if kind == "its own output embedding":
        return write_folder(folder, GPT2, tensors | {"lm_head.weight": tensors["wte.weight"][::-1].copy()})
    if kind == "lm_head alone":
        tensors["lm_head.weight"] = tensors.pop("wte.weight")
        return write_folder(folder, GPT2, tensors)
    tensors = {f"bert.{key}": values for key, values in random_tensors(BERT).items()}
    tensors["cls.predictions.decoder.weight"] = tensors.pop("bert.embeddings.word_embeddings.weight")
    return write_folder(folder, BERT, tensors)


@pytest.mark.parametrize("kind", ["upcast", "its own output embedding", "lm_head alone", "decoder alone"])
def test_checkpoints_that_are_not_plain_pass(tmp_path, kind):
    folder = stored_as(kind, tmp_path / "x")
    own = kind == "its own output embedding"
    with pytest.warns(JaxqkvWarning, match="lm_head.weight differs") if own else contextlib.nullcontext():
        results = compared(folder)
    assert all(each.passes("highest") for each in results.values())


def test_pads_are_not_compared(gpt2, monkeypatch):
    """Whatever stands at padded positions, NaN too."""
    right = torch_reference.intermediates

    def spoilt(*arguments):
        arrays = {name: values.copy() for name, values in right(*arguments).items()}
        for name in ("q", "k", "v", "z"):
            arrays[name][:, 1, :, 8:] = np.nan
        for name in ("scores", "pattern"):
            arrays[name][:, 1, :, 8:] = arrays[name][:, 1, :, :, 8:] = np.nan
        for name in ("attn_out", "resid_pre"):
            arrays[name][:, 1, 8:] = np.nan
        for name in {"hidden", "logits"} & set(arrays):
            arrays[name][1, 8:] = np.nan
        return arrays

    monkeypatch.setattr(torch_reference, "intermediates", spoilt)
    assert all(each.passes("highest") for each in compared(gpt2).values())


def test_a_nan_does_not_pass(tmp_path, monkeypatch):
    right = torch_reference.intermediates

    def broken(*arguments):
        arrays = right(*arguments)
        arrays["z"] = arrays["z"].copy()
        arrays["z"][0, 0, 0, 0, 0] = np.nan
        return arrays

    monkeypatch.setattr(torch_reference, "intermediates", broken)
    assert not compared(write_folder(tmp_path / "x", BERT))["z"].passes("highest")


def test_the_command_saves_what_it_prints(tmp_path, capsys):
    path = tmp_path / "reports" / "verify.json"
    folder = write_checkpoint_of_words(tmp_path / "model")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    line = ["verify", str(folder), "--text", "".join(MANY_WORDS[:17]), "".join(MANY_WORDS[20:28]), "--out", str(path)]
    assert main(line) == 0
    report = json.loads(path.read_text())
    assert report["passed"]
    assert report["dtype"] == "float32"
    assert report["precision"] == "highest"
    assert set(report["tensors"]) == set(comparison.TENSORS)
    assert len(report["tensors"]["pattern"]["difference"]) == 3
    assert report["batch"] == "2 sequences of 17, 8 tokens (given)"
    printed = capsys.readouterr().out
    assert f"{max(report['tensors']['scores']['difference']):.1e}" in printed
    assert f"passed: {folder}" in printed


def test_a_failure_is_said_and_has_its_own_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(comparison.TOLERANCES, "highest", 1e-12)
    monkeypatch.setattr(comparison, "PYTORCH_TIMES", 0)
    path = tmp_path / "verify.json"
    folder = write_checkpoint_of_words(tmp_path / "model", BERT)
    texts = [" ".join(["w7"] * words) for words in (15, 6)]  # and [CLS] and [SEP]
    assert main(["verify", str(folder), "--text", *texts, "--out", str(path)]) == 1
    assert not json.loads(path.read_text())["passed"]
    printed = capsys.readouterr().out
    assert "FAIL" in printed
    assert f"FAILED: {folder}, 2 sequences of 17, 8 tokens" in printed


def test_weights_that_are_not_finite_fail(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tensors(spoil)(tmp_path / "model")
    write_word_tokenizer(tmp_path / "model", WORDS)
    texts = ["I" + " her" * (length - 1) for length in (17, 8)]
    assert main(["verify", "./model", "--text", *texts, "--out", "verify.json"]) == 1
    out, err = capsys.readouterr()
    assert err == f"jaxqkv: warning: {SPOILT}\n"
    assert "FAILED" in out


def with_tokenizer(folder, base, files):
    """A checkpoint with a tokenizer of that base."""
    config = {"bert": BERT, "gpt2": GPT2}[base.split("-")[0]]
    write_folder(folder, changed(config, vocab_size=300))
    saved = (folder / "config.json").read_text()
    write(folder, base, files)
    (folder / "config.json").write_text(saved)
    return folder


@pytest.mark.parametrize("name", ["demo-bert", "demo-gpt2"])
def test_token_ids_of_the_bundled_tokenizers(name):
    checkpoint = open_checkpoint(name)
    texts = ["a further text", *stimuli("attention_scores/purple.txt"), *stimuli("token_similarity/her.txt")]
    tokens = comparison.compare_tokens(checkpoint.tokenizer(), checkpoint.tokenizer_source(), texts)
    assert tokens["texts"] > len(texts) + len(comparison.ODD)
    assert tokens["different"] == []
    assert tokens["passed"]
    assert tokens["reason"] is None


def test_other_token_ids_fail(tmp_path, monkeypatch, capsys):
    """Where ours is cased and theirs is not, the texts with capitals are told."""
    folder = with_tokenizer(tmp_path / "model", "bert", {})
    tokenizer = open_checkpoint(folder).tokenizer()
    tokenizer.backend.normalizer.lowercase = False
    tokens = comparison.compare_tokens(tokenizer, folder, ["the saw", "The saw"])
    assert not tokens["passed"]
    assert "The saw" in tokens["different"]
    assert "the saw" not in tokens["different"]
    monkeypatch.setattr(comparison, "compare_tokens", lambda *arguments: tokens)
    monkeypatch.setattr(comparison, "compare", lambda *arguments: [comparison.Comparison("q", *np.zeros((4, 1)))])
    assert main(["verify", str(folder), "--text", "the saw", "--out", str(tmp_path / "v.json")]) == 1
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("token ids")]
    assert row.split() == ["token", "ids", str(len(tokens["different"])), "of", str(tokens["texts"]), "texts", "FAIL"]
    report = json.loads((tmp_path / "v.json").read_text())
    assert report["token ids"] == tokens
    assert all(each["passed"] for each in report["tensors"].values())
    assert not report["passed"]


def test_a_tokenizer_that_transformers_cannot_load(tmp_path):
    """Said, and no failure: there is nothing to compare with."""
    folder = with_tokenizer(tmp_path / "model", "gpt2", {})
    tokenizer = open_checkpoint(folder).tokenizer()
    broken = folder.with_name("broken")
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    with pytest.warns(JaxqkvWarning, match=r"token ids are not compared: transformers cannot load the tokenizer \("):
        tokens = comparison.compare_tokens(tokenizer, broken, [])
    assert tokens["passed"]
    assert tokens["texts"] == 0
    assert "transformers cannot load" in tokens["reason"]


def test_without_pytorch(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "jaxqkv.model.torch_reference")
    monkeypatch.delattr(jaxqkv.model, "torch_reference")
    assert main(["verify", "demo-gpt2", "--out", str(tmp_path / "verify.json")]) == 2
    assert "pip install 'jaxqkv[torch]'" in capsys.readouterr().err
    assert not (tmp_path / "verify.json").exists()


def test_a_checkpoint_that_makes_more_of_rounding_passes(tmp_path):
    """PyTorch's own error, measured beside it, decides.

    Far from zero float32 keeps few digits of what the first layer norm leaves: a hundred times the tolerance is lost.
    """
    tensors = random_tensors(GPT2)
    tensors["wpe.weight"] += 3000
    results = compared(write_folder(tmp_path / "x", GPT2, tensors))
    beyond = [each for each in results.values() if each.error.max() > comparison.TOLERANCES["highest"]]
    assert beyond
    assert all(each.torch_error.max() > comparison.TOLERANCES["highest"] / 5 for each in beyond)
    assert all(each.passes("highest") for each in results.values())


def test_the_limit():
    """By layer: the tolerance, or five times PyTorch's own error; of other arithmetic as many times more."""
    layers = np.array([1e-9, 4e-6, 1e-5, np.nan])
    one = comparison.Comparison("q", layers, np.array([1.9e-5, 2.1e-5, 4.9e-5, 0]), layers, np.zeros(4))
    np.testing.assert_allclose(one.limit("highest"), [2e-5, 2e-5, 5e-5, np.nan])
    np.testing.assert_allclose(one.limit("bfloat16"), [0.1, 0.1, 0.25, np.nan])

    def passes(error, torch_error, double=0.0):
        values = (np.array([each]) for each in (0.0, error, torch_error, double))
        return comparison.Comparison("q", *values).passes("highest")

    assert passes(1.9e-5, 0)
    assert not passes(2.1e-5, 4e-6)
    assert passes(4.9e-5, 1e-5)
    assert not passes(5.1e-5, 1e-5)
    assert not passes(0, 0, double=1.1e-10)
    assert not passes(np.nan, 0)
    assert not passes(0, np.nan)
    assert not passes(0, 0, double=np.nan)
