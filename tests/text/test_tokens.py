import json

import numpy as np
import pytest
import tokenizers
from conftest import BERT, GPT2, changed, write_folder

import jaxqkv
from jaxqkv.checkpoints.checkpoint import BUNDLED
from jaxqkv.errors import CheckpointError, JaxqkvError, JaxqkvWarning
from jaxqkv.text.tokenizers import Tokenizer

MERGES = ["Ġ h", "h e", "Ġ t", "Ġt he", "Ġh e"]
WORDS = ["the", "cat", "##s", "her", ",", "."]


@pytest.fixture
def gpt2_files(tmp_path):
    """A byte-level vocabulary of 256 bytes, five merges and the end token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    return tmp_path


@pytest.fixture
def bert_files(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    return tmp_path


def test_byte_level_bpe_from_vocab_and_merges(gpt2_files):
    tokenizer = Tokenizer.from_folder(gpt2_files, changed(GPT2, vocab_size=262))
    (ids,) = tokenizer.encode([" the he\né<|endoftext|>"])
    assert tokenizer.tokens(ids)[:2] == [" the", " he"]
    assert tokenizer.backend.decode(ids, skip_special_tokens=False) == " the he\né<|endoftext|>"
    assert ids[-1] == 261


def test_wordpiece_from_vocab(bert_files):
    tokenizer = Tokenizer.from_folder(bert_files, BERT)
    assert tokenizer.encode(["The CATS, xyz."]) == [[2, 5, 6, 7, 9, 1, 10, 3]]
    assert tokenizer.encode(["The CATS"], special_tokens=False) == [[5, 6, 7]]
    (bert_files / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert Tokenizer.from_folder(bert_files, BERT).encode(["The cat"], special_tokens=False) == [[1, 6]]


def test_padding_on_either_side(bert_files):
    tokenizer = Tokenizer.from_folder(bert_files, BERT)
    texts = ["the cat", "her", "the cats, the cat"]
    for side in ("right", "left"):
        batch = tokenizer.batch(texts, BERT, padding_side=side)
        found, mask, positions = map(np.asarray, (batch.ids, batch.mask, batch.positions))
        assert found.shape == (3, 8)
        for row, text in enumerate(texts):
            (ids,) = tokenizer.encode([text])
            np.testing.assert_array_equal(found[row][mask[row]], ids)
            np.testing.assert_array_equal(positions[row][mask[row]], np.arange(len(ids)))
        first = np.argmax(mask, axis=1)
        np.testing.assert_array_equal(first, [0, 0, 0] if side == "right" else [4, 5, 0])


def test_too_long_is_refused_or_cut(bert_files):
    tokenizer = Tokenizer.from_folder(bert_files, BERT)
    with pytest.raises(JaxqkvError, match="text 1 has 22 tokens, more than the model's 17 positions"):
        tokenizer.batch(["cat", "cat " * 20], BERT)
    batch = tokenizer.batch(["cat", "cat " * 20], BERT, truncate=True)
    np.testing.assert_array_equal(batch.ids[1], [2] + 15 * [6] + [3])
    batch = tokenizer.batch("cat " * 20, BERT, truncate=True, special_tokens=False)
    np.testing.assert_array_equal(batch.ids[0], 17 * [6])


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "the list is empty"),
        ("", {}, "text 0 is empty"),
        (["cat", "  "], {}, "text 1 is empty"),
        ("cat", {"padding_side": "both"}, "padding_side is 'left' or 'right', not 'both'"),
        (["cat", "cat" * 2_000_000], {}, "text 1 has 6,000,000 characters, far more than the model's 17 positions"),
    ],
)
def test_nothing_to_tokenize(bert_files, texts, options, message):
    with pytest.raises(JaxqkvError, match=message):
        Tokenizer.from_folder(bert_files, BERT).batch(texts, BERT, **options)


def test_tokenizers_that_do_not_fit(bert_files, tmp_path_factory):
    with pytest.warns(JaxqkvWarning, match="the tokenizer has 11 tokens, the model only 7; if they do not belong"):
        tokenizer = Tokenizer.from_folder(bert_files, changed(BERT, vocab_size=7))
    with pytest.raises(JaxqkvError, match="the tokenizer makes token 7, the model has 7; they do not belong together"):
        tokenizer.encode(["the cat", "cats"])
    with pytest.raises(JaxqkvError, match=r"no tokenizer.json and no vocab.json"):
        Tokenizer.from_folder(bert_files, GPT2)
    (bert_files / "vocab.txt").write_text("cat\n[UNK]\n")
    with pytest.raises(JaxqkvError, match=r"vocab.txt: lacks cls_token '\[CLS\]'; if it has another name"):
        Tokenizer.from_folder(bert_files, BERT)
    (bert_files / "tokenizer.json").write_text("{")
    with pytest.raises(JaxqkvError, match="tokenizer files cannot be read"):
        Tokenizer.from_folder(bert_files, BERT)
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(JaxqkvError, match=r"no tokenizer.json and no merges.txt, which GPT2Tokenizer needs"):
        Tokenizer.from_folder(folder, GPT2)
    with pytest.raises(JaxqkvError, match=r"has no tokenizer\.json"):
        jaxqkv.load(write_folder(folder / "x", GPT2)).tokenize("cat")


def test_a_tokenizer_that_panics(tmp_path):
    """Which is no `Exception` there: at the text, and so at no earlier time."""
    settings = json.loads((BUNDLED["demo-gpt2"] / "tokenizer.json").read_text())
    settings["normalizer"] = {"type": "Replace", "pattern": {"String": ""}, "content": "x"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    tokenizer = Tokenizer.from_folder(tmp_path, jaxqkv.load("demo-gpt2").config)
    with pytest.raises(CheckpointError, match=rf"{tmp_path}: the tokenizer fails \("):
        tokenizer.encode(["cat"])


@pytest.mark.parametrize("number", [11, 2**32 - 1])
def test_a_special_token_that_the_model_does_not_have(bert_files, number):
    settings = json.loads(Tokenizer.from_folder(bert_files, BERT).backend.to_str())
    settings["post_processor"]["special_tokens"]["[SEP]"]["ids"] = [number]
    (bert_files / "tokenizer.json").write_text(json.dumps(settings))
    (bert_files / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    config = changed(BERT, vocab_size=11)
    with pytest.raises(CheckpointError, match=f"the tokenizer makes token {number}, the model has 11; they do not"):
        Tokenizer.from_folder(bert_files, config).batch("cat", config)


@pytest.mark.parametrize("name", sorted(BUNDLED))
def test_same_ids_as_transformers(name):
    """The bundled tokenizers give what `transformers` reads from the same files."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    theirs = transformers.AutoTokenizer.from_pretrained(BUNDLED[name])
    texts = ["I saw her at the market.", "Déjà vu — naïve façade\n\t2,048 tokens?", "日本語 🙂 <b>x</b>"]
    assert jaxqkv.load(name).tokenizer.encode(texts) == theirs(texts)["input_ids"]
