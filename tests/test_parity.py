"""Live against the PyTorch models of `transformers`: every intermediate, both architectures.

The suite's extra brings torch; without it these tests are skipped and the goldens stand alone.
"""

import numpy as np
import pytest
from conftest import MODEL_LIMIT, relative_error, write_folder
from test_model import EVERYTHING, masked_batch, real

import jaxqkv
from jaxqkv.activations import FIELDS
from jaxqkv.config import KNOWN

torch = pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("transformers", exc_type=ImportError)
from make_goldens import masks  # noqa: E402

from jaxqkv import torch_reference  # noqa: E402

FULL = {"gpt2": KNOWN["gpt2"], "bert": KNOWN["bert-base-uncased"]}


def root_mean_square(x):
    return np.sqrt((x**2).mean())


def ours(path, torch_model, config, ids, mask):
    """The same fields from this package, on a folder with the PyTorch model's weights."""
    tensors = {key: value.numpy() for key, value in torch_model.state_dict().items()}
    model = jaxqkv.load(write_folder(path, config, tensors))
    batch = masked_batch(ids, mask)
    activations = model.run(batch, capture=EVERYTHING)
    fields = {field: np.asarray(getattr(activations, field)) for field in FIELDS}
    fields["hidden"] = np.asarray(model.hidden(batch))
    return fields | ({"logits": np.asarray(model.logits(batch))} if config.model_type == "gpt2" else {})


@pytest.mark.parametrize("padding", ["unpadded", "left", "right"])
def test_every_intermediate(config, padding, tmp_path):
    mask = masks()[padding]
    ids = np.random.default_rng(5).integers(0, config.vocab_size, mask.shape)
    torch_model = torch_reference.build(config, seed=1)
    expected = torch_reference.intermediates(torch_model, ids, mask)
    actual = ours(tmp_path / "x", torch_model, config, ids, mask)
    assert sorted(actual) == sorted(expected)
    for field in expected:
        mine, theirs = (real(arrays[field], mask, field) for arrays in (actual, expected))
        assert relative_error(mine, theirs) <= MODEL_LIMIT, field


@pytest.mark.parametrize("name", sorted(FULL))
def test_full_shapes_in_float32_and_against_float64(name, tmp_path):
    """At the real sizes: within the limit of PyTorch, and no further from float64 than four times PyTorch's way.

    The second by the root mean square: which single number of thousands is worst is luck. With vectors of 4 numbers
    it is 1.8 times; products of fewer bits would make it a hundred.
    """
    config = FULL[name]
    mask = np.ones((2, 29), bool)
    mask[1, :11] = False
    ids = np.random.default_rng(6).integers(0, config.vocab_size, mask.shape)
    torch_model = torch_reference.build(config, seed=2)
    actual = ours(tmp_path / "x", torch_model, config, ids, mask)
    single = torch_reference.intermediates(torch_model, ids, mask)
    double = torch_reference.intermediates(torch_model.double(), ids, mask)
    for field in double:
        mine, theirs, exact = (real(arrays[field], mask, field) for arrays in (actual, single, double))
        assert relative_error(mine, theirs) <= MODEL_LIMIT, field
        assert root_mean_square(mine - exact) <= 4 * root_mean_square(theirs - exact), field


def test_transformers_loads_what_is_saved(config, tmp_path):
    """A folder written by `save_checkpoint` gives PyTorch the same hidden states."""
    from transformers import AutoModel

    folder = write_folder(tmp_path / "x", config)
    torch_model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    ids = np.random.default_rng(7).integers(0, config.vocab_size, (3, 13))
    with torch.no_grad():
        expected = torch_model(torch.tensor(ids)).last_hidden_state.numpy()
    assert relative_error(jaxqkv.load(folder).hidden(ids), expected) <= MODEL_LIMIT
