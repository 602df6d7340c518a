"""Tokenizers from every kind of file beside each other: the ids of transformers 5, a warning or a refusal."""

import json
import warnings

import pytest
from conftest import BERT, GPT2, changed
from helpers.tokenizer_cases import (
    BERT_TEXT,
    BYTE_LEVEL,
    CASES,
    CLS_SEP,
    FAST,
    GOLDENS,
    TEXTS,
    WORDPIECE,
    config,
    cut_and_padded,
    file,
    flagged,
    ids_of_transformers,
    template,
    write,
)

from jaxqkv.checkpoints.checkpoint import BUNDLED
from jaxqkv.errors import CheckpointError, JaxqkvError, JaxqkvWarning
from jaxqkv.text.tokenizers import Tokenizer

EXPECTED = json.loads(GOLDENS.read_text())
# Of the cases in which files contradict each other, what is said.
WITHOUT_EFFECT = "without effect, as in transformers 5"
WARNED = {
    "never_split": r'never_split = \["\[E1\]"\] is without effect',
    "do_basic_tokenize": "do_basic_tokenize = false is without effect",
    "bert-json: lowercase false": "tokenizer.json: lowercase is false, and tokenizer_config.json has no do_lower_case",
    "bert-json: strip_accents false in it": "strip_accents is false, and tokenizer_config.json has no strip_accents",
    "bert-json: handle_chinese_chars false": "handle_chinese_chars is false, and .* no tokenize_chinese_chars",
    "bert-json: clean_text false": "clean_text is false",
    "bert-json: another normalizer": "normalizer is Lowercase, not BertNormalizer",
    "bert-json: no normalizer": "normalizer is null, not BertNormalizer",
    "bert-json: another pre_tokenizer": "pre_tokenizer is Whitespace, not BertPreTokenizer",
    "bert-json: another template": "post_processor puts other tokens before or after a text",
    "bert-json: another template, named": "post_processor puts other tokens before or after a text",
    "bert-json: no template": "post_processor puts other tokens before or after a text",
    "bert-json: another flag": r"added tokens '\[CLS\]' are different in tokenizer_config.json",
    "bert-json: alone, lower": "tokenizer_config.json: do_lower_case = false is without effect",
    "bert-json: alone, add_bos_token": "tokenizer_config.json: add_bos_token = false is without effect",
    "bert-json: class unknown": "tokenizer_config.json: tokenizer_class: NoSuchTokenizer is not implemented here",
    "gpt2-json: add_bos_token": "add_bos_token = true is without effect",
    "gpt2-json: add_eos_token": "add_eos_token = true is without effect",
    "gpt2-json: both ends": "add_(bos|eos)_token = true is without effect",
    "gpt2-json: spaced in it": "add_prefix_space is true, and tokenizer_config.json has no add_prefix_space",
    "gpt2-json: no regex": "use_regex is false",
    "gpt2-json: normalizer": "normalizer is Lowercase, not null",
    "gpt2-json: another pre_tokenizer": "pre_tokenizer is Whitespace, not ByteLevel",
    "gpt2-json: template against add_bos_token": "add_bos_token = false is without effect",
    "gpt2-json: alone, spaced": "add_prefix_space = true is without effect",
}


def model_of(kind, vocab_size=400):
    return changed({"bert": BERT, "gpt2": GPT2}[kind], vocab_size=vocab_size)


def built(folder, kind="bert", vocab_size=400):
    """The tokenizer and what was warned of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tokenizer = Tokenizer.from_folder(folder, model_of(kind, vocab_size))
    assert all(each.category is JaxqkvWarning for each in said)
    return tokenizer, [str(each.message) for each in said]


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_transformers(tmp_path, name):
    base, files = CASES[name]
    kind = base.split("-")[0]
    tokenizer, said = built(write(tmp_path / "model", base, files), kind)
    assert tokenizer.encode([TEXTS[kind]]) == [EXPECTED[name]]
    pattern = WARNED.get(name, WARNED.get(name.split(": ")[1]))
    if pattern is None:
        assert said == []
    else:
        assert said
        for line in said:
            assert line.startswith(str(tmp_path))
            with pytest.raises(AssertionError, match=pattern):
                raise AssertionError(line)


@pytest.mark.parametrize("name", CASES)
def test_the_expected_ids_are_those_of_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("earlier versions give other ids for some of these files")
    base, files = CASES[name]
    folder = write(tmp_path / "model", base, files)
    assert ids_of_transformers(folder, TEXTS[base.split("-")[0]]) == EXPECTED[name]


def test_what_changes_ids_changes_the_fingerprint(tmp_path):
    """Cases with different ids for the text have different fingerprints."""
    ids = {}
    for number, (name, (base, files)) in enumerate(CASES.items()):
        tokenizer, _ = built(write(tmp_path / str(number), base, files), base.split("-")[0])
        ids.setdefault(tokenizer.fingerprint, []).append((base.split("-")[0], EXPECTED[name]))
    assert len(ids) > 30
    assert all(one == cases[0] for cases in ids.values() for one in cases)


# --- the bundled vocabularies, with a token written over one of their rows ---


def with_token(folder, name, token, keep_file, **settings):
    """A bundled tokenizer whose last row is another token: tokenizer.json, or the vocabulary's own files."""
    data = json.loads((BUNDLED[name] / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[token] = vocabulary.pop(last)
    if keep_file:
        data["model"]["merges"] = [merge for merge in data["model"].get("merges", []) if "".join(merge) != last]
        (folder / "tokenizer.json").write_text(json.dumps(data))
    elif name == "demo-bert":
        (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)))
    else:
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        merges = [" ".join(merge) for merge in data["model"]["merges"] if "".join(merge) != last]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    kind = name.removeprefix("demo-")
    return Tokenizer.from_folder(folder, model_of(kind, 4096)), vocabulary[token]


@pytest.mark.parametrize("keep_file", [True, False], ids=["tokenizer.json", "vocabulary"])
@pytest.mark.parametrize(
    ("name", "token", "settings", "text"),
    [
        ("demo-bert", "café", {"strip_accents": False}, "café"),
        ("demo-bert", "会社", {"tokenize_chinese_chars": False}, "会社"),
        ("demo-bert", "The", {"do_lower_case": False}, "The"),
        ("demo-bert", "[E1]", {"additional_special_tokens": ["[E1]"]}, "[E1]"),
        ("demo-bert", "[E1]", {"added_tokens_decoder": {"4095": flagged("[E1]")}}, "[E1]"),
        ("demo-gpt2", "[E1]", {"additional_special_tokens": ["[E1]"]}, "[E1]"),
        ("demo-gpt2", "[E1]", {"added_tokens_decoder": {"4095": flagged("[E1]")}}, "[E1]"),
    ],
)
def test_a_token_that_the_settings_make_one(tmp_path, name, token, settings, text, keep_file):
    tokenizer, row = with_token(tmp_path, name, token, keep_file, **settings)
    assert tokenizer.encode([text], special_tokens=False) == [[row]]


@pytest.mark.parametrize("keep_file", [True, False], ids=["tokenizer.json", "vocabulary"])
def test_add_prefix_space(tmp_path, keep_file):
    tokenizer, _ = with_token(tmp_path, "demo-gpt2", "[E1]", keep_file, add_prefix_space=True)
    assert tokenizer.tokens(tokenizer.encode(["I saw"])[0]) == [" I", " saw"]


# --- truncation ---


ENDS = {
    "first": ([("[CLS]", 2), None], [2], []),
    "last": ([None, ("[SEP]", 3)], [], [3]),
    "both": ([("[CLS]", 2), None, ("[SEP]", 3)], [2], [3]),
    "none": ([None], [], []),
    "two first": ([("[CLS]", 2), ("[MASK]", 4), None], [2, 4], []),
    "two last": ([None, ("[MASK]", 4), ("[SEP]", 3)], [], [4, 3]),
    "two and one": ([("[CLS]", 2), ("[MASK]", 4), None, ("[SEP]", 3)], [2, 4], [3]),
    "one token at both": ([("[SEP]", 3), None, ("[SEP]", 3)], [3], [3]),
}
IDS = {token: index for index, token in enumerate(WORDPIECE)}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("words", ["saw e1 x the ca", "[CLS] [MASK] saw [SEP] [CLS] [MASK]", "[SEP] [SEP] [SEP]"])
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.filterwarnings("ignore:text 1 contains:jaxqkv.errors.JaxqkvWarning")
def test_truncation_keeps_what_the_template_adds(tmp_path, ends, words, side):
    """And of the text as much as there is room for, special tokens in it included."""
    pieces, before, after = ENDS[ends]
    files = file(post_processor=template(*pieces)) | config(**FAST, truncation_side=side)
    tokenizer, _ = built(write(tmp_path / "model", "bert-json", files))
    text = [IDS[word] for word in words.split()] * 5
    model = model_of("bert")
    room = model.n_positions - len(before) - len(after)
    kept = text[:room] if side == "right" else text[-room:]
    batch = tokenizer.batch(["saw x", " ".join(words.split() * 5)], model, truncate=True)
    assert batch.ids[1].tolist() == (before + kept + after if len(text) > room else before + text + after)
    assert batch.ids[0][batch.mask[0]].tolist() == [*before, IDS["saw"], IDS["x"], *after]
    bare = tokenizer.batch(" ".join(words.split() * 6), model, truncate=True, special_tokens=False)
    longer = [IDS[word] for word in words.split()] * 6
    assert bare.ids[0].tolist() == (longer[:17] if side == "right" else longer[-17:])


def test_the_file_says_at_which_side_is_cut(tmp_path):
    tokenizer, _ = built(write(tmp_path / "model", "bert-json", cut_and_padded("Left")))
    batch = tokenizer.batch("the " * 20 + "saw", model_of("bert"), truncate=True)
    assert batch.ids[0].tolist() == [2, *[5] * 14, IDS["saw"], 3]
    assert tokenizer.encode(["the"] * 2) == [[2, 5, 3]] * 2


def test_no_room_beside_the_special_tokens(tmp_path):
    tokenizer, _ = built(write(tmp_path / "model", "bert", {}))
    with pytest.raises(JaxqkvError, match="adds 2 special tokens to a text, and the model has 2 positions"):
        tokenizer.batch("saw saw", changed(model_of("bert"), n_positions=2), truncate=True)


# --- vocabularies and models of different sizes ---


@pytest.mark.parametrize("base", ["bert", "bert-json"])
def test_a_token_beyond_the_model_is_refused_where_a_text_has_it(tmp_path, base):
    size = len(WORDPIECE)
    tokenizer, said = built(write(tmp_path / "model", base, config(pad_token="[NEW]")), vocab_size=size)
    assert said == []
    assert tokenizer.encode([BERT_TEXT]) == [EXPECTED["bert: nothing"]]
    message = f"the tokenizer makes token {size}, the model has {size}; they do not belong together"
    with pytest.raises(CheckpointError, match=message):
        tokenizer.encode(["saw [NEW]"])


def test_a_larger_vocabulary_is_warned_of(tmp_path):
    tokenizer, said = built(write(tmp_path / "model", "bert", {}), vocab_size=20)
    assert said == [
        f"{tmp_path / 'model'}: the tokenizer has {len(WORDPIECE)} tokens, the model only 20; if they do not belong "
        "together, all ids are wrong"
    ]
    assert tokenizer.encode(["saw"]) == [[2, IDS["saw"], 3]]
    with pytest.raises(CheckpointError, match=f"the tokenizer makes token {IDS['x']}, the model has 20"):
        tokenizer.batch(["saw", "saw x"], model_of("bert"))


@pytest.mark.parametrize(
    ("tokens", "where", "actual"),
    [
        ({"added_tokens.json": {"[E1]": 17}}, r"added_tokens.json: \[E1\]", 16),
        ({"added_tokens.json": {"[NEW]": 99}}, r"added_tokens.json: \[NEW\]", len(WORDPIECE)),
        (config(added_tokens_decoder={"3": flagged("[E1]")}), "added_tokens_decoder: 3", 16),
    ],
)
def test_a_token_with_another_id_than_declared(tmp_path, tokens, where, actual):
    _, (said, *more) = built(write(tmp_path / "model", "bert", tokens))
    assert not more
    with pytest.raises(AssertionError, match=rf"{where}: the id of '\[(E1|NEW)\]' is {actual}, by the vocabulary, not"):
        raise AssertionError(said)


def test_tokens_with_flags_in_a_list(tmp_path):
    """As earlier versions wrote them; transformers 5 fails on it."""
    listed = {"special_tokens_map.json": {"additional_special_tokens": [flagged("[E2]", lstrip=True)]}}
    tokenizer, said = built(write(tmp_path / "model", "gpt2", listed), "gpt2")
    assert said == []
    (ids,) = tokenizer.encode(["I  [E2]"])
    assert [BYTE_LEVEL[i] for i in ids] == ["I", "[E2]"]


# --- classes and names ---


def test_a_class_of_another_kind_is_not_meant_where_no_file_names_it(tmp_path):
    """A tokenizer.json of BPE in a folder of BERT, and nothing more: the file decides."""
    folder = write(tmp_path / "model", "gpt2-json", {"config.json": {"model_type": "bert"}})
    tokenizer, said = built(folder)
    assert said == []
    assert tokenizer.encode([TEXTS["gpt2"]]) == [EXPECTED["gpt2: nothing"]]


def test_other_names_are_used_where_a_token_is_missing(tmp_path):
    """The vocabulary of a model of its own names, without BERT's."""
    files = {"vocab.txt": "\n".join(["<p>", "<unk>", "<s>", "</s>", "saw"])} | config(**CLS_SEP, unk_token="<unk>")
    tokenizer, _ = built(write(tmp_path / "model", "bert", files), vocab_size=5)
    assert tokenizer.encode(["saw [CLS]"]) == [[2, 4, 1, 1, 1, 3]]
