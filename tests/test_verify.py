"""`jaxqkv verify`: what it calls a difference, what it calls a failure."""

import json

import jax
import numpy as np
import pytest
from conftest import MODEL_LIMIT

import jaxqkv.cli
from jaxqkv import verify
from jaxqkv.checkpoint import open_checkpoint

pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("transformers", exc_type=ImportError)
from jaxqkv import torch_reference


def compared(folder, dtype="float32"):
    checkpoint = open_checkpoint(folder)
    batch, what = verify.batch_of(checkpoint, None)
    assert "random ids" in what
    assert batch.mask.sum(axis=1).tolist() == [17, 8]
    return {each.name: each for each in verify.compare(checkpoint, batch, dtype)}


def test_both_architectures_pass_in_both_precisions(folder, config):
    results = compared(folder)
    assert tuple(results) == verify.TENSORS
    for each in results.values():
        assert each.difference.shape == (config.n_layer,)
        assert each.double.max() < 1e-13
        assert each.passes(verify.TOLERANCES["highest"])


def test_bfloat16_has_its_own_error(folder):
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms go through float32
        results = compared(folder, "bfloat16")
    for each in results.values():
        # Numbers of 8 bits: far from float32's rounding, and of the right size.
        assert 1e-4 < each.error.max() < verify.TOLERANCES["bfloat16"]
        assert each.torch_error.max() < MODEL_LIMIT
        assert not each.passes(verify.TOLERANCES["highest"])


def test_products_in_bfloat16_have_a_smaller_error_and_float64_none(folder, monkeypatch):
    monkeypatch.setattr("jaxqkv.devices.precision", lambda: "bfloat16")
    results = compared(folder)
    for each in results.values():
        assert 1e-4 < each.error.max() < verify.TOLERANCES["bfloat16"]
        assert each.double.max() < 1e-13


def test_a_difference_is_found_where_it_is(folder, monkeypatch):
    """PyTorch's V of layer 1 a hundredth larger: that tensor and layer, by that much."""
    right = torch_reference.intermediates

    def wrong(*arguments):
        arrays = right(*arguments)
        arrays["v"] = arrays["v"].copy()
        arrays["v"][1] *= 1.01
        return arrays

    monkeypatch.setattr(torch_reference, "intermediates", wrong)
    results = compared(folder)
    assert results["v"].difference[1] == pytest.approx(0.01 / 1.01, rel=1e-3)
    assert results["v"].difference[[0, 2]].max() < MODEL_LIMIT
    failed = [name for name, each in results.items() if not each.passes(verify.TOLERANCES["highest"])]
    assert failed == ["v"]


def test_pads_are_not_compared(folder, config, monkeypatch):
    """Whatever stands at padded positions, NaN too."""
    right = torch_reference.intermediates
    mask = np.array([[True] * 13, [True] * 7 + [False] * 6])
    ids = np.random.default_rng(3).integers(0, config.vocab_size, mask.shape).astype(np.int32)
    batch = jaxqkv.Batch(ids=ids, mask=mask, token_types=np.zeros_like(ids))

    def spoilt(*arguments):
        arrays = {name: values.copy() for name, values in right(*arguments).items()}
        for name in ("q", "k", "v", "z"):
            arrays[name][:, 1, :, 7:] = np.nan
        for name in ("scores", "pattern"):
            arrays[name][:, 1, :, 7:] = arrays[name][:, 1, :, :, 7:] = np.nan
        for name in ("attn_out", "resid_pre"):
            arrays[name][:, 1, 7:] = np.nan
        arrays["hidden"][1, 7:] = np.nan
        return arrays

    monkeypatch.setattr(torch_reference, "intermediates", spoilt)
    results = verify.compare(open_checkpoint(folder), batch)
    assert all(each.passes(verify.TOLERANCES["highest"]) for each in results)


def test_a_nan_does_not_pass(folder, monkeypatch):
    right = torch_reference.intermediates

    def broken(*arguments):
        arrays = right(*arguments)
        arrays["z"] = arrays["z"].copy()
        arrays["z"][0, 0, 0, 0, 0] = np.nan
        return arrays

    monkeypatch.setattr(torch_reference, "intermediates", broken)
    assert not compared(folder)["z"].passes(1.0)


def test_the_command_saves_what_it_prints(tmp_path, capsys):
    path = tmp_path / "reports" / "verify.json"
    line = ["verify", "demo-gpt2", "--text", "I saw her at the market.", "Yes.", "--out", str(path)]
    assert jaxqkv.cli.main(line) == 0
    report = json.loads(path.read_text())
    assert report["passed"]
    assert report["dtype"] == "float32"
    assert report["precision"] == "highest"
    assert set(report["tensors"]) == set(verify.TENSORS)
    assert len(report["tensors"]["pattern"]["difference"]) == 8
    assert report["batch"].endswith("tokens (given)")
    printed = capsys.readouterr().out
    assert f"{max(report['tensors']['scores']['difference']):.1e}" in printed
    assert "passed: demo-gpt2" in printed


def test_a_failure_is_said_and_has_its_own_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(verify.TOLERANCES, "highest", 1e-12)
    path = tmp_path / "verify.json"
    assert jaxqkv.cli.main(["verify", "demo-bert", "--text", "Yes, her.", "--out", str(path)]) == 1
    assert not json.loads(path.read_text())["passed"]
    printed = capsys.readouterr().out
    assert "FAIL" in printed
    assert "FAILED: demo-bert" in printed


def test_without_pytorch(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(jaxqkv.cli.sys.modules, "transformers", None)
    monkeypatch.delitem(jaxqkv.cli.sys.modules, "jaxqkv.torch_reference")
    monkeypatch.delattr(jaxqkv, "torch_reference")
    assert jaxqkv.cli.main(["verify", "demo-gpt2", "--out", str(tmp_path / "verify.json")]) == 2
    assert "pip install 'jaxqkv[torch]'" in capsys.readouterr().err
    assert not (tmp_path / "verify.json").exists()
