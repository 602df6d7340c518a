"""The bundled checkpoints: small, in Hugging Face's format, and really trained."""

import pydoc_data.topics

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


def test_gpt2_predicts_text_that_it_never_saw():
    model = jaxqkv.load("demo-gpt2")
    ids = windows(model)
    trained = surprise(model.logits(ids)[:, :-1], ids[:, 1:])
    untrained = surprise(jaxqkv.load("random:demo-gpt2").logits(ids)[:, :-1], ids[:, 1:])
    assert untrained == pytest.approx(np.log(4096), abs=0.1)
    assert trained < 5


def test_transformers_loads_them(demo):
    """The same numbers from PyTorch, and from BERT's head a guess that is better than chance."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    transformers = pytest.importorskip("transformers", exc_type=ImportError)

    name = demo.checkpoint.spec
    kind = transformers.AutoModelForCausalLM if name == "demo-gpt2" else transformers.AutoModelForMaskedLM
    theirs, report = kind.from_pretrained(BUNDLED[name], output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = windows(demo)
    with torch.no_grad():
        hidden = theirs.eval()(torch.tensor(ids), output_hidden_states=True).hidden_states[-1].numpy()
    assert relative_error(demo.hidden(ids), hidden) < MODEL_LIMIT
    if name == "demo-bert":
        masked = ids.copy()
        places = np.arange(5, 128, 10)
        masked[:, places] = demo.tokenizer.backend.token_to_id("[MASK]")
        with torch.no_grad():
            logits = theirs(torch.tensor(masked)).logits.numpy()
        assert surprise(logits[:, places], ids[:, places]) < 5.8
