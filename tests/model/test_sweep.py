"""A sweep gives what a loop of single edits gives, in one pass; its metrics are those of the definitions."""

import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from conftest import BERT, GPT2, MODEL_LIMIT, random_ids, relative_error, write_folder
from helpers.oracles import masked_batch

import jaxqkv
from jaxqkv import edits, metrics
from jaxqkv.checkpoints.weights import Weights
from jaxqkv.errors import JaxqkvError
from jaxqkv.model import microbatches, sources, sweep

POS = 7
MASK = np.ones((3, POS), bool)
MASK[0, :2] = MASK[2, 4:] = False
HEADS = [(layer, head) for layer in range(3) for head in range(5)]
DIFFERENCE = metrics.logit_difference(7, [3, 4, 5])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("sweep") / "gpt2", GPT2)


@pytest.fixture(scope="module")
def model(folder):
    return jaxqkv.load(folder)


@pytest.fixture(scope="module")
def batch():
    return masked_batch(random_ids(GPT2, 3, POS), MASK)


FIELDS = {"z", "scores", "hidden"}  # with `hidden`, all layers are one program


@pytest.fixture(scope="module")
def donor(model):
    return model.run(masked_batch(random_ids(GPT2, 3, POS, seed=4), MASK), capture=FIELDS)


@pytest.fixture(scope="module")
def clean(model, batch):
    return model.run(batch, capture=FIELDS)


def loop(model, batch, edit, metric, field="z"):
    """The same, one run a head: `[text, layer, head]`."""
    found = [model.measure(batch, metric, {field: edit([pair])}, per_text=True) for pair in HEADS]
    return np.stack(found, axis=1).reshape(-1, 3, 5)


# --- equal to the loop ---


@pytest.mark.parametrize(
    ("field", "make"),
    [
        ("z", lambda donor: edits.zero),
        ("z", lambda donor: lambda heads: edits.replace(donor, heads, positions=[[2], [3], [1]])),
        ("pattern", lambda donor: lambda heads: edits.mean(heads, keys=[0, 1, 3], renormalise=True)),
        ("k", lambda donor: lambda heads: edits.noise(heads[0][1], 0.1 * (1 + heads[0][0]), heads)),
    ],
    ids=["zero", "replace", "mean", "noise"],
)
def test_equals_a_loop_of_single_edits(field, make, model, batch, donor):
    edit = make(donor)
    expected = loop(model, batch, edit, DIFFERENCE, field)
    found = model.sweep(batch, edit, DIFFERENCE, field, per_text=True)
    assert found.shape == (3, 3, 5)
    assert relative_error(found, expected) <= MODEL_LIMIT
    assert np.ptp(found, axis=(1, 2)).min() > 0.01
    # Means over texts, of some layers in another order.
    few = model.sweep(batch, edit, DIFFERENCE, field, layers=[2, 0])
    assert relative_error(few, expected.mean(0)[[2, 0]]) <= MODEL_LIMIT


def test_hidden_states_of_bert(tmp_path, batch):
    model = jaxqkv.load(write_folder(tmp_path / "bert", BERT))
    metric = metrics.of_hidden(lambda hidden: (hidden[:, 0, 3], (hidden**2).mean((1, 2))), positions=[[2], [0], [3]])
    first, second = model.sweep(batch, edits.zero, metric, per_text=True)
    expected = [model.hidden(batch, edit={"z": edits.zero([pair])}) for pair in HEADS]
    at = np.stack([np.asarray(hidden)[np.arange(3), [2, 0, 3]] for hidden in expected], axis=1).reshape(3, 3, 5, 35)
    assert relative_error(first, at[..., 3]) <= MODEL_LIMIT
    assert relative_error(second, (at**2).mean(-1)) <= MODEL_LIMIT
    with pytest.raises(JaxqkvError, match="logits"):
        model.sweep(batch, edits.zero, DIFFERENCE)


def test_each_position_apart(model, batch):
    found = model.sweep(batch, edits.zero, DIFFERENCE, by_position=True, per_text=True)
    assert found.shape == (3, 3, 5, POS)
    clean = model.measure(batch, DIFFERENCE, per_text=True)
    for layer, head, pos in [(0, 1, 2), (1, 4, 0), (2, 3, 3), (2, 0, 6)]:
        edit = {"z": edits.zero([(layer, head)], positions=pos)}
        expected = model.measure(batch, DIFFERENCE, edit, per_text=True)
        assert relative_error(found[:, layer, head, pos], expected) <= MODEL_LIMIT
    pads = np.moveaxis(found, -1, 1)[~MASK]
    np.testing.assert_allclose(pads, np.broadcast_to(clean[np.nonzero(~MASK)[0]][:, None, None], pads.shape), rtol=1e-5)
    real = np.where(MASK[:, None, None], found, np.nan)
    means = model.sweep(batch, edits.zero, DIFFERENCE, by_position=True)
    assert relative_error(means, np.nanmean(real, axis=0)) <= MODEL_LIMIT


def test_memory_streams_and_pieces_change_nothing(folder, model, batch):
    """Groups of branches in several passes, texts one by one, layers read each time."""
    both = {"a": DIFFERENCE, "b": metrics.divergence()}
    clean = model.sweep(batch, edits.zero, both, per_text=True)
    streamed = jaxqkv.load(folder, stream=True)
    found = streamed.sweep(batch, edits.zero, both, per_text=True, memory=30_000)
    for name in clean:
        assert relative_error(found[name], clean[name]) <= MODEL_LIMIT


@pytest.mark.parametrize(
    ("sequences", "calls"),
    [(31, [(1, 4), (2, 4), (4, 4)]), (200, [(1, 3), (2, 3), (3, 3)])],
    ids=["two layers", "all layers"],
)
def test_branches_of_several_layers_in_one_chunk_change_nothing(sequences, calls, model, batch, monkeypatch):
    """As on an accelerator; five heads and three texts are fifteen sequences a layer."""
    clean = model.sweep(batch, edits.zero, DIFFERENCE, per_text=True)
    monkeypatch.setattr(microbatches, "sequences_to_join", lambda pos: sequences)
    said = []
    found = model.sweep(batch, edits.zero, DIFFERENCE, per_text=True, progress=lambda *call: said.append(call))
    assert said == calls
    assert relative_error(found, clean) <= MODEL_LIMIT
    monkeypatch.setattr(sweep, "BRANCH_BYTES", 1)  # each chunk in a pass of its own
    found = model.sweep(batch, edits.zero, DIFFERENCE, per_text=True)
    assert relative_error(found, clean) <= MODEL_LIMIT


def test_each_layer_is_read_once(folder, batch, monkeypatch):
    read, calls = [], []
    original = Weights.layer
    monkeypatch.setattr(Weights, "layer", lambda self, layer: read.append(layer) or original(self, layer))
    model = jaxqkv.load(folder, stream=True)
    model.sweep(batch, edits.zero, DIFFERENCE, progress=lambda *call: calls.append(call))
    assert read == [0, 1, 2]
    assert calls == [(1, 6), (3, 6), (6, 6)]  # a chunk of five heads a layer goes on with those before it
    read.clear()
    model.sweep(batch, edits.zero, DIFFERENCE, layers=1, method="gradient")
    assert read == [0, 1, 2, 2, 1]


def test_layers_are_kept_from_their_second_use_in_the_same_sweep_on(folder, batch, monkeypatch):
    read = []
    original = Weights.layer
    monkeypatch.setattr(Weights, "layer", lambda self, layer: read.append(layer) or original(self, layer))
    monkeypatch.setattr(sources, "perf_counter", itertools.count().__next__)  # every layer takes as long
    model = jaxqkv.load(folder)
    for reads in ([0, 1, 2, 2, 1], [0], []):
        model.sweep(batch, edits.zero, DIFFERENCE, layers=1, method="gradient")
        assert read == reads
        read.clear()


def test_other_donors_keys_and_tokens_compile_nothing(model, batch, donor, caplog):
    def compilations(function):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
            function()
        return sum("Compiling" in record.getMessage() for record in caplog.records)

    def swept(donor, at, metric, method):
        model.sweep(batch, lambda heads: edits.replace(donor, heads, positions=at), metric, method=method)

    other = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)[..., ::-1]), donor).replace(mask=donor.mask)
    firsts, metric = 0, metrics.logit_difference(1, [2, 8, 9])
    for method in ("exact", "gradient"):
        firsts += compilations(lambda: swept(donor, [[2], [3], [1]], DIFFERENCE, method))  # noqa: B023
        assert compilations(lambda: swept(other, [[3], [2], [0]], metric, method)) == 0  # noqa: B023
    assert firsts >= 1
    model.sweep(batch, lambda heads: edits.noise(0, 0.1, heads), DIFFERENCE, "k")
    assert compilations(lambda: model.sweep(batch, lambda heads: edits.noise(5, 0.2, heads), DIFFERENCE, "k")) == 0


# --- metrics ---


def test_metrics_are_those_of_the_definitions(model, batch):
    edit = {"z": edits.zero([(1, 2), (0, 0)])}
    clean, found = (np.asarray(model.logits(batch, edit=each), np.float64) for each in (None, edit))
    rows, last = np.arange(3), np.asarray(batch.last)
    log_p, log_clean = (scipy.special.log_softmax(logits[rows, last], axis=-1) for logits in (found, clean))
    expected = {
        "difference": found[rows, last, 7] - found[rows, last, [3, 4, 5]],
        "one": log_p[:, 9],
        "own": log_p[rows, [9, 1, 2]],
        "largest": log_p.max(-1),
        "divergence": scipy.special.rel_entr(np.exp(log_clean), np.exp(log_p)).sum(-1),
        "two": scipy.special.log_softmax(found[:, [2, 3]], axis=-1)[:, :, 9].mean(1),
        "there": scipy.special.log_softmax(found[rows, [4, 0, 1]], axis=-1).max(-1),
        "mine": found[rows, last].std(-1),
    }
    given = {
        "difference": DIFFERENCE,
        "one": metrics.log_probability(9),
        "own": metrics.log_probability(np.array([9, 1, 2])),
        "largest": metrics.largest,
        "divergence": metrics.divergence,
        "two": metrics.log_probability(9, positions=[2, 3]),
        "there": metrics.largest(positions=[[4], [0], [1]]),
        "mine": lambda logits: logits.std(-1),
    }
    measured = model.measure(batch, given, edit, per_text=True)
    for name, values in expected.items():
        np.testing.assert_allclose(measured[name], values, atol=1e-5 * np.abs(found).max(), err_msg=name)
    assert model.measure(batch, DIFFERENCE, edit) == pytest.approx(expected["difference"].mean(), rel=1e-4)
    unedited = model.measure(batch, metrics.divergence)
    assert abs(unedited) < 1e-6 < 1e-3 < expected["divergence"].mean()


# --- the first-order approximation ---


@pytest.fixture(scope="module")
def gradients(model, batch):
    """Of the difference by z and by scores, by `jax.grad` through the whole model."""
    params, last = model.params(), np.asarray(batch.last)

    def metric(added):
        def plus(values):
            return lambda value, site: value + jax.lax.dynamic_index_in_dim(values, site.layer, keepdims=False)

        add = {field: plus(values) for field, values in added.items()}
        logits = jaxqkv.logits(params, batch, model.config, edit=add)[np.arange(3), last]
        return (logits[:, 7] - logits[np.arange(3), np.array([3, 4, 5])]).sum()

    zeros = {"z": np.zeros((3, 3, 5, POS, 7), np.float32), "scores": np.zeros((3, 3, 5, POS, POS), np.float32)}
    return {field: np.asarray(each, np.float64) for field, each in jax.jit(jax.grad(metric))(zeros).items()}


@pytest.mark.parametrize("field", ["z", "scores"])
def test_first_order_is_the_gradient_at_added_zeros(field, model, batch, clean, gradients):
    before = model.measure(batch, DIFFERENCE, per_text=True)[:, None, None]
    # Zeroing needs no run: the difference is minus the value.
    seen = MASK[:, None, :, None] if field == "z" else np.tril(MASK[:, None, :] & MASK[:, :, None])[:, None]
    values = np.where(seen, np.asarray(clean[field], np.float64), 0)
    expected = np.moveaxis((gradients[field] * -values).sum((-1, -2)), 1, 0)
    found = model.sweep(batch, edits.zero, DIFFERENCE, field, per_text=True, method="gradient")
    assert relative_error(found - before, expected) <= 1e-4
    if field == "scores":  # other edits and single positions are not a field's business
        return
    at = model.sweep(batch, edits.zero, DIFFERENCE, field, per_text=True, method="gradient", by_position=True)
    assert relative_error((at - before[..., None]).sum(-1), expected) <= 1e-4
    means = values.sum(-2, keepdims=True) / MASK.sum(-1)[:, None, None, None]
    difference = np.where(seen, means - values, 0)
    found = model.sweep(batch, edits.mean, DIFFERENCE, field, per_text=True, method="gradient")
    assert relative_error(found - before, np.moveaxis((gradients["z"] * difference).sum((-1, -2)), 1, 0)) <= 1e-4


def test_first_order_and_exact_agree_where_changes_are_small(model, batch):
    """A head scaled by .99: the same sign and rank; the difference is of second order."""
    before = model.measure(batch, DIFFERENCE)
    slightly = lambda heads: edits.scale(0.99, heads)  # noqa: E731
    found = {
        method: model.sweep(batch, slightly, DIFFERENCE, method=method) - before for method in ("exact", "gradient")
    }
    assert relative_error(found["exact"], found["gradient"]) < 0.05
    assert scipy.stats.spearmanr(found["exact"].ravel(), found["gradient"].ravel()).statistic > 0.95
    clear = np.abs(found["gradient"]) > 0.1 * np.abs(found["gradient"]).max()
    assert (np.sign(found["exact"]) == np.sign(found["gradient"]))[clear].all()


# --- refusals ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"field": "mlp_out"}, "a sweep edits heads, and mlp_out has none"),
        ({"method": "linear"}, "method is one of exact, gradient, not 'linear'"),
        ({"layers": 3}, "no layer 3; the model's layers are 0 to 2"),
        ({"edit": lambda heads: lambda value, site: value}, "or a jax.tree_util.Partial, not function"),
        ({"edit": lambda heads: edits.zero(heads, positions=1), "by_position": True}, "leave them out of `edit`"),
        ({"edit": lambda heads: edits.zero(heads) if heads[0][0] else edits.mean(heads)}, "edits of different kinds"),
        ({"edit": lambda heads: edits.zero(heads, positions=list(range(1 + heads[0][1])))}, "of different shapes"),
        ({"edit": lambda heads: edits.zero([(5, 5)])}, r"the edit of z names \(layer, head\) \(5, 5\)"),
        ({"metric": 3}, "a metric is one of jaxqkv.metrics, or a function of logits, not 3"),
        ({"metric": {}}, "no metric is given"),
        ({"metric": metrics.largest(positions=7)}, "the metric names position 7; there are 0 to 6"),
        ({"metric": metrics.largest(positions=[[1], [2]])}, r"whole numbers \[n\], or \[batch=3, n\]"),
        ({"metric": metrics.divergence, "method": "gradient"}, "the gradient of a divergence from the clean run is 0"),
        ({"metric": lambda logits: logits, "method": "gradient"}, "metrics that are one number for each text"),
        ({"metric": lambda logits: logits[:, 1].mean()}, r"a value for each text, \[batch=3, …\], not an array \[\]"),
        ({"metric": lambda logits: (logits, logits[:2, 1])}, r"\[batch=3, …\], not an array \[2\]"),
        ({"edit": edits.zero()}, "give the constructor, as edits.zero, not an edit"),
    ],
)  # fmt: skip
def test_refused(changes, message, model, batch):
    with pytest.raises(JaxqkvError, match=message):
        model.sweep(**{"batch": batch, "edit": edits.zero, "metric": DIFFERENCE} | changes)


def test_a_metric_of_a_run_has_a_value_for_each_text_too(model, batch):
    with pytest.raises(JaxqkvError, match=r"a value for each text, \[batch=3, …\], not an array \[\]"):
        model.measure(batch, lambda logits: logits[:, 1].mean())


def test_tokens_are_ids():
    with pytest.raises(JaxqkvError, match="a metric takes token ids, not ' a'"):
        metrics.log_probability(" a")
    with pytest.raises(JaxqkvError, match=r"tokens of a metric are ids, one or \[batch\], not float64"):
        metrics.log_probability(0.5)
