"""Pairs of sentences, and lengths that are rounded up."""

import numpy as np
import pytest
from conftest import BERT, GPT2, changed, write_folder
from helpers.tokenizer_cases import write

import jaxqkv
from jaxqkv.errors import JaxqkvError, JaxqkvWarning
from jaxqkv.text import tokenizer_files


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """BERT and GPT-2 with tokenizers of their kind."""
    found = {}
    for kind, config in (("bert", BERT), ("gpt2", GPT2)):
        folder = write_folder(tmp_path_factory.mktemp("pairs") / kind, changed(config, vocab_size=300))
        saved = (folder / "config.json").read_text()
        write(folder, kind, {})
        (folder / "config.json").write_text(saved)
        found[kind] = jaxqkv.load(folder)
    return found


PAIRS = [("the saw", "saw"), ("saw", "the the saw")]


@pytest.mark.parametrize("side", ["left", "right"])
def test_pairs(models, side):
    batch = models["bert"].tokenize([*PAIRS, "the"], padding_side=side)
    one, sep = ["[CLS]", "the", "saw", "[SEP]", "saw", "[SEP]"], "[SEP]"
    two = ["[CLS]", "saw", "[SEP]", "the", "the", "saw", sep]
    expected = [(one, [0] * 4 + [1] * 2), (two, [0] * 3 + [1] * 4), (["[CLS]", "the", "[SEP]"], [0] * 3)]
    vocabulary = models["bert"].tokenizer.backend.get_vocab()
    for row, (tokens, types) in enumerate(expected):
        mask = np.asarray(batch.mask[row])
        assert batch.ids[row][mask].tolist() == [vocabulary[token] for token in tokens]
        assert batch.token_types[row][mask].tolist() == types
        assert not batch.token_types[row][~mask].any()


def test_pairs_are_those_of_transformers(models):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    for model in models.values():
        theirs = transformers.AutoTokenizer.from_pretrained(model.checkpoint.folder)
        batch = model.tokenize(PAIRS)
        for row, pair in enumerate(PAIRS):
            expected, mask = theirs(*pair), np.asarray(batch.mask[row])
            assert batch.ids[row][mask].tolist() == expected["input_ids"]
            if model.config.token_types > 1:
                assert batch.token_types[row][mask].tolist() == expected["token_type_ids"]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([("the", "")], {}, "text 0 is empty"),
        (
            [("the " * 20, "saw")],
            {"truncate": True},
            r"text 0 has 24 tokens, .* shorten it yourself: a pair is not cut",
        ),
        (["the"], {"pad_to_multiple_of": 0}, "pad_to_multiple_of is a whole number from 1 up"),
    ],
)
def test_refusals(models, texts, options, message):
    with pytest.raises(JaxqkvError, match=message):
        models["bert"].tokenize(texts, **options)


def test_a_token_of_the_template_in_a_text(models):
    with pytest.warns(JaxqkvWarning, match=r"^text 1 contains \[SEP\], .* give a pair \(one, other\)$"):
        models["bert"].tokenize(["the saw", "the [SEP] saw"])
    models["bert"].tokenize(["the [MASK] saw"])
    models["gpt2"].tokenize(["saw<|endoftext|> the"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_lengths_are_rounded_up(models, side):
    model, texts = models["bert"], ["the saw", "the the the saw"]
    plain = model.tokenize(texts, padding_side=side)
    assert plain.ids.shape == (2, 6)
    for multiple, width in ((1, 6), (4, 8), (6, 6), (32, 17)):
        batch = model.tokenize(texts, padding_side=side, pad_to_multiple_of=multiple)
        assert batch.ids.shape == (2, width)
        for row in range(2):
            mask = np.asarray(batch.mask[row])
            assert batch.ids[row][mask].tolist() == plain.ids[row][np.asarray(plain.mask[row])].tolist()


@pytest.mark.parametrize(
    ("pair", "tokens", "types"),
    [
        ("segments", "<s> a </s> b </s>", [0, 0, 0, 1, 1]),
        ("doubled", "<s> a </s> </s> b </s>", [0] * 6),
        ("anew", "<s> a </s> <s> b </s>", [0, 0, 0, 1, 1, 1]),
    ],
)
def test_templates_of_pairs(pair, tokens, types):
    """BERT's, RoBERTa's, and that of tokens which are asked for one by one."""
    import tokenizers

    words = {word: index for index, word in enumerate(("a", "b", "<s>", "</s>"))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    backend.post_processor = tokenizer_files._template(backend, ["<s>", "</s>"], pair)
    assert (encoding := backend.encode("a", "b")).tokens == tokens.split()
    assert encoding.type_ids == types
    assert backend.encode("a").tokens == ["<s>", "a", "</s>"]
