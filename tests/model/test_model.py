import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from conftest import (
    BERT,
    GPT2,
    MODEL_LIMIT,
    arrays_of,
    changed,
    random_ids,
    random_tensors,
    relative_error,
    write_folder,
)
from helpers import models
from helpers.models import ALL, IDS
from helpers.oracles import EVERYTHING, masked_batch, real

import jaxqkv
from jaxqkv.architectures import REGISTRY
from jaxqkv.architectures.activations import FIELDS, OUTPUTS
from jaxqkv.checkpoints.folder import tensors_from_params
from jaxqkv.checkpoints.mapped import MappedFile
from jaxqkv.checkpoints.weights import Weights
from jaxqkv.errors import JaxqkvError, JaxqkvWarning
from jaxqkv.model import sources
from jaxqkv.text.batches import Batch

GOLDENS = Path(__file__).parents[1] / "goldens"
PADDINGS = ("unpadded", "left", "right")
config, folder, model, whole = models.config, models.folder, models.model, models.whole
gpt2_folder, gpt2, gpt2_whole = models.gpt2_folder, models.gpt2, models.gpt2_whole


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDENS.glob("*.npz")))
def test_goldens_from_pytorch(name, tmp_path):
    """A batch that is not padded, and the same padded on the left and on the right, side by side."""
    golden = arrays_of(GOLDENS / f"{name}.npz")
    config = REGISTRY.parse(json.loads(str(golden["config"])), name)
    tensors = {key.removeprefix("tensor/"): value for key, value in golden.items() if key.startswith("tensor/")}
    model = jaxqkv.load(write_folder(tmp_path / name, config, tensors))
    ids, mask = (np.concatenate([golden[f"{padding}/{part}"] for padding in PADDINGS]) for part in ("ids", "mask"))
    batch = masked_batch(ids, mask)

    outputs = OUTPUTS if config.has_logits else {"hidden"}
    activations = model.run(batch, capture=EVERYTHING | set(outputs))
    np.testing.assert_array_equal(np.asarray(activations.resid_post)[:-1], np.asarray(activations.resid_pre)[1:])
    for field in (*FIELDS[:-1], *outputs):
        parts = np.split(np.asarray(activations[field]), len(PADDINGS), axis=0 if field in OUTPUTS else 1)
        for padding, actual in zip(PADDINGS, parts, strict=True):
            expected, mask = golden[f"{padding}/{field}"], golden[f"{padding}/mask"]
            assert actual.shape == expected.shape
            error = relative_error(real(actual, mask, field), real(expected, mask, field))
            assert error <= MODEL_LIMIT, (padding, field)


def test_shapes_and_dtypes_of_everything(config, whole):
    batch, pos = IDS.shape
    layer, head, head_dim, embed = config.n_layer, config.n_head, config.head_dim, config.n_embd
    for field in ("q", "k", "v", "z"):
        assert getattr(whole, field).shape == (layer, batch, head, pos, head_dim)
    for field in ("scores", "pattern"):
        assert getattr(whole, field).shape == (layer, batch, head, pos, pos)
    for field in ("attn_out", "resid_pre", "mlp_out", "resid_post"):
        assert getattr(whole, field).shape == (layer, batch, pos, embed)
    assert all(getattr(whole, field).dtype == jnp.float32 for field in FIELDS)
    assert whole.mask.shape == (batch, pos)
    assert whole.layers == (0, 1, 2)


def test_only_what_was_asked_for_comes_back(gpt2, gpt2_whole):
    activations = gpt2.run(IDS, capture={"k", "pattern"}, layers=[1, 0])
    assert activations.layers == (1, 0)
    assert {field for field in FIELDS if getattr(activations, field) is not None} == {"k", "pattern"}
    for field in ("k", "pattern"):
        assert relative_error(activations[field], np.asarray(gpt2_whole[field])[[1, 0]]) <= MODEL_LIMIT
    mlp_out = gpt2.run(IDS, capture="mlp_out", layers=1).mlp_out
    assert relative_error(mlp_out, np.asarray(gpt2_whole.mlp_out)[1:2]) <= MODEL_LIMIT
    default = gpt2.run(IDS, layers=0)
    assert {field for field in FIELDS if getattr(default, field) is not None} == {"q", "k", "v"}


def test_padding_and_batch_mates_change_nothing(config, model, whole):
    """One token, or five where later ones are seen too, with pads on either side, and alone.

    The goldens have texts of all lengths, padded, as PyTorch computes them.
    """
    length = 1 if config.causal else 5
    mask = np.zeros(IDS.shape, bool)
    mask[0, -length:] = mask[1, :length] = True
    ids = np.where(mask, 0, random_ids(config, *IDS.shape, seed=1))
    text = ids[mask] = np.tile(IDS[0, :length], 2)
    padded, alone = model.run(masked_batch(ids, mask), capture=ALL), model.run(text[None, :length], capture=ALL)
    beside = model.run(np.stack([random_ids(config, 1, 11, seed=2)[0], IDS[0]]), capture=ALL)
    one = np.ones((1, length), bool)
    for field in FIELDS:
        expected = real(alone[field], one, field)
        values = np.asarray(padded[field])
        assert np.isfinite(values).all()
        for row in range(2):
            found = real(values[:, row : row + 1], mask[row : row + 1], field)
            assert relative_error(found, expected) <= MODEL_LIMIT, field
        assert relative_error(np.asarray(beside[field])[:, 1], np.asarray(whole[field])[:, 0]) <= MODEL_LIMIT, field


def test_later_layers_are_neither_read_nor_run(gpt2_folder, monkeypatch):
    read = []
    original = Weights.layer
    monkeypatch.setattr(Weights, "layer", lambda self, layer: read.append(layer) or original(self, layer))
    jaxqkv.load(gpt2_folder).run(IDS, capture=EVERYTHING, layers=1)
    assert read == [0, 1]


def test_last_layer_stops_at_what_is_needed(config, model):
    """The program of the last layer has no product with the MLP's weights when only q is asked for."""
    from jaxqkv.model.driver import run_block

    shapes = jax.eval_shape(lambda: model.params()["layers"][0])
    x = jnp.zeros((1, 3, config.n_embd))
    options = {"config": config, "capture": frozenset({"q"}), "reduce": None, "goes_on": False}
    options["execution"] = jaxqkv.runtime.devices.Execution()
    compiled = run_block.lower(shapes, x, jnp.ones((1, 3), bool), layer=jnp.int32(0), **options).compile()
    flops = 2 * 3 * config.n_embd**2
    costs = compiled.cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs  # of each program, in older versions of JAX
    assert costs["flops"] < 3 * flops  # one projection and a norm; a whole layer takes over 8


def test_reducer_sees_one_layer_and_is_stacked(gpt2, gpt2_whole):
    scores, v = np.asarray(gpt2_whole.scores), np.asarray(gpt2_whole.v)

    def reduce(attention, mask):
        return {"largest": attention.scores.max(axis=(-1, -2)), "tokens": mask.sum(), "v": (attention.v**2).sum()}

    reduced = gpt2.run(IDS, reduce=reduce)
    np.testing.assert_allclose(reduced["largest"], scores.max(axis=(-1, -2)), rtol=1e-5)
    np.testing.assert_allclose(reduced["v"], (v**2).sum(axis=(1, 2, 3, 4)), rtol=1e-5)
    np.testing.assert_array_equal(reduced["tokens"], [22] * GPT2.n_layer)
    np.testing.assert_allclose(gpt2.run(IDS, reduce=reduce, layers=[1])["v"], np.asarray(reduced["v"])[1:2], rtol=1e-5)


def test_microbatches_change_nothing(gpt2, gpt2_whole):
    """Of two sequences and one that is left; those of one are in test_hands.py."""
    third = random_ids(GPT2, 1, 11, seed=1)
    ids, alone = np.concatenate([IDS, third]), gpt2.run(third, capture=ALL)
    cut = gpt2.run(ids, capture=ALL, memory=60_000)
    for field in ALL:
        expected = [np.asarray(each[field]) for each in (gpt2_whole, alone)]
        assert relative_error(cut[field], np.concatenate(expected, axis=int(field in FIELDS))) <= MODEL_LIMIT, field
    assert relative_error(gpt2.hidden(ids, memory=60_000), cut.hidden) <= MODEL_LIMIT
    # Also when an axis happens to be as long as a piece of the batch.
    for reduce in (lambda attention, mask: attention.k.mean(), lambda attention, mask: attention.k[:1].mean((2, 3))):
        with pytest.raises(JaxqkvError, match="must have it as its first axis"):
            gpt2.run(ids, reduce=reduce, memory=1)


def test_token_types_are_cut_along_with_the_batch(tmp_path):
    model = jaxqkv.load(write_folder(tmp_path / "bert", BERT))
    types = np.random.default_rng(1).integers(0, 2, IDS.shape)
    batch = Batch(ids=IDS, mask=np.ones(IDS.shape, bool), token_types=types)
    whole = model.hidden(batch)
    assert relative_error(model.hidden(batch, memory=1), whole) <= MODEL_LIMIT
    assert relative_error(model.hidden(IDS), whole) > 0.01


def test_reducer_gets_inputs_cut_along_with_the_batch(gpt2, gpt2_whole):
    """All at once, in two microbatches and in three."""
    rows = [0, 1, 0]
    ids = IDS[rows]
    inputs = {"weight": np.arange(3 * 11, dtype=np.float32).reshape(3, 11), "shift": np.arange(3, dtype=np.float32)}

    def reduce(attention, mask, inputs):
        return (attention.attn_out * inputs["weight"][:, :, None]).sum(axis=1) + inputs["shift"][:, None]

    expected = np.einsum("lbpe,bp->lbe", np.asarray(gpt2_whole.attn_out)[:1, rows], inputs["weight"])
    expected += inputs["shift"][:, None]
    for memory in (None, 1, 60_000, 10**9):
        reduced = gpt2.run(ids, reduce=reduce, inputs=inputs, memory=memory, layers=0)
        assert relative_error(reduced, expected) <= MODEL_LIMIT
    with pytest.raises(JaxqkvError, match=r"must be the batch of 3; one array is \[2\]"):
        gpt2.run(ids, reduce=reduce, inputs=inputs | {"shift": np.zeros(2)})
    with pytest.raises(JaxqkvError, match="`inputs` needs `reduce`"):
        gpt2.run(ids, inputs=inputs)


def test_progress_counts_microbatches_of_all_layers_that_are_run(gpt2):
    calls = []
    ids = random_ids(GPT2, 6, 11)
    gpt2.run(ids, capture=EVERYTHING, layers=[1], memory=60_000, progress=lambda *call: calls.append(call))
    assert calls == [(done, 6) for done in range(1, 7)]


def test_hidden_states_of_earlier_layers_are_let_go(tmp_path):
    deep = jaxqkv.load(write_folder(tmp_path / "deep", changed(GPT2, n_layer=13)))
    ids = random_ids(GPT2, 7, 11)  # a shape that no other test keeps
    shape, most = (7, 11, GPT2.n_embd), 0
    layer = Weights.layer

    def count(self, number):
        nonlocal most
        most = max(most, sum(array.shape == shape for array in jax.live_arrays()))
        return layer(self, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Weights, "layer", count)
        deep.hidden(ids)
    assert most <= 3


def test_streamed_equals_kept_and_is_read_as_often_as_promised(gpt2_folder, monkeypatch):
    read = []
    original = Weights.layer
    monkeypatch.setattr(Weights, "layer", lambda self, layer: read.append(layer) or original(self, layer))
    monkeypatch.setattr(sources, "perf_counter", itertools.count().__next__)  # every layer takes as long
    streamed, kept = (jaxqkv.load(gpt2_folder, stream=stream) for stream in (True, False))
    results = [model.run(IDS, capture=ALL) for model in (streamed, kept) for _ in range(4)]
    for field in FIELDS:
        for result in results[1:]:
            np.testing.assert_array_equal(getattr(result, field), getattr(results[0], field))
    assert read == 4 * [0, 1, 2] + 2 * [0, 1, 2]  # kept from the second use on
    streamed.params()
    assert read[18:] == [0, 1, 2]
    kept.params(copy=False)
    assert len(read) == 21
    kept.params()
    assert read[21:] == [0, 1, 2]


def test_layers_are_kept_little_by_little_where_memory_is_slow(gpt2_folder, monkeypatch):
    """Reading takes 1 s into the arena and 5 s into memory of its own, and a run may take 1 s for each of 3 layers."""
    read, now = [], [0]
    original = sources.StreamedParameters.read

    def slow(self, index, arena=None):
        read.append((index, "kept" if arena is None else "again"))
        now[0] += 5 if arena is None else 1
        return original(self, index, arena)

    monkeypatch.setattr(sources.StreamedParameters, "read", slow)
    monkeypatch.setattr(sources, "perf_counter", lambda: now[0])
    model = jaxqkv.load(gpt2_folder)
    runs = []
    for _ in range(5):
        read.clear()
        runs.append((model.run(IDS, capture=ALL), list(read)))
    assert [reads for _, reads in runs] == [
        [(0, "again"), (1, "again"), (2, "again")],
        [(0, "kept"), (1, "again"), (2, "again")],
        [(1, "kept"), (2, "again")],
        [(2, "kept")],
        [],
    ]
    for result, _ in runs[1:]:
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(result, field), getattr(runs[0][0], field))


def test_two_threads_run_one_model(gpt2_folder):
    model = jaxqkv.load(gpt2_folder, stream=True)
    batches = [random_ids(GPT2, 2, 11, seed) for seed in range(8)]
    alone = [model.hidden(ids) for ids in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(model.hidden, batches))
    for expected, actual in zip(alone, together, strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_jit_grad_and_vmap_over_a_batch(gpt2, gpt2_whole):
    @jax.jit
    def jitted(ids):
        mapped = jax.vmap(lambda row: gpt2.run(row[None], capture={"pattern", "hidden"}).pattern[:, 0], out_axes=1)
        acts = gpt2.run(ids, capture={"q", "pattern", "logits"})
        return acts.q, acts.pattern, acts.logits, mapped(ids)

    q, pattern, logits, mapped = jitted(IDS)
    assert relative_error(logits, gpt2.logits(IDS)) <= MODEL_LIMIT
    assert relative_error(q, gpt2_whole.q) <= MODEL_LIMIT
    assert relative_error(pattern, gpt2_whole.pattern) <= MODEL_LIMIT
    assert relative_error(mapped, gpt2_whole.pattern) <= MODEL_LIMIT

    def loss(scale):
        return jnp.vdot(scale * gpt2.run(IDS, capture=ALL).attn_out, gpt2_whole.attn_out)

    expected = (np.asarray(gpt2_whole.attn_out) ** 2).sum()
    np.testing.assert_allclose(jax.grad(loss)(2.0), expected, rtol=1e-5)
    assert relative_error(gpt2.run(IDS, capture=ALL).q, gpt2_whole.q) <= MODEL_LIMIT  # nothing leaked from tracing


def test_gradient_with_respect_to_parameters(config, model):
    """Against a central difference along a random direction; through one whole layer and into the next."""

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(params):
        return (jaxqkv.forward(params, IDS, config, capture={"z"}, layers=1).z ** 2).mean()

    params = jax.device_get(model.params())  # NumPy compiles nothing
    _, gradient = loss_and_gradient(params)
    generator = np.random.default_rng(0)
    direction = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), params)
    step = np.float32(1e-3)
    up, down = (
        float(loss_and_gradient(jax.tree.map(lambda p, d, s=s: p + s * d, params, direction))[0]) for s in (step, -step)
    )
    numerical = (up - down) / (2 * step)
    exact = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    np.testing.assert_allclose(exact, numerical, rtol=0.02)


def test_vmap_over_checkpoints(tmp_path):
    models = [jaxqkv.load(write_folder(tmp_path / str(s), GPT2, random_tensors(GPT2, s))) for s in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *(model.params() for model in models))
    capture = {"q", "hidden"}
    q = np.asarray(jax.vmap(lambda params: jaxqkv.forward(params, IDS, GPT2, capture=capture).q)(stacked))
    for index, model in enumerate(models):
        assert relative_error(q[index], model.run(IDS, capture=ALL).q) <= MODEL_LIMIT


def test_untied_logits_use_lm_head(tmp_path):
    untied = changed(GPT2, tie_word_embeddings=False)
    tensors = random_tensors(untied)
    model = jaxqkv.load(write_folder(tmp_path / "untied", untied, tensors))
    hidden = np.asarray(model.hidden(IDS), np.float64)
    np.testing.assert_allclose(model.logits(IDS), hidden @ tensors["lm_head.weight"].T, atol=1e-4)
    assert not model.weights.tied


def tied_with_lm_head(path, lm_head, flag=True):
    """A folder whose config.json ties the embeddings, or says nothing of it, and whose file has both."""
    folder = write_folder(path, GPT2, random_tensors(GPT2) | {"lm_head.weight": lm_head})
    data = json.loads((folder / "config.json").read_text())
    data.pop("tie_word_embeddings")
    (folder / "config.json").write_text(json.dumps(data | ({"tie_word_embeddings": True} if flag else {})))
    return folder


@pytest.mark.parametrize(("row", "flag"), [(0, True), (42, False)], ids=["first row, tied", "last row, not said"])
def test_an_output_embedding_that_differs_is_used_and_named(tmp_path, monkeypatch, flag, row):
    """As transformers 5 does; from the first row or in the last alone, found piece by piece."""
    monkeypatch.setattr("jaxqkv.checkpoints.weights.ROWS", 7)
    lm_head = random_tensors(GPT2)["wte.weight"].copy()
    lm_head[row] *= 2
    folder = tied_with_lm_head(tmp_path / "x", lm_head, flag)
    model, ids = jaxqkv.load(folder), IDS
    hidden = np.asarray(model.hidden(ids), np.float64)  # warnings are errors: nothing is said where it is not used
    with pytest.warns(JaxqkvWarning, match=r"lm_head.weight differs from wte.weight, .*; logits use lm_head.weight"):
        logits = model.logits(ids)
    np.testing.assert_allclose(logits, hidden @ lm_head.T, atol=1e-4)
    np.testing.assert_array_equal(model.logits(ids), logits)  # said once
    params = model.params()
    np.testing.assert_array_equal(jaxqkv.logits(params, ids, model.config), logits)
    saved = tensors_from_params(params, model.config)
    np.testing.assert_array_equal(saved["lm_head.weight"], lm_head)
    assert model.weights.names[-1] == "lm_head.weight"
    assert not model.weights.tied
    assert model.weights.parameters()["Output Embedding"] == 43 * 35
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    torch = pytest.importorskip("torch", exc_type=ImportError)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(ids).long()).logits.numpy()
    assert relative_error(logits, expected) <= 1e-5


def test_an_output_embedding_that_is_the_token_embedding(tmp_path, monkeypatch):
    """Both are compared once, where logits are made or parameters counted, and kept once."""
    folder = tied_with_lm_head(tmp_path / "x", random_tensors(GPT2)["wte.weight"])
    read = []
    tensor = MappedFile.tensor
    monkeypatch.setattr(MappedFile, "tensor", lambda self, key: read.append(key) or tensor(self, key))
    model, ids = jaxqkv.load(folder), IDS
    model.hidden(ids)
    assert "lm_head.weight" not in read
    logits = model.logits(ids)
    model.logits(ids)
    model.weights.parameters()
    assert read.count("lm_head.weight") == 1
    assert model.weights.tied
    assert "lm_head" not in model.params()["final"]
    assert model.weights.parameters()["Output Embedding"] == 0
    np.testing.assert_array_equal(logits, jaxqkv.load(write_folder(tmp_path / "one", GPT2)).logits(ids))


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        ({"scale_attn_weights": False}, lambda layer: np.sqrt(GPT2.head_dim)),
        ({"scale_attn_by_inverse_layer_idx": True}, lambda layer: 1 / (layer + 1)),
    ],
)
def test_settings_of_the_scale(tmp_path, change, factor):
    model = jaxqkv.load(write_folder(tmp_path / "x", changed(GPT2, **change)))
    activations = model.run(IDS, capture={"q", "k", "scores", "hidden"})  # all layers by one program
    q, k, scores = (np.asarray(activations[field], np.float64) for field in ("q", "k", "scores"))
    for layer in range(GPT2.n_layer):
        expected = q[layer] @ k[layer].swapaxes(-1, -2) / np.sqrt(GPT2.head_dim) * factor(layer)
        assert relative_error(scores[layer], expected) < 1e-5


def test_bfloat16_arithmetic_is_close_and_really_bfloat16(folder, whole):
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms compute in float32 inside
        rough = jaxqkv.load(folder, dtype=jnp.bfloat16).run(IDS, capture=ALL)
    assert rough.q.dtype == jnp.bfloat16
    assert 1e-4 < relative_error(np.asarray(rough.q)[0].astype(np.float32), np.asarray(whole.q)[0]) < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"capture": {"q", "attention"}}, "cannot capture attention; did you mean pattern?"),
        ({"capture": set()}, "give exactly one of `capture`, .* and `reduce`"),
        (
            {"capture": {"q"}, "reduce": lambda attention, mask: 0},
            "give exactly one of `capture`, .* and `reduce`",
        ),
        ({"layers": 3}, "no layer 3; the model's layers are 0 to 2"),
        ({"layers": [-1, 0]}, "no layer -1"),
        ({"layers": []}, "no layer selected"),
    ],
)
def test_bad_questions(gpt2, arguments, message):
    with pytest.raises(JaxqkvError, match=message):
        gpt2.run(IDS, **arguments)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros((1, 18), np.int32), "18 tokens are more than the model's 17 positions"),
        (np.array([[43]]), "the model's are 0 to 42"),
        (np.array([[-1]]), "reach from -1"),
        (np.zeros(3, np.int32), r"expected integer ids \[batch, pos\], got int32 \[3\]"),
        (np.zeros((2, 3)), r"got float64 \[2, 3\]"),
        (np.zeros((0, 3), np.int32), r"got int32 \[0, 3\]"),
        ([[1, 2], [3]], "rows of one length"),
        (masked_batch(np.full((1, 3), 43), np.ones((1, 3), bool)), "the model's are 0 to 42"),
    ],
)
def test_bad_ids(gpt2, ids, message):
    with pytest.raises(JaxqkvError, match=message):
        gpt2.run(ids)


def with_types(token_types):
    """A batch with the token types of the first sequence's last three tokens, the last of which is a pad."""
    mask, types = np.ones(IDS.shape, bool), np.zeros(IDS.shape, int)
    mask[0, -1], types[0, -3:] = False, token_types
    return Batch(ids=IDS, mask=mask, token_types=types)


@pytest.mark.parametrize("token_types", [[0, 2, 0], [0, -1, 0], [0, 0, 2], [0, 0, 1]])
@pytest.mark.parametrize(
    "run",
    [
        lambda model, batch: model.run(batch, capture=ALL),
        jaxqkv.Model.hidden,
        lambda model, batch: next(model.layerwise(batch, capture=EVERYTHING)),
    ],
    ids=["run", "hidden", "layerwise"],
)
def test_bad_token_types(model, config, token_types, run):
    """At pads too, whose values would be NaN and spread."""
    message = "the model's are 0 to 1" if config is BERT else r"the model's are 0 alone \(gpt2\)"
    if config is BERT and max(token_types) == 1:
        run(model, with_types(token_types))
        return
    with pytest.raises(
        JaxqkvError, match=rf"token_types reach from {min(token_types)} to {max(token_types)}; {message}"
    ):
        run(model, with_types(token_types))


def test_the_one_token_type_of_a_bert_is_0(tmp_path):
    model = jaxqkv.load(write_folder(tmp_path / "x", changed(BERT, type_vocab_size=1)))
    with pytest.raises(JaxqkvError, match="token_types reach from 0 to 1; the model's are 0 alone"):
        model.hidden(with_types([0, 1, 0]))


@pytest.mark.parametrize("config", ["bert"], indirect=True)
def test_token_types_are_not_read_while_tracing(model):
    batch = with_types([0, 1, 0])
    embedded = jax.jit(lambda batch: model.run(batch, capture={"resid_pre"}, layers=0).resid_pre)
    expected = np.asarray(model.run(batch, capture=ALL).resid_pre)[:1]
    assert relative_error(embedded(jax.tree.map(jnp.asarray, batch)), expected) <= MODEL_LIMIT


def test_wrong_types_without_the_suites_own_checks(gpt2, monkeypatch):
    """The suite's type checks would refuse these before the package does."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    ids = np.zeros((1, 3), int)
    mask = np.ones((1, 3), bool)
    batch = Batch(ids=ids, mask=mask[:, :2], token_types=ids)
    for run, message in (
        (lambda: gpt2.run(ids, layers=[0.5]), "layers are whole numbers, not [0.5]"),
        (lambda: gpt2.run(ids, layers="1"), "layers are whole numbers, not '1'"),
        (
            lambda: gpt2.run(ids, reduce="mean"),
            "`reduce` is a function of one layer's Attention and the mask, not 'mean'",
        ),
        (lambda: gpt2.run(batch), "mask [1, 2] does not match ids [1, 3]"),
        (
            lambda: gpt2.run(batch.replace(mask=ids)),
            "mask is boolean, True at real tokens, not int64; `Batch.of` takes 1 and 0",
        ),
        (lambda: gpt2.run(np.zeros((2, 3))), "expected integer ids [batch, pos], got float64 [2, 3]"),
        (
            lambda: gpt2.run(Batch(ids=ids, mask=mask, token_types=np.zeros((1, 3)))),
            "expected integer token_types [batch, pos], got float64",
        ),
    ):
        with pytest.raises(JaxqkvError) as caught:
            run()
        assert str(caught.value) == message


@pytest.mark.parametrize("dtype", ["int32", "float64", "nonsense"])
def test_dtypes_that_would_change_the_numbers_silently(gpt2_folder, dtype):
    with pytest.raises(JaxqkvError, match="dtype is one of float32, bfloat16, float16, not "):
        jaxqkv.load(gpt2_folder, dtype=dtype)


def test_bert_has_no_logits(tmp_path):
    model = jaxqkv.load(write_folder(tmp_path / "x", BERT))
    with pytest.raises(JaxqkvError, match="bert has no next-token logits"):
        model.logits(random_ids(BERT, 1, 3))


@pytest.mark.parametrize("name", ["gpt2-xl", "bert-large-uncased"])
def test_full_sizes_for_nothing(name):
    """Shapes of a whole forward pass at the real sizes, without a weight or a product."""
    config = REGISTRY.known[name]
    model = jaxqkv.load(f"random:{name}")
    zeros = {key: np.broadcast_to(np.float32(0), rule.shape) for key, rule in model.weights._rules.items()}
    model.checkpoint.tensor = zeros.__getitem__
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        {"embed": model.weights.embed(), "final": model.weights.final(),
         "layers": [model.weights.layer(layer) for layer in range(config.n_layer)]},
    )  # fmt: skip
    ids = jax.ShapeDtypeStruct((2, 7), jnp.int32)
    q = jax.eval_shape(lambda params, ids: jaxqkv.forward(params, ids, config).q, shapes, ids)
    assert q.shape == (config.n_layer, 2, config.n_head, 7, config.head_dim)


def test_only_the_embeddings_of_a_text_are_read_until_all_layers_are_kept(folder, config, monkeypatch):
    """Against a run with the whole table, which a model that keeps nothing never reads."""
    ids = IDS
    whole = jaxqkv.load(folder)
    whole.params()
    expected = np.asarray(whole.run(ids, capture=ALL).q)
    read = []
    embed = jaxqkv.checkpoints.weights.Weights.embed
    monkeypatch.setattr(jaxqkv.model.sources, "FEWEST_ROWS", 4)
    monkeypatch.setattr(
        jaxqkv.checkpoints.weights.Weights,
        "embed",
        lambda self, tokens=None: read.append(tokens) or embed(self, tokens),
    )
    monkeypatch.setattr(sources, "perf_counter", itertools.count().__next__)  # every layer takes as long
    kept, streamed = jaxqkv.load(folder), jaxqkv.load(folder, stream=True)
    for model in 4 * (kept, streamed):
        np.testing.assert_array_equal(np.asarray(model.run(ids, capture=ALL).q), expected)
    assert [tokens is None for tokens in read] == [*4 * (False,), True, *2 * (False,)]  # of the fourth `kept`, nothing
    for tokens in filter(lambda tokens: tokens is not None, read):
        # 9 to 22 different tokens, in a table of 16 or 32 rows.
        assert len(tokens) in (16, 32)
        assert set(tokens) == set(ids.ravel())
    if config.model_type == "gpt2":
        assert relative_error(streamed.logits(ids), whole.logits(ids)) <= MODEL_LIMIT
