"""Live against the PyTorch models of `transformers`: every intermediate of every architecture.

The suite's extra brings torch; without it these tests are skipped and the goldens stand alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CONFIGS, GPT2, MODEL_LIMIT, changed, relative_error, write_folder
from helpers.oracles import EVERYTHING, masked_batch, real

import jaxqkv
from jaxqkv.architectures import REGISTRY
from jaxqkv.architectures.activations import OUTPUTS

torch = pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("transformers", exc_type=ImportError)
from make_goldens import masks  # noqa: E402
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward  # noqa: E402

from jaxqkv.model import torch_reference  # noqa: E402

# A layer of the real widths; of the vocabulary, whose embedding is most of a file, the first thousand tokens.
WIDE = {
    name: changed(REGISTRY.known[spec], n_layer=1, vocab_size=1009)
    for name, spec in (("gpt2", "gpt2"), ("bert", "bert-base-uncased"))
}
# As many sequences for each of the three kinds of padding, side by side in one batch: one program for all.
MASK = np.concatenate(list(masks().values()))


def random_batch(config):
    return np.tile(np.random.default_rng(5).integers(0, config.vocab_size, masks()["left"].shape), (len(masks()), 1))


def root_mean_square(x):
    return np.sqrt((x**2).mean())


def ours(model, ids, mask):
    """The same fields as those of `torch_reference.intermediates` from this package, of one pass."""
    outputs = {"hidden", "logits"} if model.config.has_logits else {"hidden"}
    activations = model.run(masked_batch(ids, mask), capture=EVERYTHING | outputs)
    return {field: np.asarray(activations[field]) for field in EVERYTHING | outputs}


def assert_like_pytorch(actual, torch_model, config):
    """Every field of a random batch, for each kind of padding apart."""
    for number, (padding, mask) in enumerate(masks().items()):
        rows = slice(number * len(mask), (number + 1) * len(mask))
        expected = torch_reference.intermediates(torch_model, config, random_batch(config)[rows], mask)
        assert sorted(actual) == sorted(expected)
        for field in expected:
            mine = actual[field][rows] if field in OUTPUTS else actual[field][:, rows]
            error = relative_error(real(mine, mask, field), real(expected[field], mask, field))
            assert error <= MODEL_LIMIT, (padding, field)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_intermediate(name, tmp_path):
    """Of a PyTorch model that is given as it is, and of the same in a folder."""
    config = CONFIGS[name]
    torch_model = torch_reference.build(config, seed=1)
    given = jaxqkv.load(torch_model)
    assert given.checkpoint.spec == type(torch_model).__name__
    actual = ours(given, random_batch(config), MASK)
    assert_like_pytorch(actual, torch_model, config)
    tensors = {key: value.numpy() for key, value in torch_model.state_dict().items()}
    stored = ours(jaxqkv.load(write_folder(tmp_path / "x", config, tensors)), random_batch(config), MASK)
    for field, values in actual.items():
        np.testing.assert_array_equal(stored[field], values, err_msg=field)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(WIDE))
def test_real_widths_in_float32_and_against_float64(name):
    """Within the limit of PyTorch, and no further from float64 than four times PyTorch's way.

    The second by the root mean square: which single number of thousands is worst is luck. With vectors of 4 numbers
    it is 1.8 times; products of fewer bits would make it a hundred.
    """
    config = WIDE[name]
    mask = np.ones((2, 29), bool)
    mask[1, :11] = False
    ids = np.random.default_rng(6).integers(0, config.vocab_size, mask.shape)
    torch_model = torch_reference.build(config, seed=2)
    actual = ours(jaxqkv.load(torch_model), ids, mask)
    single = torch_reference.intermediates(torch_model, config, ids, mask)
    double = torch_reference.intermediates(torch_model.double(), config, ids, mask)
    for field in double:
        mine, theirs, exact = (real(arrays[field], mask, field) for arrays in (actual, single, double))
        assert relative_error(mine, theirs) <= MODEL_LIMIT, field
        assert root_mean_square(mine - exact) <= 4 * root_mean_square(theirs - exact), field


def test_transformers_loads_what_is_saved(config, tmp_path):
    """A folder written by `save_checkpoint` gives PyTorch the same hidden states."""
    from transformers import AutoModel

    folder = write_folder(tmp_path / "x", config)
    torch_model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    ids = random_batch(config)
    with torch.no_grad():
        expected = torch_model(torch.tensor(ids)).last_hidden_state.numpy()
    found = ours(jaxqkv.load(folder), ids, np.ones_like(MASK))
    assert relative_error(found["hidden"], expected) <= MODEL_LIMIT


def test_reordered_and_upcast_attention_in_float32():
    """Every intermediate of a model such as CodeParrot's and Stanford's; eager attention does as the file says."""
    config = changed(GPT2, reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True)
    torch_model = torch_reference.build(config, seed=1)
    assert all(block.attn.reorder_and_upcast_attn for block in torch_model.transformer.h)
    assert_like_pytorch(ours(jaxqkv.load(torch_model), random_batch(config), MASK), torch_model, config)


@pytest.mark.parametrize(("dtype", "upcast"), [("bfloat16", True), ("float16", False)])
def test_attention_of_16_bits_upcast_or_not(dtype, upcast, tmp_path):
    """On the same queries and keys, whose scores are far from zero, transformers' pattern to a rounding of 16 bits."""
    config = changed(GPT2, n_layer=1, initializer_range=0.7, reorder_and_upcast_attn=upcast)
    torch_model = torch_reference.build(config, seed=1).to(getattr(torch, dtype))
    ids = np.random.default_rng(5).integers(0, config.vocab_size, (3, 13))
    tensors = {key: value.float().numpy() for key, value in torch_model.state_dict().items()}
    model = jaxqkv.load(write_folder(tmp_path / "x", config, tensors), dtype=dtype)
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms go through float32
        activations = model.run(ids, capture={"q", "k", "v", "scores", "pattern"})
    assert activations.scores.dtype == (jnp.float32 if upcast else dtype)
    assert activations.pattern.dtype == dtype
    q, k, v = (
        torch.tensor(np.asarray(getattr(activations, n)[0], np.float32)).to(getattr(torch, dtype)) for n in "qkv"
    )
    attention = torch_model.transformer.h[0].attn
    future = torch.full((13, 13), torch.finfo(q.dtype).min, dtype=q.dtype).triu(1)[None, None]
    with torch.no_grad():
        if upcast:
            _, theirs = attention._upcast_and_reordered_attn(q, k, v, future)
        else:
            _, theirs = eager_attention_forward(attention, q, k, v, future, scaling=attention.scaling)
    exact = torch.softmax(q.double() @ k.double().mT * 7**-0.5 + future.double(), dim=-1).numpy()
    mine, theirs = np.asarray(activations.pattern[0], np.float64), theirs.double().numpy()
    unit = float(jnp.finfo(dtype).eps)
    if upcast:
        assert np.abs(mine - theirs).max() <= unit
        assert np.abs(mine - exact).max() <= unit
    else:
        # Scores of 16 bits: both are that far off, each in its own way.
        assert np.abs(mine - exact).max() > 2 * unit
        assert np.abs(mine - exact).max() <= 4 * np.abs(theirs - exact).max()
