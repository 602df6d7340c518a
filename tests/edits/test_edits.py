"""What edits promise whatever they change: pure, compiled once, alike on every path, and refused by name."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BERT, GPT2, MODEL_LIMIT, changed, random_ids, relative_error, write_folder
from helpers.oracles import masked_batch

import jaxqkv
from jaxqkv import edits
from jaxqkv.architectures.activations import FIELDS, Activations
from jaxqkv.errors import JaxqkvError
from jaxqkv.model.editing import place

POS = 11
MASK = np.ones((3, POS), bool)
MASK[0, :3] = MASK[2, 8:] = False  # as many on either side: alone, both texts take the same program


# With `hidden`, all layers are one program: what runs take where another field would do.
ALL = {*FIELDS, "hidden"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {config.model_type: jaxqkv.load(write_folder(base / config.model_type, config)) for config in (GPT2, BERT)}


@pytest.fixture(scope="module")
def gpt2(models):
    return models["gpt2"]


@pytest.fixture(scope="module")
def batch():
    return masked_batch(random_ids(GPT2, 3, POS), MASK)


@pytest.fixture(scope="module")
def clean(gpt2, batch):
    """The run without edits."""
    return gpt2.run(batch, capture=ALL)


@pytest.fixture(scope="module")
def donor(gpt2):
    return gpt2.run(masked_batch(random_ids(GPT2, 3, POS, seed=4), MASK), capture=ALL)


# --- what stays as it is ---


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_value_in_its_own_place_changes_no_bit(name, models, batch):
    """Replaced by itself, multiplied by 1 and returned by a function, one after another."""
    model = models[name]
    own = model.run(batch, capture=ALL)
    several = [edits.replace(own), edits.scale(1.0), lambda value, site: value]
    found = model.run(batch, capture=ALL, edit=dict.fromkeys(FIELDS, several))
    for field in ALL:
        np.testing.assert_array_equal(found[field], own[field], err_msg=field)


def test_nor_where_attention_is_sliced(tmp_path):
    """From 128 positions on, one head of one text at a time."""
    model = jaxqkv.load(write_folder(tmp_path / "long", changed(GPT2, n_positions=131)))
    ids = random_ids(GPT2, 2, 131)
    own = model.run(ids, capture=ALL)

    def edited(replaced, strength):
        several = dict.fromkeys(FIELDS, edits.replace(own, layers=np.full(3, replaced)))
        return model.run(ids, capture=ALL, edit=several | {"pattern": [several["pattern"], edits.scale(strength)]})

    strength = np.ones((3, 5), np.float32)
    found = edited(True, strength)
    for field in ALL:
        np.testing.assert_array_equal(found[field], own[field], err_msg=field)
    strength[1, 3] = 0
    silent = edited(False, strength)
    assert not np.asarray(silent.pattern)[1, :, 3].any()
    expected = np.asarray(own.z)[1] * (np.arange(5) != 3)[None, :, None, None]
    np.testing.assert_array_equal(np.asarray(silent.z)[1], expected)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_layer_replaced_wholly_gives_the_donors_output(name, models):
    model = models[name]
    ids, others = random_ids(GPT2, 3, POS), random_ids(GPT2, 3, POS, seed=1)
    donor = model.run(others, capture=ALL, layers=[1])
    found = model.hidden(ids, edit={"resid_post": edits.replace(donor)})
    np.testing.assert_array_equal(found, donor.hidden)


def of_all_kinds(positions=None):
    """Edits of fields with heads, with keys and with neither; of one structure, and so one program.

    Those that draw numbers; the others are compared text by text in test_against_hooks.py.
    """
    several = [edits.permute(3, layers=[0, 2], positions=positions), edits.noise(4, 0.5, positions=positions)]
    return dict.fromkeys(("z", "scores", "mlp_out"), several)


def test_editing_one_sentence_changes_no_other(gpt2, batch):
    before = np.asarray(gpt2.hidden(batch))
    nowhere, positions = np.zeros_like(MASK), np.zeros_like(MASK)
    positions[1] = True
    for field, several in of_all_kinds(positions).items():
        found = np.asarray(gpt2.hidden(batch, edit=of_all_kinds(nowhere) | {field: several}))
        np.testing.assert_array_equal(found[::2], before[::2])
        assert relative_error(found[1], before[1]) > 0.01


def test_padding_and_other_texts_change_nothing(gpt2, batch):
    """Compares two texts of one length, with pads on either side."""
    together = np.asarray(gpt2.hidden(batch, edit=of_all_kinds()))
    for text in (0, 2):
        mask = MASK[text]
        alone = gpt2.hidden(np.asarray(batch.ids)[text, mask][None], edit=of_all_kinds())
        assert relative_error(together[text, mask], alone[0]) <= MODEL_LIMIT


# --- one program ---


def compilations(caplog, function):
    """How many programs are compiled in a call."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        jax.block_until_ready(function())
    return sum("Compiling" in record.getMessage() for record in caplog.records)


def test_another_head_donor_key_or_strength_compiles_nothing(gpt2, batch, donor, caplog):
    other = gpt2.run(masked_batch(random_ids(GPT2, 3, POS, seed=5), MASK), capture=ALL)
    few = gpt2.run(masked_batch(random_ids(GPT2, 3, POS, seed=6), MASK), capture=ALL, layers=[2, 0])
    mask = np.zeros((3, 5), bool)
    mask[1, ::2] = True
    gpt2.logits(batch)
    kinds = {
        "zero": [edits.zero([(0, 1)]), edits.zero(mask), edits.zero(layers=2, positions=3), edits.scale(0.3, (2, 2)),
                 edits.zero(), edits.scale(np.ones((3, 5)), [(0, 0), (1, 1)], positions=[1, 2])],
        "replace": [edits.replace(donor, [(1, 2)]), edits.replace(other, mask, positions=[2, 3], source=[5, 4]),
                    edits.replace(other, positions=4)],
        "permute": [edits.permute(0, [(0, 1)]), edits.permute(jax.random.key(5), (2, 1), positions=[1, 4])],
        "noise": [edits.noise(0, 0.1), edits.noise(1, np.full((3, 5), 2.0), mask)],
        "mean": [edits.mean([(0, 1)]), edits.mean(layers=2)],
    }  # fmt: skip
    run = functools.partial(gpt2.logits, batch)
    firsts = {kind: several[0] for kind, several in kinds.items()}
    assert compilations(caplog, lambda: run(edit={"z": list(firsts.values())})) >= 1
    for kind, several in kinds.items():
        for edit in several[1:]:
            one_other = list((firsts | {kind: edit}).values())
            assert compilations(caplog, lambda edit=one_other: run(edit={"z": edit})) == 0, kind
    compilations(caplog, lambda: run(edit={"z": edits.replace(few, [(0, 3)])}))
    assert compilations(caplog, lambda: run(edit={"z": edits.replace(few, [(2, 1)])})) == 0
    assert compilations(caplog, lambda: run()) == 0  # and nothing is left of them


def test_a_function_is_compiled_once_for_what_it_sees(gpt2, batch, caplog):
    def gate(amount):
        return lambda value, site: value * amount

    run = functools.partial(gpt2.logits, batch)
    assert compilations(caplog, lambda: run(edit={"z": gate(0.5)})) >= 1
    assert compilations(caplog, lambda: run(edit={"z": gate(0.5)})) == 0
    assert compilations(caplog, lambda: run(edit={"z": gate(0.25)})) >= 1
    partial = jax.tree_util.Partial(multiplied, jnp.float32(0.5))
    np.testing.assert_array_equal(run(edit={"z": partial}), run(edit={"z": gate(0.5)}))
    partial = jax.tree_util.Partial(multiplied, jnp.float32(0.25))
    assert compilations(caplog, lambda: run(edit={"z": partial})) == 0


def multiplied(amount, value, site):
    return value * amount


# --- pure ---


@pytest.fixture(scope="module")
def score(gpt2, batch):
    """A number of an edited run, as a pure function of the edit."""
    params, chosen = gpt2.params(), np.asarray(batch.last)

    def of(edit, ids=batch.ids):
        logits = jaxqkv.logits(params, masked_batch(ids, MASK), gpt2.config, edit=edit)
        logits = logits[np.arange(3), chosen]
        return (logits[:, 7] - logits[:, 3]).mean()

    return of


def several_of_z(first, values, key, positions):
    """An edit of each kind of argument, of one structure, and so one program outside of `jit`."""
    return {"z": [first, edits.replace(values, [(1, 2)]), edits.permute(key, [(0, 3)], positions=positions)]}


def test_jit_takes_edits(score, donor):
    jitted, z = jax.jit(score), np.asarray(donor.z)
    for first, values in ((edits.zero([(1, 2)]), z), (edits.zero([(0, 4)]), -z), (edits.scale(0.5, [(2, 0)]), z)):
        edit = several_of_z(first, values, jax.random.key(7), [1, 5, 2])
        assert jitted(edit) == pytest.approx(float(score(edit)), rel=1e-5)
    assert jitted._cache_size() == 1 if hasattr(jitted, "_cache_size") else True


def test_gradient_by_strength_is_a_difference_quotient(score):
    """Compares every head's exact derivative by its gate at 1 with central differences of the model.

    By a number that a function multiplies by, it is their sum.
    """

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def gated(gates, amount):
        return score({"z": [edits.scale(gates), lambda value, site: value * amount]})

    ones, one = np.ones((3, 5), np.float32), np.float32(1)
    _, (gradient, by_closure) = gated(ones, one)
    step, found = 1e-2, np.zeros((3, 5))
    for gate in np.ndindex(3, 5):
        moved = np.stack([ones, ones])
        moved[:, *gate] += [step, -step]
        up, down = (float(gated(gates, one)[0]) for gates in moved)
        found[gate] = (up - down) / (2 * step)
    assert relative_error(gradient, found) < 5e-3
    assert by_closure == pytest.approx(np.asarray(gradient, np.float64).sum(), rel=1e-4)


def test_vmap_over_an_edits_arrays_and_a_batch(score, donor):
    """Over heads, donors, keys, positions and texts together."""

    def edited(heads, values, key, at, ids):
        return score(several_of_z(edits.zero(heads), values, key, at), ids)

    heads, positions = np.array([[(0, 1)], [(2, 4)], [(1, 0)]], np.int32), np.array([[1, 5], [4, 7], [2, 10]])
    ids = np.stack([random_ids(GPT2, 3, POS, seed=seed) for seed in range(3)])
    z, keys = np.asarray(donor.z), jax.random.split(jax.random.key(0), 3)
    donors = np.stack([z, z[:, ::-1], -z])
    found = jax.jit(jax.vmap(edited))(heads, donors, keys, positions, ids)
    expected = [edited(*each) for each in zip(heads, donors, keys, positions, ids, strict=True)]
    assert relative_error(found, expected) <= MODEL_LIMIT


# --- every path ---


def test_streams_microbatches_and_single_layers_are_the_same(gpt2, batch, donor):
    edit = {
        "z": [edits.replace(donor, [(1, 2), (2, 0)]), edits.zero((0, 4), positions=np.array([[4], [2], [3]]))],
        "scores": edits.scale(0.3, [(1, 1)], keys=[4, 5]),
        "mlp_out": lambda value, site: value + jnp.where(site.layer == 1, site.inputs["shift"][:, None, None], 0),
    }
    inputs = {"shift": np.array([0.5, -1, 2], np.float32)}
    expected = gpt2.run(batch, capture={*ALL, "logits"}, edit=edit, inputs=inputs)
    streamed = jaxqkv.load(gpt2.checkpoint, stream=True)
    others = [
        streamed.run(batch, capture={*ALL, "logits"}, edit=edit, inputs=inputs),
        gpt2.run(batch, capture={*ALL, "logits"}, edit=edit, inputs=inputs, memory=1),
    ]
    for other in others:
        for field in (*ALL, "logits"):
            assert relative_error(other[field], expected[field]) <= MODEL_LIMIT, field
    z = np.asarray(expected.z)
    for layer, attention in gpt2.layerwise(batch, capture=FIELDS, edit=edit, inputs=inputs):
        assert relative_error(attention.z, z[layer]) <= MODEL_LIMIT
    assert relative_error(gpt2.hidden(batch, edit=edit, inputs=inputs), expected.hidden) <= MODEL_LIMIT
    assert relative_error(gpt2.logits(batch, edit=edit, inputs=inputs), expected.logits) <= MODEL_LIMIT
    weighted = lambda a, mask, inputs: a.z * inputs["shift"][:, None, None, None]  # noqa: E731
    reduced = gpt2.run(batch, reduce=weighted, edit=edit, inputs=inputs, layers=2)
    assert relative_error(reduced, z[2:] * inputs["shift"][:, None, None, None]) <= MODEL_LIMIT


def test_donors_of_one_text_of_some_layers_and_of_other_places(gpt2, batch, clean):
    few = gpt2.run(random_ids(GPT2, 3, POS, seed=8), capture=ALL, layers=[2, 0])
    one = Activations(mask=few.mask[:1, :7], layers=few.layers, z=jnp.asarray(np.asarray(few.z)[:, 1:2, :, :7]))
    theirs, before = np.asarray(one.z), np.asarray(clean.z)
    at, source = [4, 5], [0, 6]
    edit = {"z": edits.replace(one, positions=at, source=source)}
    found = np.asarray(gpt2.run(batch, capture=ALL, edit=edit).z)
    np.testing.assert_array_equal(found[0][:, :, at], np.repeat(theirs[1][:, :, source], 3, axis=0))
    np.testing.assert_array_equal(found[2][:, :, at], np.repeat(theirs[0][:, :, source], 3, axis=0))
    np.testing.assert_array_equal(found[0][:, :, :4], before[0][:, :, :4])
    own = {"z": edits.replace(one, positions=np.array([[4], [2], [3]]), source=np.array([[6], [0], [1]]))}
    found = np.asarray(gpt2.run(batch, capture=ALL, edit=own).z)
    for text, (here, there) in enumerate([(4, 6), (2, 0), (3, 1)]):
        np.testing.assert_array_equal(found[0, text, :, here], theirs[1, 0, :, there])


def test_a_reference_is_each_heads_own(gpt2, batch):
    """Looks at a field with heads, and at one without."""
    generator = np.random.default_rng(0)
    reference = generator.normal(size=(3, 5, 7)).astype(np.float32)
    wide = generator.normal(size=(3, 35)).astype(np.float32)
    edit = {"z": edits.mean(reference=reference), "mlp_out": edits.mean(reference=wide, layers=1)}
    found = gpt2.run(batch, capture=ALL, edit=edit)
    z, mlp_out = np.asarray(found.z), np.asarray(found.mlp_out)
    real = np.broadcast_to(MASK[None, :, None, :, None], z.shape)
    expected = np.broadcast_to(reference[:, None, :, None], z.shape)
    np.testing.assert_array_equal(z[real], expected[real])
    np.testing.assert_array_equal(mlp_out[1][MASK], np.broadcast_to(wide[1], mlp_out[1][MASK].shape))
    assert relative_error(mlp_out[0][MASK], np.broadcast_to(wide[0], mlp_out[0][MASK].shape)) > 0.1


def test_rows_of_a_pattern_are_divided_by_their_sums_where_it_is_asked_for(gpt2, batch, clean):
    """One head with, another without; the mean of a row is of the keys that are seen."""
    before = np.asarray(clean.pattern)
    there = {"keys": [3, 4], "positions": [5, 8]}
    several = [edits.zero([(1, 2)], **there), edits.zero([(1, 3)], renormalise=True, **there), edits.mean(layers=2)]
    found = np.asarray(gpt2.run(batch, capture=ALL, edit={"pattern": several}).pattern)
    expected = before.copy()
    for head in (2, 3):
        expected[1, :, head, [[5], [8]], [3, 4]] = 0
    rows = expected[1, :, 3][:, [5, 8]]
    total = rows.sum(-1, keepdims=True)
    expected[1, :, 3, [5, 8]] = np.moveaxis(rows / np.where(total > 0, total, 1), 1, 0)
    np.testing.assert_allclose(found[:2], expected[:2], atol=1e-6)
    assert (np.abs(found - before)[1].max((0, 2, 3)) > 0.01).tolist() == [False, False, True, True, False]
    shares = found[2]
    for text, head, query in np.ndindex(3, 5, POS):
        seen = [key for key in range(query + 1) if MASK[text, key] and MASK[text, query]]
        np.testing.assert_allclose(shares[text, head, query, seen], 1 / max(len(seen), 1), atol=1e-6)


def test_noise_is_normal_and_as_strong_as_asked(gpt2, batch, clean):
    found = gpt2.run(batch, capture=ALL, edit={"z": edits.noise(3, 100.0)})
    before, after = (np.asarray(each.z, np.float64)[0, 1] for each in (clean, found))  # of the text without pads
    noise = (after - before).ravel() / 100
    n = noise.size  # 385: the mean is off by 1/√n = .051, the standard deviation by 1/√(2n) = .036
    assert abs(noise.mean()) < 5 / np.sqrt(n)
    assert abs(noise.std() - 1) < 5 / np.sqrt(2 * n)
    assert len(np.unique(noise.round(6))) > 0.99 * n


# --- refusals ---


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"zz": edits.zero()}, "cannot edit zz; did you mean z"),
        ({"z": lambda value, site: value[:1]}, r"returns \[1, 5, 11, 7\] for a value of \[3, 5, 11, 7\]"),
        ({"z": edits.zero([(3, 0)])}, r"the edit of z names \(layer, head\) \(3, 0\); layers are 0 to 2, heads 0 to 4"),
        ({"k": edits.zero([(0, 0), (0, -1)])}, r"names \(layer, head\) \(0, -1\)"),
        ({"z": edits.zero(np.ones((5, 3), bool))}, r"a mask of heads \[5, 3\]; the model's is \[layer=3, head=5\]"),
        ({"mlp_out": edits.zero([(0, 0)])}, "the edit of mlp_out names heads, and mlp_out has none; name `layers`"),
        ({"mlp_out": edits.zero(layers=3)}, "the edit of mlp_out names layer 3; the model's are 0 to 2"),
        ({"z": edits.zero(layers=np.ones(4, bool))}, r"a mask of layers \[4\]; the model has 3 layers"),
        ({"z": edits.zero(positions=11)}, "the edit of z names position 11; there are 0 to 10"),
        ({"z": edits.zero(positions=[-1])}, "names position -1; there are 0 to 10"),
        ({"z": edits.zero(positions=[[1], [2]])}, r"positions of 2 texts, \[2, 1\], and the batch has 3"),
        ({"z": edits.zero(positions=np.ones(4, bool))}, "a mask of 4 positions, and the batch has 11"),
        ({"z": edits.zero(keys=1)}, "names keys, which only scores and pattern have"),
        ({"z": edits.zero(renormalise=True)}, "the edit of z has renormalise=True, which is only for the pattern"),
        ({"z": edits.scale(np.ones((5, 3)))}, r"a strength \[5, 3\]; it is a number, or \[layer=3, head=5\]"),
        ({"z": edits.mean(reference=np.ones((3, 5)))}, r"\[3, 5\], and the field is \[layer=3, head=5, head_dim=7\]"),
        ({"pattern": edits.mean(reference=np.ones(3))}, "the edit of pattern cannot have a reference"),
        ({"z": edits.replace(np.ones((3, 3, 5, 11, 4)))}, r"this model and batch need \[layer, 3, 5, pos, 7\]"),
        ({"z": edits.replace(np.ones((3, 2, 5, 11, 7)))}, r"need \[layer, 3, 5, pos, 7\]"),
        ({"z": edits.replace(np.ones((3, 3, 5, 9, 7)))}, "takes 11 positions from a donor of 9; name `positions`"),
        ({"z": edits.replace(np.ones((3, 3, 5, 9, 7)), positions=[1], source=[9])}, "names source 9; there are 0 to 8"),
        ({"z": edits.replace(np.ones((3, 3, 5, 9, 7)), source=[1])}, "has `source`, so it needs as many `positions`"),
    ],
)  # fmt: skip
def test_refused_by_name(edit, message, gpt2, batch):
    with pytest.raises(JaxqkvError, match=message):
        gpt2.run(batch, edit=edit)


def test_what_is_no_mapping_of_edits(batch):
    with pytest.raises(JaxqkvError, match=r"`edit` must map fields to edits, .* not be a Scale"):
        place(edits.zero(), batch, GPT2, ())
    with pytest.raises(
        JaxqkvError, match=r"the edit of z is a function of a value and its site, or one of jaxqkv\.edits"
    ):
        place({"z": 3}, batch, GPT2, ())


def test_refused_donors_and_layers(gpt2, batch, donor):
    q = Activations(mask=donor.mask, layers=(1,), q=jnp.asarray(np.asarray(donor.q)[1:2]))
    with pytest.raises(JaxqkvError, match=r"a donor that did not capture it: run with capture=\{'z'\}"):
        gpt2.run(batch, edit={"z": edits.replace(q)})
    with pytest.raises(JaxqkvError, match="takes layer 2 from a donor that does not have it"):
        gpt2.run(batch, edit={"q": edits.replace(q, [(1, 0), (2, 0)])})
    with pytest.raises(JaxqkvError, match="takes position 0 of text 0 from a pad of the donor"):
        gpt2.run(random_ids(GPT2, 3, POS), edit={"z": edits.replace(donor)})
    with pytest.raises(JaxqkvError, match="the edit of z names layer 2, and the run stops at layer 1, the last one"):
        gpt2.run(batch, layers=[0, 1], edit={"z": edits.zero([(0, 1), (2, 1)])})
    gpt2.run(batch, layers=1, capture={"z", "hidden"}, edit={"z": edits.zero([(2, 1)])})  # all layers are run
    with pytest.raises(JaxqkvError, match="`check` and `edit` cannot be combined"):
        gpt2.run(batch, reduce=lambda a, mask: a.z, check=True, edit={"z": edits.zero()})
    buffer = bytearray(3)
    with pytest.raises(JaxqkvError, match="the edit depends on `buffer`, a bytearray,"):
        gpt2.run(batch, edit={"z": lambda value, site: value * len(buffer)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: edits.zero([(0, 1)], layers=0), "give `heads` or `layers` of an edit, not both"),
        (lambda: edits.zero([0, 1, 2]), r"heads are pairs \(layer, head\) or a boolean mask \[layer, head\]"),
        (lambda: edits.zero([(0.5, 1)]), "heads of an edit are whole numbers or a mask"),
        (lambda: edits.zero(positions=np.ones((1, 1, 1), int)), "positions of an edit have at most 2 axes"),
        (lambda: edits.permute("a"), "the key of an edit is a seed"),
        (lambda: edits.permute(0.5), "the key of an edit is a seed"),
        (lambda: edits.scale(None), "the strength of an edit is a number or an array, not None"),
    ],
)
def test_what_is_no_edit(make, message):
    with pytest.raises(JaxqkvError, match=message):
        make()


def test_nothing_is_left_after_an_error(gpt2, batch):
    clean = gpt2.logits(batch)

    def fails(value, site):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        gpt2.logits(batch, edit={"z": fails})
    np.testing.assert_array_equal(gpt2.logits(batch), clean)
