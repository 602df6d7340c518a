"""What a caller may do with what is given and returned, and how layers, memory and reducers are asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GPT2, MODEL_LIMIT, random_tensors, relative_error, write_folder
from helpers import models
from helpers.models import ALL, IDS
from helpers.oracles import EVERYTHING

import jaxqkv
from jaxqkv.architectures.activations import FIELDS
from jaxqkv.errors import JaxqkvError
from jaxqkv.runtime.arrays import snapshot
from jaxqkv.runtime.sizes import memory_limit
from jaxqkv.text.batches import Batch, as_batch

config, folder, model, whole = models.config, models.folder, models.model, models.whole
gpt2_folder, gpt2, gpt2_whole = models.gpt2_folder, models.gpt2, models.gpt2_whole


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("copy", [True, False])
def test_dicts_of_parameters_are_not_the_models(gpt2_folder, stream, copy):
    model = jaxqkv.load(gpt2_folder, stream=stream)
    model.hidden(IDS)
    before = np.asarray(model.hidden(IDS))
    params = model.params(copy=copy)
    params["layers"][1]["attn"]["o"]["kernel"] = np.zeros((35, 35), np.float32)
    params["layers"].pop()
    for module in params["embed"].values():
        for name in module:
            module[name] = np.zeros_like(module[name])
    np.testing.assert_array_equal(model.hidden(IDS), before)
    fresh = model.params(copy=copy)
    assert len(fresh["layers"]) == GPT2.n_layer
    assert relative_error(jaxqkv.hidden(fresh, IDS, GPT2), before) <= MODEL_LIMIT


@pytest.mark.parametrize("stream", [True, False])
def test_buffers_of_parameters_may_be_donated(gpt2_folder, stream):
    model = jaxqkv.load(gpt2_folder, stream=stream)
    model.hidden(IDS)
    before = np.asarray(model.hidden(IDS))
    params = model.params()
    halved = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf / 2, tree), donate_argnums=0)(params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    for again in (model, jaxqkv.load(gpt2_folder)):
        np.testing.assert_array_equal(again.hidden(IDS), before)
    for one, two in zip(jax.tree.leaves(halved), jax.tree.leaves(model.params()), strict=True):
        np.testing.assert_array_equal(one, np.asarray(two) / 2)


def test_shared_buffers_are_the_models_own(gpt2_folder):
    model = jaxqkv.load(gpt2_folder, stream=False)
    one, two = (jax.tree.leaves(model.params(copy=False)) for _ in range(2))
    assert all(a is b for a, b in zip(one, two, strict=True))
    own = jax.tree.leaves(model.params())
    assert not {leaf.unsafe_buffer_pointer() for leaf in own} & {leaf.unsafe_buffer_pointer() for leaf in one}


def test_what_the_caller_changes_after_a_call_is_not_seen():
    """Whatever is read later is a copy; JAX's arrays, which do not change, are not copied."""
    ids, mask, types = np.zeros((2, 5), np.int32), np.ones((2, 5), bool), np.zeros((2, 5), np.int32)
    batch = as_batch(Batch(ids=ids, mask=mask, token_types=types), GPT2)
    plain = as_batch(ids, GPT2)
    ids += 1
    mask[:] = False
    types += 1
    assert not np.asarray(batch.ids).any()
    assert np.asarray(batch.mask).all()
    assert not np.asarray(batch.token_types).any()
    assert not np.asarray(plain.ids).any()
    inside = snapshot({"a": [ids], "b": (array := jnp.arange(3))})
    assert not np.shares_memory(inside["a"][0], ids)
    assert inside["b"] is array
    with pytest.raises(ValueError, match="read-only"):
        inside["a"][0][0] = 0


def test_nothing_that_is_returned_is_a_view_of_an_argument(gpt2):
    ids, mask = IDS.copy(), np.ones(IDS.shape, bool)
    shift = np.ones(2, np.float32)
    batch = Batch(ids=ids, mask=mask, token_types=np.zeros_like(ids))
    acts = gpt2.run(batch, capture=ALL)
    kept = gpt2.run(batch, reduce=lambda attention, mask, shift: (mask, shift), inputs=shift, layers=0)
    mask[:], shift[:] = False, 0
    assert np.asarray(acts.mask).all()
    assert np.asarray(kept[0]).all()
    np.testing.assert_array_equal(kept[1], np.ones((1, 2)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inputs_of_pytorch(gpt2, dtype):
    torch = pytest.importorskip("torch", exc_type=ImportError)
    shift = torch.tensor([1.0, 2.0], dtype=getattr(torch, dtype), requires_grad=True)
    kept = gpt2.run(IDS, reduce=lambda attention, mask, shift: shift, inputs=shift, layers=0)
    assert kept.dtype == dtype
    assert np.asarray(kept, np.float32).tolist() == [[1.0, 2.0]]


def test_host_parameters_are_those_at_the_time_of_the_call(gpt2, gpt2_whole):
    params = jax.tree.map(np.array, gpt2.params())
    result = jaxqkv.forward(params, IDS, GPT2, capture=ALL)
    for leaf in jax.tree.leaves(params):
        leaf[:] = 0
    assert relative_error(result.mlp_out, gpt2_whole.mlp_out) <= MODEL_LIMIT
    assert relative_error(result.hidden, gpt2_whole.hidden) <= MODEL_LIMIT


# --- layers ---


@pytest.mark.parametrize(
    ("layers", "selected"),
    [
        ([2, 0], (2, 0)),
        (iter([1, 0]), (1, 0)),
        ({2, 1}, (1, 2)),
        (range(2, -1, -1), (2, 1, 0)),
        (np.array([2, 1]), (2, 1)),
        (np.array(1), (1,)),
        (np.int64(2), (2,)),
        ({2: "a", 0: "b"}.keys(), (0, 2)),
    ],
)
def test_layers_come_in_the_order_asked_for(gpt2, gpt2_whole, layers, selected):
    acts = gpt2.run(IDS, capture=EVERYTHING, layers=layers)
    assert acts.layers == selected
    assert relative_error(acts.k, np.asarray(gpt2_whole.k)[list(selected)]) <= MODEL_LIMIT


def test_layers_of_a_reducer(gpt2, gpt2_whole):
    """The layer's number is a value of the program, of which there is one for all layers."""
    traced = []

    def reduce(attention, mask):
        traced.append(len(mask))
        return attention.layer, attention.q[:, 0, 0, 0] * attention.layer.astype(jnp.float32)

    numbers, values = gpt2.run(IDS, reduce=reduce, layers=[2, 0, 1])
    assert numbers.tolist() == [2, 0, 1]
    q = np.asarray(gpt2_whole.q)[[2, 0, 1], :, 0, 0, 0]
    np.testing.assert_allclose(values, q * np.array([2, 0, 1])[:, None], rtol=1e-5)
    assert len(traced) == 2  # the last layer has no stream, and so a program of its own
    half = gpt2.run(IDS, reduce=lambda attention, mask: jax.tree.leaves(attention.astype(jnp.float16)), layers=1)
    assert [leaf.dtype for leaf in half[:-1]] == [jnp.float16] * len(FIELDS)
    assert half[-1].tolist() == [1]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (np.array([True, False, True]), "not a boolean mask; `numpy.flatnonzero`"),
        ([True, False, False], "not a boolean mask"),
        ([0, 2, 0, 2], "layers names 0, 2 more than once; name each layer once"),
        (set(), "no layer selected"),
        (np.array([[0], [1]]), "layers are whole numbers"),
        (np.array([0.0, 1.0]), "layers are whole numbers"),
    ],
)
def test_layers_that_are_refused(gpt2, layers, message):
    with pytest.raises(JaxqkvError, match=message):
        gpt2.run(IDS, layers=layers)


# --- memory, parameters, dtypes ---


@pytest.mark.parametrize(("memory", "size"), [("2GB", 2 * 10**9), ("64 KiB", 65536), (2e9, 2 * 10**9), (1, 1)])
def test_memory(memory, size):
    assert memory_limit(memory) == size


@pytest.mark.parametrize("memory", [0, -1, True, float("nan"), float("inf"), "much", "0.5", "0GB", [1]])
def test_memory_that_is_refused(memory):
    with pytest.raises(JaxqkvError, match=r"^memory"):
        memory_limit(memory)


def test_memory_as_a_text_changes_nothing(gpt2):
    def fields(ids, memory=None):
        return gpt2.run(ids, capture=ALL, memory=memory).q

    for run in (gpt2.hidden, gpt2.logits, fields):
        np.testing.assert_allclose(run(IDS, memory="40KB"), run(IDS), atol=2e-5)  # one sequence at a time
        with pytest.raises(JaxqkvError, match=r"^memory"):
            run(IDS, memory=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda params: params | {"layers": [*params["layers"], params["layers"][0]]}, "4 layers, the config says 3"),
        (lambda params: params | {"layers": params["layers"][:2]}, "2 layers, the config says 3"),
        (lambda params: params | {"layers": dict(enumerate(params["layers"]))}, "a list of dicts, one a layer"),
        (lambda params: {"layers": params["layers"]}, "params must have the parts embed, layers, final"),
    ],
)
def test_parameters_of_another_model(gpt2, change, message):
    params = change(gpt2.params())
    for run in (jaxqkv.forward, jaxqkv.hidden, jaxqkv.logits):
        with pytest.raises(JaxqkvError, match=message):
            run(params, IDS, GPT2)


@pytest.mark.parametrize("stored", [np.float16, np.float32])
def test_weights_are_read_only(config, tmp_path, stored):
    tensors = {key: values.astype(stored) for key, values in random_tensors(config).items()}
    weights = jaxqkv.load(write_folder(tmp_path / "x", config, tensors)).weights
    arrays = [getattr(weights, name)(0) for name in ("W_Q", "W_K", "W_V", "W_O", "W_QKV")]
    arrays += [weights.W_Q(0, by_head=True), weights.W_O(0, by_head=True), weights[weights.names[0]], weights.positions]
    for array in arrays:
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 5


def test_float64_without_x64_is_refused(gpt2_folder):
    jax.config.update("jax_enable_x64", True)
    try:
        model = jaxqkv.load(gpt2_folder, dtype="float64")
        with jax.numpy_dtype_promotion("standard"):  # Flax's norms promote float64 to float64
            assert model.run(IDS, layers=0).q.dtype == np.float64
    finally:
        jax.config.update("jax_enable_x64", False)
    for run in (model.run, model.hidden, lambda ids: model.params()):
        with pytest.raises(JaxqkvError, match="jax_enable_x64 is off now"):
            run(IDS)


# --- what a pass returns ---


def test_outputs_and_layers_from_one_pass(model, config, whole, monkeypatch):
    """Runs the whole batch and, since what is cut knows no architecture, one sequence at a time only once."""
    read = []
    layer = jaxqkv.Weights.layer
    monkeypatch.setattr(jaxqkv.Weights, "layer", lambda self, number: read.append(number) or layer(self, number))
    names = EVERYTHING | ({"hidden", "logits"} if config.has_logits else {"hidden"})
    last = np.asarray(whole.resid_post, np.float64)[2]
    if config.has_logits:
        scale, bias = model.weights["ln_f.weight"], model.weights["ln_f.bias"]
        last = (last - last.mean(-1, keepdims=True)) / np.sqrt(last.var(-1, keepdims=True) + 1e-5) * scale + bias
    for memory in (None, 40_000) if config.causal else (None,):
        read.clear()
        acts = jaxqkv.load(model.checkpoint).run(IDS, capture=names, layers=[1], memory=memory)
        assert read == [0, 1, 2]
        assert acts.layers == (1,)
        assert relative_error(acts.pattern, np.asarray(whole.pattern)[1:2]) <= MODEL_LIMIT
        assert relative_error(acts.resid_post, np.asarray(whole.resid_pre)[2:]) <= MODEL_LIMIT
        assert relative_error(acts.hidden, last) <= MODEL_LIMIT
        assert relative_error(acts.hidden, model.hidden(IDS)) <= MODEL_LIMIT
        if config.has_logits:
            assert relative_error(acts.logits, model.logits(IDS)) <= MODEL_LIMIT


def test_outputs_alone(gpt2):
    acts = gpt2.run(IDS, capture="logits")
    assert acts.layers == ()
    assert acts.hidden is None
    assert repr(acts).startswith("Activations: ")
    np.testing.assert_array_equal(acts.logits, gpt2.logits(IDS))
    logits = jaxqkv.forward(gpt2.params(), IDS, GPT2, capture={"logits"} | EVERYTHING).logits
    assert relative_error(logits, acts.logits) <= MODEL_LIMIT
    with pytest.raises(JaxqkvError, match="logits: not a field of layers"):
        next(gpt2.layerwise(IDS, capture={"q", "logits"}))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("hook_pattern", "pattern"),
        ("blocks.0.attn.hook_attn_scores", "scores"),
        ("blocks.11.hook_resid_post", "resid_post"),
        ("attentions", "pattern"),
        ("Q", "q"),
        ("last_hidden_state", "hidden"),
        ("logit", "logits"),
    ],
)
def test_names_of_other_libraries(gpt2, name, meant):
    with pytest.raises(JaxqkvError, match=rf"cannot capture {name}; did you mean .*{meant}\b"):
        gpt2.run(IDS, capture={name, "q"})


def test_fields_by_name_and_by_layer(gpt2):
    acts = gpt2.run(IDS, capture={"q", "logits"}, layers=[2, 0])
    assert acts["q"] is acts.q
    assert acts["logits"] is acts.logits
    with pytest.raises(JaxqkvError, match=r"^z was not captured; name it when running the model: capture=\{'z'\}$"):
        acts["z"]
    with pytest.raises(JaxqkvError, match="no field 'Q'; did you mean q"):
        acts["Q"]
    np.testing.assert_array_equal(acts.layer(0).q, np.asarray(acts.q)[1])
    assert acts.layer(0).z is None
    with pytest.raises(JaxqkvError, match="no layer 1 here; there is 2, 0"):
        acts.layer(1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_activations_are_saved_and_loaded(gpt2, tmp_path, dtype):
    absent = dict.fromkeys(EVERYTHING - {"q", "pattern"})
    acts = dataclasses.replace(gpt2.run(IDS, capture=ALL, layers=[2, 0]), **absent)
    acts = acts.map(lambda x: jnp.asarray(np.asarray(x).astype(jnp.dtype(dtype))))
    acts.save(tmp_path / "a.safetensors")
    loaded = jaxqkv.load_activations(tmp_path / "a.safetensors")
    assert loaded.layers == (2, 0)
    assert jax.tree.structure(loaded) == jax.tree.structure(acts)
    for one, two in zip(jax.tree.leaves(loaded), jax.tree.leaves(acts), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)


def test_files_that_are_no_activations(gpt2_folder, gpt2_whole, tmp_path):
    (tmp_path / "text").write_text("x")
    for path, message in (
        (gpt2_folder / "model.safetensors", "not saved by `Activations.save`"),
        (tmp_path / "text", "not a whole safetensors file"),
        (tmp_path / "nothing", "not a whole safetensors file"),
    ):
        with pytest.raises(JaxqkvError, match=message):
            jaxqkv.load_activations(path)
    with pytest.raises(JaxqkvError, match="cannot be written"):
        gpt2_whole.save(tmp_path / "no folder" / "a.safetensors")


def test_the_pattern_is_zero_at_pads(model):
    """On either side, in rows and in columns; the other rows sum to 1."""
    mask = np.ones(IDS.shape, bool)
    mask[0, 9:] = mask[1, :4] = False
    acts = model.run(Batch(ids=IDS, mask=mask, token_types=np.zeros_like(IDS)), capture=ALL)
    pattern = np.asarray(acts.pattern)
    np.testing.assert_allclose(
        pattern.sum(axis=-1), np.broadcast_to(mask[None, :, None], pattern.shape[:-1]), atol=1e-6
    )
    for text in range(2):
        assert not pattern[:, text][:, :, :, ~mask[text]].any()
    assert np.isfinite(acts.mlp_out).all()
