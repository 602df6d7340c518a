"""Study 10: every array of every figure against PyTorch with hooks, in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import BERT, GPT2, changed, figures_of, random_tensors, write_folder, write_word_tokenizer
from helpers.checkpoints import WORDS

import jaxqkv
from jaxqkv import edits
from jaxqkv.cli.main import main
from jaxqkv.errors import JaxqkvError, NotDrawable
from jaxqkv.studies import head_silencing
from jaxqkv.studies.registry import study

torch = pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("transformers", exc_type=ImportError)
from helpers.hooks import hooked  # noqa: E402

from jaxqkv.model import torch_reference  # noqa: E402

CONFIG = changed(GPT2, initializer_range=0.2)
TEXT = "a cat saw her run home"
FACT = ["--fact", "a cat saw", "--answer", " her", "--against", " home"]
LAYER, HEAD, HEADS = 2, 3, [(layer, head) for layer in range(3) for head in range(5)]
LINE = ["--text", TEXT, "--layer", str(LAYER), "--head", str(HEAD), *FACT]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_word_tokenizer(write_folder(tmp_path_factory.mktemp("model") / "tiny", CONFIG), WORDS)


@pytest.fixture(scope="module", params=["zero", "mean", "permute"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def arrays(folder, kind, tmp_path_factory):
    return figures_of("head-silencing", tmp_path_factory.mktemp("study"), folder, *LINE, "--edit", kind, "--seed", "3")


@pytest.fixture(scope="module")
def runs(folder, kind):
    """Hidden states after each block and log probabilities of the next token: clean, and with each head silenced."""
    model = jaxqkv.load(folder)
    theirs = torch_reference.build(CONFIG, seed=0)
    theirs.transformer.load_state_dict(
        {key: torch.tensor(x) for key, x in random_tensors(CONFIG).items()}, strict=False
    )
    theirs = torch_reference.double(theirs)

    def runs_of(text):
        """Of the clean run and of one for each head, in one batch of PyTorch's."""
        pairs = (None, *HEADS)
        ids, hidden = np.repeat(model.tokenize(text).ids, len(pairs), axis=0), []

        def change(field, layer, value):
            if field == "resid_post":
                hidden.append(value.copy())
            if field != "z":
                return None
            value = value.copy()
            for row, pair in enumerate(pairs):
                if pair is not None and pair[0] == layer:
                    value[row, pair[1]] = silenced(value[row, pair[1]], *pair)
            return value

        logits = hooked(theirs, CONFIG, ids, np.ones(ids.shape, bool), change)["logits"][:, -1]
        hidden, log_p = np.stack(hidden, axis=1), scipy.special.log_softmax(logits, axis=-1)
        return dict(zip(pairs, zip(hidden, log_p, strict=True), strict=True))

    def silenced(own, layer, head):
        if kind == "permute":
            return shuffled(own, layer, head)
        return 0 if kind == "zero" else own.mean(0)

    def shuffled(own, layer, head):
        """Positions and dimensions together, in the order that the edit gives whole numbers."""
        numbers = np.broadcast_to(np.arange(own.size, dtype=np.float32).reshape(own.shape), (1, 5, *own.shape))
        mask = np.ones((1, len(own)), bool)
        edit = edits.permute(3).placed("z", CONFIG, mask.shape).at(layer)
        moved = np.asarray(edit(jnp.asarray(numbers), edits.Site(layer, mask, None)))[0, head].astype(int)
        assert sorted(moved.ravel()) == list(range(own.size))
        return own.ravel()[moved]

    return {text: runs_of(text) for text in (TEXT, "a cat saw")}


def cosines(hidden):
    rows = []
    for states in hidden:
        states = states[1:] / np.linalg.norm(states[1:], axis=1, keepdims=True)
        rows.append([states[i] @ states[j] for i in range(len(states)) for j in range(i + 1, len(states))])
    return np.array(rows)


def test_hidden_states(arrays, runs):
    clean, silent = (cosines(runs[TEXT][pair][0]) for pair in (None, (LAYER, HEAD)))
    np.testing.assert_allclose(arrays["2"]["cosine"], clean, atol=1e-5)
    counts = [np.histogram(row, np.linspace(0.6, 1, 32))[0] for row in arrays["2"]["cosine"]]
    np.testing.assert_array_equal(arrays["2"]["counts"], counts)
    np.testing.assert_allclose(arrays["3"]["difference"], clean - silent, atol=2e-5)
    assert set(arrays["3"]) == {"difference", f"counts_{LAYER}", f"edges_{LAYER}"}
    values = arrays["3"]["difference"][LAYER]
    expected = np.histogram(values, arrays["3"][f"edges_{LAYER}"])[0]
    np.testing.assert_array_equal(arrays["3"][f"counts_{LAYER}"], expected)


def test_next_token(arrays, runs):
    every = runs[TEXT]
    clean, silent = every[None][1], every[LAYER, HEAD][1]
    np.testing.assert_allclose(arrays["4a"]["clean"], clean, atol=1e-4)
    np.testing.assert_allclose(arrays["4a"]["silenced"], silent, atol=1e-4)
    assert np.abs(clean - silent).max() > 0.01
    column = [every[layer, HEAD][1] for layer in range(3)]
    np.testing.assert_array_equal(arrays["4b"]["token"], [each.argmax() for each in column])
    np.testing.assert_allclose(arrays["4b"]["log_probability"], [each.max() for each in column], atol=1e-4)
    assert arrays["4b"]["clean"] == pytest.approx(clean.max(), abs=1e-4)


def test_a_fact(arrays, runs):
    every = runs["a cat saw"]
    for name, word in (("target", " her"), ("against", " home")):
        token = WORDS.index(word)
        expected = [every[LAYER, head][1][token] - every[None][1][token] for head in range(5)]
        np.testing.assert_allclose(arrays["4c"][name], expected, atol=1e-4)
    np.testing.assert_array_equal(arrays["4c"]["token"], [every[LAYER, head][1].argmax() for head in range(5)])


def test_every_head(arrays, runs):
    every = runs[TEXT]
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
    figure = arrays["5c"]
    np.testing.assert_array_equal(figure["exact"], arrays["5a"]["target"])
    assert figure["r"] == pytest.approx(np.corrcoef(figure["exact"].ravel(), figure["attribution"].ravel())[0, 1])


def test_the_gradient_is_that_of_a_gate(folder, arrays, kind):
    """For z at 0 minus the derivative by the head's gate, in central differences."""
    if kind != "zero":
        return
    model = jaxqkv.load(folder)
    batch, step = model.tokenize(TEXT), 1e-2
    token = int(model.logits(batch)[0, -1].argmax())
    for layer, head in [(0, 1), (1, 4), (2, 0)]:
        ends = [
            model.logits(batch, edit={"z": edits.scale(1 + sign * step, [(layer, head)])})[0, -1] for sign in (1, -1)
        ]
        up, down = (scipy.special.log_softmax(np.asarray(each, np.float64))[token] for each in ends)
        assert arrays["5c"]["attribution"][layer, head] == pytest.approx(-(up - down) / (2 * step), abs=2e-3)


def test_the_bundled_checkpoint_has_its_own_fact_however_it_is_named():
    asked, named = (head_silencing.figure("4c", **given) for given in ({"demo": True}, {"model": "demo-gpt2"}))
    assert asked.caption == named.caption
    for key, values in asked.arrays.items():
        np.testing.assert_array_equal(named.arrays[key], values)


def test_a_target_and_models_without_next_tokens(folder, tmp_path, capsys):
    figure = head_silencing.figure("5a", model=folder, text=TEXT, target=" home")
    log_p = scipy.special.log_softmax(np.asarray(jaxqkv.load(folder).logits(jaxqkv.load(folder).tokenize(TEXT)))[0, -1])
    assert figure.arrays["clean"][0] == pytest.approx(log_p[WORDS.index(" home")], abs=1e-4)
    assert "' home'" in figure.caption
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
    bert = write_word_tokenizer(write_folder(tmp_path / "bert", BERT), WORDS)
    line = ["figures", "head-silencing", "--model", str(bert), "--text", TEXT, "--arrays-only", "--out", str(tmp_path)]
    main(line)
    written = {path.stem for path in (tmp_path / "head-silencing").glob("*.npz")}
    assert written == {"2", "3"}
    assert "bert has no next-token logits" in capsys.readouterr().err
    assert len(study("head-silencing").figures) == 8
