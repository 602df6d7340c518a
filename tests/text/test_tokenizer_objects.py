"""Tokenizers that are objects already: the ids that they give, and nothing of what they are set to besides."""

import json

import numpy as np
import pytest
import tokenizers
from conftest import BERT, GPT2, changed
from helpers.tokenizer_cases import BERT_TEXT, GPT2_TEXT, write

import jaxqkv
from jaxqkv.errors import JaxqkvError, JaxqkvWarning
from jaxqkv.text.tokenizers import Tokenizer

TEXTS = {"bert": ["The café, 会社 saw", "x", BERT_TEXT], "gpt2": [" I saw the", "he", GPT2_TEXT, "I saw é\n"]}
MODELS = {"bert": changed(BERT, vocab_size=300), "gpt2": changed(GPT2, vocab_size=300)}


@pytest.fixture
def files(tmp_path):
    def make(kind, **settings):
        return write(tmp_path / kind, f"{kind}-json", {"tokenizer_config.json": settings})

    return make


@pytest.mark.parametrize("kind", TEXTS)
def test_an_object_of_tokenizers(files, kind):
    given = tokenizers.Tokenizer.from_file(str(files(kind) / "tokenizer.json"))
    given.enable_padding(length=30)
    given.enable_truncation(17, direction="left")
    before = given.to_str()
    ours = Tokenizer.of(given, MODELS[kind])
    assert given.to_str() == before
    assert ours.truncation_side == "left"
    given.no_padding()
    given.no_truncation()
    for special in (True, False):
        expected = [each.ids for each in given.encode_batch(TEXTS[kind], add_special_tokens=special)]
        assert ours.encode(TEXTS[kind], special_tokens=special) == expected
    given.encode_special_tokens = True
    given.add_tokens(["xsaw"])
    assert ours.encode(["xsaw"]) != [given.encode("xsaw").ids]
    assert not ours.backend.encode_special_tokens
    assert Tokenizer.of(given, MODELS[kind]).encode(TEXTS[kind]) == [
        each.ids for each in given.encode_batch(TEXTS[kind])
    ]
    assert Tokenizer.of(ours, MODELS[kind]).encode(TEXTS[kind]) == ours.encode(TEXTS[kind])


def test_truncation_that_would_cut_a_text_is_said(files):
    given = tokenizers.Tokenizer.from_file(str(files("gpt2") / "tokenizer.json"))
    given.enable_truncation(2)
    with pytest.warns(JaxqkvWarning, match="the given Tokenizer: its truncation to 2 tokens is not taken over"):
        ours = Tokenizer.of(given, MODELS["gpt2"])
    assert len(ours.encode([" I saw the"])[0]) > 2
    assert given.truncation["max_length"] == 2


SETTINGS = [
    ("bert", {"do_lower_case": False}),
    ("bert", {"split_special_tokens": True}),
    ("bert", {"truncation_side": "left"}),
    ("gpt2", {"add_prefix_space": True}),
    ("gpt2", {"split_special_tokens": True}),
    ("gpt2", {"add_bos_token": True}),
    ("gpt2", {"extra_special_tokens": ["[E1]", "[E2]"]}),
    ("bert", {}),
]


@pytest.mark.parametrize(("kind", "settings"), SETTINGS)
def test_an_object_of_transformers(files, kind, settings):
    """As it tokenizes itself; a call with padding and truncation, which it remembers, does not matter."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    theirs = transformers.AutoTokenizer.from_pretrained(files(kind, **settings))
    theirs(TEXTS[kind], padding="max_length" if kind == "bert" else False, truncation=True, max_length=4)
    config = MODELS[kind]
    ours = Tokenizer.of(theirs, config)
    assert ours.truncation_side == settings.get("truncation_side", "right")
    for special in (True, False):
        expected = [theirs(text, add_special_tokens=special)["input_ids"] for text in TEXTS[kind]]
        assert ours.encode(TEXTS[kind], special_tokens=special) == expected
    pair = ("The", "saw saw")
    batch, expected = ours.batch([pair], config), theirs(*pair)
    assert batch.ids[0].tolist() == expected["input_ids"]
    if config.token_types > 1:
        assert batch.token_types[0].tolist() == expected["token_type_ids"]
    text = TEXTS[kind][-1]
    assert theirs(text, truncation=True, max_length=5)["input_ids"] != ours.encode([text])[0]
    assert ours.encode([text])[0] == theirs(text)["input_ids"]


def test_a_model_with_a_tokenizer_object():
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    folder = jaxqkv.open_checkpoint("demo-bert").folder
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    model = jaxqkv.load("demo-bert", tokenizer=theirs)
    texts = ["I saw her at the market.", "She taught her how to swim."]
    expected = theirs(texts, padding=True)
    batch = model.tokenize(texts)
    assert (
        np.asarray(batch.ids * batch.mask).tolist()
        == (np.array(expected["input_ids"]) * np.array(expected["attention_mask"])).tolist()
    )
    np.testing.assert_array_equal(model.hidden(batch), jaxqkv.load("demo-bert").hidden(batch))
    with pytest.warns(JaxqkvWarning, match=r"the given \w+: the tokenizer has 4096 tokens, the model only 43"):
        Tokenizer.of(theirs, BERT)


def test_objects_that_are_refused():
    class Upper:
        def pre_tokenize(self, text):
            pass

    given = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    given.pre_tokenizer = tokenizers.pre_tokenizers.PreTokenizer.custom(Upper())
    for wrong, message in (
        (given, "the given Tokenizer cannot be copied"),
        (5, "tokenizer is a folder, or an object of tokenizers or transformers, not int"),
        (json, "tokenizer is a folder, or an object of tokenizers or transformers, not module"),
    ):
        with pytest.raises(JaxqkvError, match=message):
            jaxqkv.load("demo-gpt2", tokenizer=wrong)


def test_a_tokenizer_in_python_is_refused():
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    with pytest.raises(JaxqkvError, match="the given ByT5Tokenizer runs in Python, without a backend_tokenizer"):
        jaxqkv.load("demo-gpt2", tokenizer=transformers.ByT5Tokenizer())
