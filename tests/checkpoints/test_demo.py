"""The bundled checkpoints: small, in Hugging Face's format, and really trained."""

import functools
import pydoc_data.topics

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MODEL_LIMIT, relative_error

import jaxqkv
from jaxqkv.checkpoints.checkpoint import BUNDLED

# Texts that are run together, and tokens of each: one shape for all, so that programs are compiled once.
TEXTS, LENGTH = 5, 128


@pytest.fixture(scope="module", params=sorted(BUNDLED))
def demo(request):
    return jaxqkv.load(request.param)


@functools.cache
def held_out_text():
    """The last twentieth of every help topic of Python, which training never saw."""
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    return [text[len(text) * 19 // 20 :] for text in texts]


@functools.cache
def held_out(spec):
    """Held-out text: ids, those that the model is given (for BERT, a tenth is masked), and its logits for them."""
    model = jaxqkv.load(spec)
    encoded = model.tokenizer.encode(held_out_text(), special_tokens=False)
    ids = np.concatenate([np.array(ids) for ids in encoded])[: TEXTS * LENGTH].reshape(TEXTS, LENGTH)
    given = ids.copy()
    if not model.config.causal:
        given[:, 5::10] = model.tokenizer.backend.token_to_id("[MASK]")
    return ids, given, np.asarray(model.logits(given))


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


def test_they_predict_text_that_they_never_saw(demo):
    """Looks at each next token of GPT-2 and the masked ones of BERT, whose fresh weights have no head for tokens."""
    ids, _, logits = held_out(demo.checkpoint.spec)
    if not demo.config.causal:
        assert surprise(logits[:, 5::10], ids[:, 5::10]) < 3.0
        return
    assert surprise(logits[:, :-1], ids[:, 1:]) < 3.6
    ids, _, logits = held_out("random:demo-gpt2")
    assert surprise(logits[:, :-1], ids[:, 1:]) == pytest.approx(np.log(4096), abs=0.1)


def test_gpt2_copies_with_induction_heads():
    """64 random tokens, said twice: the heads and what they are good for are those that the documents name."""
    model = jaxqkv.load("demo-gpt2")
    half = LENGTH // 2
    ids = np.tile(np.random.default_rng(0).integers(1, 4096, (TEXTS, half)), 2)
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


def test_they_know_who_gets_it(demo):
    """In sentences of `head-patching` the name that acts is less probable than the other."""
    stories = (("John", "Mary", "house", "book"), ("Mike", "Emma", "cafe", "coffee"))
    end = "" if demo.config.causal else " [MASK]."
    texts = [
        f"When {first} and {second} went to the {place}, {name} gave a {thing} to{end}"
        for first, second, place, thing in stories
        for name in (second, first)
    ]
    batch = demo.tokenize(texts)
    lengths = np.asarray(batch.mask).sum(axis=1)
    assert np.all(lengths[::2] == lengths[1::2])
    at = lengths - 1
    if not demo.config.causal:
        at = np.argmax(np.asarray(batch.ids) == demo.tokenizer.backend.token_to_id("[MASK]"), axis=1)
    one, two = (
        np.repeat([demo.tokenizer.single_token(f" {names[index]}") for names in stories], 2) for index in (0, 1)
    )
    text = np.arange(len(texts))
    logits = np.asarray(demo.logits(batch))[text, at]
    assert np.all((logits[text, one] - logits[text, two]) * [1, -1, 1, -1] > 1)


def test_transformers_loads_them(demo):
    """The same numbers from PyTorch, and every tensor is read."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    transformers = pytest.importorskip("transformers", exc_type=ImportError)

    name = demo.checkpoint.spec
    kind = transformers.AutoModelForCausalLM if name == "demo-gpt2" else transformers.AutoModelForMaskedLM
    theirs, report = kind.from_pretrained(BUNDLED[name], output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    _, ids, logits = held_out(name)
    with torch.no_grad():
        found = theirs.eval()(torch.tensor(ids), output_hidden_states=True)
    assert relative_error(demo.hidden(ids), found.hidden_states[-1].numpy()) < MODEL_LIMIT
    assert relative_error(logits, found.logits.numpy()) < MODEL_LIMIT
