"""Study 10: every array of every figure against PyTorch with hooks, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import BERT, GPT2, changed, figures_of, random_tensors, write_folder, write_word_tokenizer
from helpers.checkpoints import WORDS
from helpers.spoilt import check_spoilt_run
from helpers.studies import displayed

import jaxqkv
from jaxqkv import edits
from jaxqkv.checkpoints.checkpoint import BUNDLED
from jaxqkv.cli.main import main
from jaxqkv.errors import JaxqkvError, NotDrawable
from jaxqkv.studies import head_silencing
from jaxqkv.studies.head_silencing import STUDY
from jaxqkv.studies.head_silencing import run as silencing
from jaxqkv.studies.registry import study

torch = pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("transformers", exc_type=ImportError)
from helpers.hooks import hooked  # noqa: E402

from jaxqkv.model import torch_reference  # noqa: E402

CONFIG = changed(GPT2, initializer_range=0.2)
# Of one length, so that the same programs run both.
TEXT, FACT = "a cat saw her run home", "a run saw home cat her"
ANSWERS = (" her", " home")
LAYER, HEAD, HEADS = 2, 3, [(layer, head) for layer in range(3) for head in range(5)]
LINE = ["--text", TEXT, "--layer", str(LAYER), "--head", str(HEAD), "--fact", FACT]
LINE += ["--answer", ANSWERS[0], "--against", ANSWERS[1]]
# The figures of each edit: all, those of hidden states, and one of log probabilities.
FIGURES = {"zero": (), "mean": ("2", "3"), "permute": ("4a",)}
# Part of the way to a silenced head, for derivatives in float64.
STEP = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_word_tokenizer(write_folder(tmp_path_factory.mktemp("model") / "tiny", CONFIG), WORDS)


@pytest.fixture(scope="module")
def figures(folder, tmp_path_factory):
    """A function: the arrays of an edit's figures."""

    @functools.cache
    def figures(kind):
        base = tmp_path_factory.mktemp("study")
        return figures_of("head-silencing", base, folder, *FIGURES[kind], *LINE, "--edit", kind, "--seed", "3")

    return figures


@functools.partial(jax.jit, static_argnames="pos")
def shuffled_numbers(layer, pos):
    numbers = np.broadcast_to(np.arange(pos * 7, dtype=np.float32).reshape(pos, 7), (1, 5, pos, 7))
    mask = np.ones((1, pos), bool)
    edit = edits.permute(3).placed("z", CONFIG, mask.shape).at(layer)
    return edit(jnp.asarray(numbers), edits.Site(layer, mask, None))


@functools.cache
def order(layer, pos):
    """Positions and dimensions of each head in the order that the edit gives whole numbers, `[head, value]`."""
    moved = np.asarray(shuffled_numbers(layer, pos))[0].reshape(5, -1).astype(int)
    assert (np.sort(moved) == np.arange(pos * 7)).all()
    return moved


def silenced(kind, own, layer, head):
    if kind == "permute":
        return own.ravel()[order(layer, len(own))[head]].reshape(own.shape)
    return np.zeros_like(own) if kind == "zero" else np.broadcast_to(own.mean(0), own.shape)


@pytest.fixture(scope="module")
def runs(folder):
    """A function: of an edit and a text, hidden states after each block and log probabilities of the next token.

    Of the clean run (None), of runs with each head silenced, and of (head, ±1) with each head a small part of the way
    to that, all in one batch of PyTorch's.
    """
    model = jaxqkv.load(folder)
    theirs = torch_reference.build(CONFIG, seed=0)
    theirs.transformer.load_state_dict(
        {key: torch.tensor(x) for key, x in random_tensors(CONFIG).items()}, strict=False
    )
    theirs = torch_reference.double(theirs)

    @functools.cache
    def runs(kind, text):
        names = [None, *HEADS, *((pair, sign) for pair in HEADS for sign in (1, -1))]
        ways = [*((pair, 1) for pair in HEADS), *((pair, sign * STEP) for pair in HEADS for sign in (1, -1))]
        ids, hidden = np.repeat(model.tokenize(text).ids, len(names), axis=0), []

        def change(field, layer, value):
            if field == "resid_post":
                hidden.append(value.copy())
            if field != "z":
                return None
            value = value.copy()
            for row, (pair, share) in enumerate(ways, start=1):
                if pair[0] == layer:
                    own = value[row, pair[1]]
                    value[row, pair[1]] = own + share * (silenced(kind, own, *pair) - own)
            return value

        logits = hooked(theirs, CONFIG, ids, np.ones(ids.shape, bool), change)["logits"][:, -1]
        log_p = scipy.special.log_softmax(logits, axis=-1)
        return dict(zip(names, zip(np.stack(hidden, axis=1), log_p, strict=True), strict=True))

    return runs


def cosines(hidden):
    rows = []
    for states in hidden:
        states = states[1:] / np.linalg.norm(states[1:], axis=1, keepdims=True)
        rows.append([states[i] @ states[j] for i in range(len(states)) for j in range(i + 1, len(states))])
    return np.array(rows)


@pytest.mark.parametrize("kind", ["zero", "mean"])
def test_hidden_states(figures, runs, kind):
    arrays, every = figures(kind), runs(kind, TEXT)
    clean, silent = (cosines(every[pair][0]) for pair in (None, (LAYER, HEAD)))
    np.testing.assert_allclose(arrays["2"]["cosine"], clean, atol=1e-5)
    counts = [np.histogram(row, np.linspace(0.6, 1, 32))[0] for row in arrays["2"]["cosine"]]
    np.testing.assert_array_equal(arrays["2"]["counts"], counts)
    np.testing.assert_allclose(arrays["3"]["difference"], clean - silent, atol=2e-5)
    assert set(arrays["3"]) == {"difference", f"counts_{LAYER}", f"edges_{LAYER}"}
    values = arrays["3"]["difference"][LAYER]
    expected = np.histogram(values, arrays["3"][f"edges_{LAYER}"])[0]
    np.testing.assert_array_equal(arrays["3"][f"counts_{LAYER}"], expected)


@pytest.mark.parametrize("kind", ["zero", "permute"])
def test_next_token(figures, runs, kind):
    arrays, every = figures(kind), runs(kind, TEXT)
    clean, silent = every[None][1], every[LAYER, HEAD][1]
    np.testing.assert_allclose(arrays["4a"]["clean"], clean, atol=1e-4)
    np.testing.assert_allclose(arrays["4a"]["silenced"], silent, atol=1e-4)
    assert np.abs(clean - silent).max() > 0.01


def test_next_token_by_layer(folder, figures, runs):
    arrays, every = figures("zero"), runs("zero", TEXT)
    clean, column = every[None][1], [every[layer, HEAD][1] for layer in range(3)]
    np.testing.assert_array_equal(arrays["4b"]["token"], [each.argmax() for each in column])
    np.testing.assert_allclose(arrays["4b"]["log_probability"], [each.max() for each in column], atol=1e-4)
    assert arrays["4b"]["clean"] == pytest.approx(clean.max(), abs=1e-4)
    figure = displayed(STUDY, "4b", model=folder, text=TEXT, layer=LAYER, head=HEAD)
    words = [(*WORDS, *[""] * len(clean))[each.argmax()] for each in column]  # ids beyond the tokenizer's have no text
    words = ", ".join(f"{layer}: {word!r}" for layer, word in enumerate(words))
    assert figure.text == f"Most probable token with head {HEAD} of one layer silenced, by layer: {words}"


def test_a_fact(figures, runs):
    arrays, every = figures("zero"), runs("zero", FACT)
    for name, word in zip(("target", "against"), ANSWERS, strict=True):
        token = WORDS.index(word)
        expected = [every[LAYER, head][1][token] - every[None][1][token] for head in range(5)]
        np.testing.assert_allclose(arrays["4c"][name], expected, atol=1e-4)
    np.testing.assert_array_equal(arrays["4c"]["token"], [every[LAYER, head][1].argmax() for head in range(5)])


def test_every_head(figures, runs):
    arrays, every = figures("zero"), runs("zero", TEXT)
    clean = every[None][1]
    target = np.array([every[pair][1][clean.argmax()] for pair in HEADS]).reshape(3, 5) - clean.max()
    largest = np.array([every[pair][1].max() for pair in HEADS]).reshape(3, 5) - clean.max()
    np.testing.assert_allclose(arrays["5a"]["target"], target, atol=1e-4)
    np.testing.assert_allclose(arrays["5a"]["largest"], largest, atol=1e-4)
    np.testing.assert_allclose(arrays["5a"]["clean"], [clean.max()] * 2, atol=1e-4)
    for name, values in (("mean", target.mean(1)), ("std", target.std(1))):
        np.testing.assert_allclose(arrays["5b"][name][:, 0], values, atol=1e-4)
    for name, values in (("mean", largest.mean(1)), ("std", largest.std(1))):
        np.testing.assert_allclose(arrays["5b"][name][:, 1], values, atol=1e-4)


def test_the_gradient_is_the_derivative_towards_a_silenced_head(figures, runs):
    """In central differences."""
    arrays, every = figures("zero"), runs("zero", TEXT)
    figure, token = arrays["5c"], every[None][1].argmax()
    ends = np.array([[every[pair, sign][1][token] for sign in (1, -1)] for pair in HEADS])
    derivative = (ends[:, 0] - ends[:, 1]).reshape(3, 5) / (2 * STEP)
    np.testing.assert_allclose(figure["attribution"], derivative, atol=1e-4)
    np.testing.assert_array_equal(figure["exact"], arrays["5a"]["target"])
    assert figure["r"] == pytest.approx(np.corrcoef(figure["exact"].ravel(), figure["attribution"].ravel())[0, 1])


def test_the_bundled_checkpoint_has_its_own_fact_however_it_is_named(folder, figures, monkeypatch):
    tokenizer = jaxqkv.load("demo-gpt2").tokenizer
    one, two = (tokenizer.single_token(word) for word in silencing.DEMO_FACT[1:])
    assert one != two
    monkeypatch.setitem(BUNDLED, "demo-gpt2", folder)
    monkeypatch.setattr(silencing, "DEMO_FACT", (FACT, *ANSWERS))
    for named in ({"demo": True}, {"model": "demo-gpt2"}, {"model": folder}):
        figure = displayed(STUDY, "4c", layer=LAYER, **named)
        said = f"Most probable token after {FACT!r} with one head of layer {LAYER} silenced, by head: 0: '"
        assert figure.text.startswith(said)
        assert f"After {FACT!r}" in figure.caption
        for key, values in figures("zero")["4c"].items():
            np.testing.assert_array_equal(figure.arrays[key], values)


def test_a_target(folder, runs):
    figure = displayed(STUDY, "5a", model=folder, text=TEXT, target=" home")
    log_p = runs("zero", TEXT)[None][1]
    assert figure.arrays["clean"][0] == pytest.approx(log_p[WORDS.index(" home")], abs=1e-4)
    assert "' home'" in figure.caption


def test_refusals_and_models_without_next_tokens(folder, tmp_path, capsys):
    with pytest.raises(JaxqkvError, match="--head 5: the heads of tiny are 0 to 4"):
        head_silencing.figure("2", model=folder, head=5)
    for given, message in (
        ({"answer": " her home"}, "' her home' is not one token .*choose --fact"),
        ({"answer": ""}, "'' is not one token .*choose --fact"),
        ({"fact": ""}, "--fact is empty; give a text, or leave it out for the study's own"),
    ):
        with pytest.raises(JaxqkvError, match=message) as caught:
            head_silencing.figure("4c", model=folder, text=TEXT, **given)
        assert not isinstance(caught.value, NotDrawable)
    with pytest.raises(JaxqkvError, match="a text of 3 tokens or more, not 2"):
        head_silencing.figure("2", model=folder, text="a cat")
    bert = write_word_tokenizer(write_folder(tmp_path / "bert", changed(BERT, n_layer=1)), WORDS)
    line = ["figures", "head-silencing", "--model", str(bert), "--text", TEXT, "--arrays-only", "--out", str(tmp_path)]
    main(line)
    written = {path.stem for path in (tmp_path / "head-silencing").glob("*.npz")}
    assert written == {"2", "3"}
    assert "bert has no next-token logits" in capsys.readouterr().err
    assert len(study("head-silencing").figures) == 8


def test_a_whole_run_with_weights_that_are_not_finite(tmp_path):
    # A layer's heads go on with those before them, 1 + 2 + 3; figure 4c's are of the last layer alone; and the gradient
    # goes through the layers twice.
    bars = {"branches": [1, 2 * 3, 1 + 2 + 3]}
    check_spoilt_run(tmp_path, "head-silencing", CONFIG, WORDS, *LINE, "--seed", "3", not_drawn={"3"}, bars=bars)
