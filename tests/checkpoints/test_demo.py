"""The bundled checkpoints: small, in Hugging Face's format, and really trained."""

import pydoc_data.topics

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MODEL_LIMIT, relative_error

import jaxqkv
from jaxqkv.checkpoints.checkpoint import BUNDLED


@pytest.fixture(params=sorted(BUNDLED))
def demo(request):
    return jaxqkv.load(request.param)


def held_out_text():
    """The last twentieth of every help topic of Python, which training never saw."""
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    return [text[len(text) * 19 // 20 :] for text in texts]


def windows(model, length=128):
    ids = np.concatenate([np.array(ids) for ids in model.tokenizer.encode(held_out_text(), special_tokens=False)])
    return ids[: 24 * length].reshape(24, length)


def surprise(logits, truth):
    """Mean negative log-probability, in nats."""
    logits = np.asarray(logits, np.float64)
    normaliser = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return (normaliser - np.take_along_axis(logits, truth[..., None], -1)[..., 0]).mean()


def test_sizes(demo):
    config = demo.config
    assert (config.n_layer, config.n_head, config.n_embd, config.n_positions) == (8, 8, 128, 256)
    assert config.vocab_size == demo.tokenizer.backend.get_vocab_size() == 4096
    assert set(demo.checkpoint.dtypes.values()) == {"F16"}
    assert sum(path.stat().st_size for folder in BUNDLED.values() for path in folder.iterdir()) < 12e6


def test_her_is_one_token(demo):
    (ids,) = demo.tokenizer.encode([" her"], special_tokens=False)
    assert len(ids) == 1
    assert demo.tokenizer.tokens(ids)[0].strip() == "her"


def held_out_loss(spec):
    """The loss of held-out text, in nats: of the next token, or of masked tokens a tenth of the text."""
    model = jaxqkv.load(spec)
    ids = windows(model)
    if model.config.causal:
        return surprise(model.logits(ids)[:, :-1], ids[:, 1:])
    masked, places = ids.copy(), np.arange(5, 128, 10)
    masked[:, places] = model.tokenizer.backend.token_to_id("[MASK]")
    return surprise(np.asarray(model.logits(masked))[:, places], ids[:, places])


@pytest.mark.parametrize(("name", "limit"), [("demo-gpt2", 3.6), ("demo-bert", 3.0)])
def test_they_predict_text_that_they_never_saw(name, limit):
    assert held_out_loss(name) < limit
    if name == "demo-gpt2":  # fresh weights of BERT have no head that predicts tokens
        assert held_out_loss("random:demo-gpt2") == pytest.approx(np.log(4096), abs=0.1)


def test_gpt2_copies_with_induction_heads():
    """64 random tokens, said twice: the heads and what they are good for are those that the documents name."""
    model = jaxqkv.load("demo-gpt2")
    half = 64
    ids = np.tile(np.random.default_rng(0).integers(1, 4096, (16, half)), 2)
    logits = np.asarray(model.logits(ids))
    assert surprise(logits[:, : half - 1], ids[:, 1:half]) > np.log(4096)
    assert surprise(logits[:, half:-1], ids[:, half + 1 :]) < 1.5

    def to_earlier(attention, mask):
        back = {"previous": 1, "followed": half - 1}  # from the second time on
        return {name: jnp.diagonal(attention.pattern, -n, 2, 3)[..., -half + 1 :].mean(-1) for name, n in back.items()}

    found = {
        name: np.argwhere(np.asarray(each).mean(1) > 0.4) for name, each in model.run(ids, reduce=to_earlier).items()
    }
    assert found["followed"].tolist() == [[6, 0], [6, 6], [6, 7]]
    assert found["previous"].tolist() == [[2, 3], [3, 6]]


@pytest.mark.parametrize("names", [("John", "Mary", "house", "book"), ("Mike", "Emma", "cafe", "coffee")])
def test_they_know_who_gets_it(demo, names):
    """In a sentence of `head-patching` the name that acts is less probable than the other."""
    first, second, place, thing = names
    beginning, end = f"When {first} and {second} went to the {place},", "" if demo.config.causal else " [MASK]."
    batch = demo.tokenize([f"{beginning} {name} gave a {thing} to{end}" for name in (second, first)])
    ids = np.asarray(batch.ids)
    assert np.all(batch.mask)
    at = -1 if demo.config.causal else ids[0].tolist().index(demo.tokenizer.backend.token_to_id("[MASK]"))
    one, two = (demo.tokenizer.single_token(f" {name}") for name in (first, second))
    logits = np.asarray(demo.logits(batch))[:, at]
    assert np.all((logits[:, one] - logits[:, two]) * [1, -1] > 1)


def test_transformers_loads_them(demo):
    """The same numbers from PyTorch, and every tensor is read."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    transformers = pytest.importorskip("transformers", exc_type=ImportError)

    name = demo.checkpoint.spec
    kind = transformers.AutoModelForCausalLM if name == "demo-gpt2" else transformers.AutoModelForMaskedLM
    theirs, report = kind.from_pretrained(BUNDLED[name], output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = windows(demo)
    with torch.no_grad():
        found = theirs.eval()(torch.tensor(ids), output_hidden_states=True)
    assert relative_error(demo.hidden(ids), found.hidden_states[-1].numpy()) < MODEL_LIMIT
    assert relative_error(demo.logits(ids), found.logits.numpy()) < MODEL_LIMIT
