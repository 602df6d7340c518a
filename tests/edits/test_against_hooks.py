"""Every edit at every field, against the same made by hooks in PyTorch, in float64."""

import itertools

import jax
import numpy as np
import pytest
from conftest import CONFIGS, random_ids, relative_error, write_folder
from helpers.oracles import masked_batch

import jaxqkv
from jaxqkv import edits
from jaxqkv.architectures.activations import FIELDS
from jaxqkv.architectures.bert import BertConfig
from jaxqkv.architectures.distilbert import DistilBertConfig
from jaxqkv.architectures.roberta import RobertaConfig

torch = pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("transformers", exc_type=ImportError)
from helpers.hooks import hooked  # noqa: E402

from jaxqkv.model import torch_reference  # noqa: E402

# Of the largest value; the reference is in float64. Unedited models of these sizes are within 3e-6.
LIMIT = 1e-5
HEAD_FIELDS = FIELDS[:6]
POS = 13
MASK = np.ones((3, POS), bool)
MASK[1, :4] = MASK[2, 9:] = False
# Every third query and all but one of the keys; of one text others.
POSITIONS = np.zeros((3, POS), bool)
POSITIONS[:, ::2] = POSITIONS[1, 7] = True


# Of each edit below, at which positions it is.
LISTED = np.zeros((3, POS), bool)
LISTED[:, [2, 11, 5]] = True
AT = (LISTED, np.ones((3, POS), bool), POSITIONS, POSITIONS, POSITIONS, np.broadcast_to(POSITIONS[0], (3, POS)))


# Which of the six edits below a field has: of the fields that have heads, of those that have keys, and of those that
# are as wide as the residual stream, each edit is at one of them or more.
CHOSEN = {"q": (0, 1), "k": (2, 3), "v": (4, 5), "z": (0, 3), "scores": (0, 2, 4), "pattern": (1, 3, 5)}
CHOSEN |= {"attn_out": (0, 1), "resid_pre": (2, 3), "mlp_out": (4, 5), "resid_post": (1, 2)}
# One or more at each field, for BERT's block, which sees queries and keys otherwise and takes them at other places. No
# field is overwritten by a later one.
OF_BERT = {"q": (1,), "k": (3,), "v": (0,), "z": (1,), "scores": (0, 2, 4), "pattern": (0,)}
OF_BERT |= {"attn_out": (1,), "resid_pre": (2,), "mlp_out": (4, 5), "resid_post": (1,)}


def ready_made(field, donor):
    """Six edits of a field, each on other heads and layers, and where they are, and how strong."""
    if field in HEAD_FIELDS:
        places = [{"heads": [(1, 3)]}, {"heads": [(0, 2), (2, 2)]}, {"heads": (0, 1)}, {"heads": [(1, 0), (2, 4)]}]
        places += [{"heads": [(0, 4)]}, {"heads": np.eye(3, 5, dtype=bool)}]
    else:
        places = [{"layers": 1}, {"layers": [0, 2]}, {"layers": 0}, {"layers": 2}, {"layers": 1}, {"layers": [0, 1]}]
    strength = np.random.default_rng(1).uniform(0.5, 1.5, (3, 5) if field in HEAD_FIELDS else 3)
    several = [
        edits.zero(**places[0], positions=[2, 11, 5]),
        edits.scale(strength, **places[1]),
        edits.mean(**places[2], positions=POSITIONS),
        edits.replace(donor, **places[3], positions=POSITIONS),
        edits.permute(7, **places[4], positions=POSITIONS),
        edits.noise(8, 0.2, **places[5], positions=POSITIONS[0]),
    ]
    return several, (places, strength)


@jax.jit
def applied(placed, layer, given, seen):
    """A value as an edit changes it in a layer; one program of an edit for all layers."""
    return placed.at(layer)(given, edits.Site(layer, MASK, seen))


class InNumPy:
    """The same edits from their definitions, text by text and head by head; called as the hooks call."""

    def __init__(self, field, several, chosen, about, donor, config):
        self.field, self.several, self.chosen, self.config = field, several, chosen, config
        self.places, self.strength = about
        self.donor = np.asarray(donor[field], np.float64)
        self.has_heads, self.has_keys = field in HEAD_FIELDS, field in ("scores", "pattern")
        seen = MASK[:, None] & MASK[:, :, None]
        self.seen = np.tril(seen) if config.causal else seen
        self.moves = {}

    def __call__(self, field, layer, value):
        if field != self.field:
            return None
        value = value.copy()
        view = value if self.has_heads else value[:, None]
        for number in self.chosen:
            before = view.copy()
            for head, text in itertools.product(self.heads(number, layer), range(len(MASK))):
                view[text, head] = self.changed(number, layer, head, text, before[text, head])
        return value

    def heads(self, number, layer):
        """Which heads of a layer an edit changes; of a field without heads, one."""
        place = self.places[number]
        if "layers" in place:
            return [0] if layer in np.atleast_1d(place["layers"]) else []
        heads = np.asarray(place["heads"])
        if heads.dtype == bool:
            return np.flatnonzero(heads[layer])
        return [head for at, head in heads.reshape(-1, 2) if at == layer]

    def changed(self, number, layer, head, text, before):
        if number >= 4:
            return self.drawn(number, layer, head, text, before)
        if number == 0:
            new = np.zeros_like(before)
        elif number == 1:
            new = before * (self.strength[layer, head] if self.has_heads else self.strength[layer])
        elif number == 2 and self.has_keys:
            seen = self.seen[text]
            new = np.where(seen, before, 0).sum(-1, keepdims=True) / np.maximum(seen.sum(-1, keepdims=True), 1)
        elif number == 2:
            new = before[MASK[text]].mean(0)
        else:
            theirs = self.donor[layer, text]
            new = theirs[head] if self.has_heads else theirs
        inside = (MASK[text] & AT[number][text])[:, None]
        return np.where(inside & self.seen[text] if self.has_keys else inside, new, before)

    def drawn(self, number, layer, head, text, before):
        """What is random is learnt from the edit itself: where each element comes from, or what is added."""
        place = (text, head) if self.has_heads else text
        if (number, layer) not in self.moves:
            edit = self.several[number]
            shape = (len(MASK), self.config.n_head, *before.shape) if self.has_heads else (len(MASK), *before.shape)
            placed = edit.placed(self.field, self.config, MASK.shape)
            added = hasattr(edit, "strength")
            given = np.zeros(before.shape) if added else np.arange(before.size).reshape(before.shape)
            given = np.broadcast_to(given, shape).astype(np.float32)
            self.moves[number, layer] = (
                added,
                np.asarray(applied(placed, np.int32(layer), given, self.seen), np.float64),
            )
        added, values = self.moves[number, layer]
        return before + values[place] if added else before.ravel()[values[place].astype(int)]


@pytest.fixture(scope="module", params=["gpt2", "bert"])
def pair(request, tmp_path_factory):
    """A PyTorch model in float64, the same here, a batch and a donor."""
    config = CONFIGS[request.param]
    torch_model = torch_reference.build(config, seed=1)
    tensors = {key: value.numpy() for key, value in torch_model.state_dict().items()}
    model = jaxqkv.load(write_folder(tmp_path_factory.mktemp("edits") / "x", config, tensors))
    ids = random_ids(config, 3, POS)
    # With `hidden`, all layers are one program.
    donor = model.run(masked_batch(random_ids(config, 3, POS, seed=9), MASK), capture={*FIELDS, "hidden"})
    return torch_reference.double(torch_model), model, ids, donor


# Fields whose edits are in one program.
GROUPS = (("q", "v", "attn_out", "resid_post"), ("scores", "mlp_out", "z"), ("k", "pattern", "resid_pre"))
CASES = [("gpt2", fields, CHOSEN) for fields in GROUPS] + [("bert", FIELDS, OF_BERT)]


@pytest.mark.parametrize(
    ("pair", "fields", "chosen"),
    CASES,
    indirect=["pair"],
    ids=[f"{name} {' '.join(fields)}" for name, fields, _ in CASES],
)
def test_every_edit_of_every_field(fields, chosen, pair):
    torch_model, model, ids, donor = pair
    edited, changes = {}, []
    for field in fields:
        several, about = ready_made(field, donor)
        edited[field] = [several[number] for number in chosen[field]]
        changes.append(InNumPy(field, several, chosen[field], about, donor, model.config))

    def change(field, layer, value):
        new = [each(field, layer, value) for each in changes if each.field == field]
        return new[0] if new else None

    expected = hooked(torch_model, model.config, ids, MASK, change)
    for field in fields:
        others = lambda at, *of, own=field: None if at == own else change(at, *of)  # noqa: E731
        rest = hooked(torch_model, model.config, ids, MASK, others)
        assert relative_error(expected["hidden"][MASK], rest["hidden"][MASK]) > 0.05
    found = model.run(masked_batch(ids, MASK), edit=edited, capture=expected.keys())
    for name, values in expected.items():
        assert relative_error(np.asarray(found[name])[MASK], values[MASK]) <= LIMIT, name


def test_other_blocks_are_berts():
    """Shows that edits change in them what they change in BERT's; test_parity.py compares their fields."""
    for config in (RobertaConfig, DistilBertConfig):
        for name in ("layer", "block", "attention_scale", "causal"):
            assert getattr(config, name) is getattr(BertConfig, name)
    assert set(CONFIGS) == {"gpt2", "bert", "roberta", "distilbert"}


def test_every_field_and_every_edit_is_there():
    assert sorted(field for fields in GROUPS for field in fields) == sorted(FIELDS)
    for kind in (("q", "k", "v", "z"), ("scores", "pattern"), ("attn_out", "resid_pre", "mlp_out", "resid_post")):
        assert {number for field in kind for number in CHOSEN[field]} == set(range(6))
