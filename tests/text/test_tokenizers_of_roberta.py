"""Tokenizers of RoBERTa's kind, of DistilBERT, XLM-RoBERTa and CamemBERT: the ids of transformers 5."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
from conftest import CONFIGS, DISTILBERT, ROBERTA, changed, write_folder
from helpers.roberta_tokenizer_cases import BYTE_LEVEL, CASES, GOLDENS, TEXTS, UNIGRAM, base_of, config, file, write
from helpers.tokenizer_cases import ids_of_transformers
from helpers.tokenizer_cases import write as write_other

from jaxqkv.architectures import open_checkpoint
from jaxqkv.architectures.roberta import CamembertConfig, XLMRobertaConfig
from jaxqkv.cli.main import main
from jaxqkv.errors import CheckpointError, JaxqkvWarning, NoTokenizer
from jaxqkv.model import comparison
from jaxqkv.text.tokenizers import Tokenizer

EXPECTED = json.loads(GOLDENS.read_text())
OF_ROBERTA = {field.name: getattr(ROBERTA, field.name) for field in dataclasses.fields(ROBERTA)}
MODELS = CONFIGS | {"xlm-roberta": XLMRobertaConfig(**OF_ROBERTA), "camembert": CamembertConfig(**OF_ROBERTA)}
# Of the cases in which files contradict each other, what is said.
WARNED = {
    "roberta-json: spaced in it": "add_prefix_space is true, and",
    "roberta-json: normalizer": "normalizer is Lowercase, not null",
    "roberta-json: another pre_tokenizer": "pre_tokenizer is Whitespace, not ByteLevel",
    "roberta-json: no template": "post_processor puts other tokens before or after a text",
    "roberta-json: another flag": "added tokens '<mask>' are different in tokenizer_config.json",
    "add_bos_token": "add_bos_token = false is without effect",
    "distilbert-json: lowercase false": "lowercase is false, and tokenizer_config.json has no do_lower_case",
    "sp_model_kwargs set": 'sp_model_kwargs = {"nbest_size": 2} is without effect',
    "never in it": "prepend_scheme is 'never', and tokenizer_config.json has no add_prefix_space",
    "metaspace alone": "pre_tokenizer is Metaspace, not WhitespaceSplit and Metaspace",
    "unsplit": "split of Metaspace is false",
    "another normalizer": "normalizer is Precompiled and Lowercase, not Precompiled or null",
    "lower": "normalizer is Lowercase, not Precompiled or null",
    "no template": "post_processor puts other tokens before or after a text",
    "alone, add_prefix_space": "add_prefix_space = false is without effect",
    "unk_id": "unk_id is 1, not 3",
    "byte_fallback": "byte_fallback is true, not false",
}


def built(folder, kind, vocab_size=400):
    """The tokenizer and what was warned of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tokenizer = Tokenizer.from_folder(folder, changed(MODELS[kind], vocab_size=vocab_size))
    assert all(each.category is JaxqkvWarning for each in said)
    return tokenizer, [str(each.message) for each in said]


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_transformers(tmp_path, name):
    base, files = CASES[name]
    kind, _ = base_of(base)
    tokenizer, said = built(write(tmp_path / "model", base, files), kind)
    assert tokenizer.encode([TEXTS[kind]]) == [EXPECTED[name]]
    expected = WARNED.get(name, WARNED.get(name.split(": ")[1]) if kind != "roberta" or "bos" in name else None)
    if expected is None:
        assert said == []
    else:
        assert said
        assert [line for line in said if expected not in line or not line.startswith(str(tmp_path))] == []


@pytest.mark.parametrize("name", CASES)
def test_the_expected_ids_are_those_of_transformers(tmp_path, name):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("earlier versions give other ids for some of these files")
    base, files = CASES[name]
    folder = write(tmp_path / "model", base, files)
    assert ids_of_transformers(folder, TEXTS[base_of(base)[0]]) == EXPECTED[name]


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "xlm-roberta-json", "camembert-json"])
def test_a_folder_that_transformers_saves(tmp_path, kind):
    """Nothing is warned of, and the ids stay."""
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("earlier versions save other files")
    folder, (base, _) = write(tmp_path / "model", kind, {}), base_of(kind)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    theirs.save_pretrained(tmp_path / "saved")
    tokenizer, said = built(tmp_path / "saved", base)
    assert said == []
    assert tokenizer.encode([TEXTS[base]]) == [EXPECTED[f"{kind}: nothing"]] == [theirs(TEXTS[base])["input_ids"]]


def test_roberta_puts_its_own_tokens_around_a_text(tmp_path):
    """By hand: bytes merged in the order of the list, between <s> and </s>; pads have id 0 and the mask tells them."""
    tokenizer, _ = built(write(tmp_path / "model", "roberta", {}), "roberta")
    ids = [0, *(BYTE_LEVEL.index(token) for token in ("I", "Ġsaw", "Ġthe")), 2]
    assert tokenizer.encode(["I saw the"]) == [ids]
    batch = tokenizer.batch(["I saw the", "I"], changed(ROBERTA, vocab_size=300))
    assert batch.ids.tolist() == [ids, [0, ids[1], 2, 0, 0]]
    assert batch.mask.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert np.asarray(batch.positions)[1, :3].tolist() == [0, 1, 2]


@pytest.mark.parametrize("kind", UNIGRAM)
def test_pieces_are_shown_with_their_spaces(tmp_path, kind):
    tokenizer, _ = built(write(tmp_path / "model", f"{kind}-json", {}), kind)
    assert tokenizer.tokens(tokenizer.encode(["Qaw café x"], special_tokens=False)[0]) == [" saw", " café", " ", "x"]


def test_a_vocabulary_too_small_for_the_unknown_token(tmp_path):
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<s>", 0.0], ["</s>", 0.0]], "byte_fallback": False}
    folder = write(tmp_path / "model", "xlm-roberta-json", file(model=model, added_tokens=[], post_processor=None))
    with pytest.raises(CheckpointError, match=f"{folder}: tokenizer files cannot be read") as error:
        built(folder, "xlm-roberta")
    assert "\n" not in str(error.value)


# --- refusals ---


@pytest.mark.parametrize("kind", UNIGRAM)
def test_sentencepiece_alone_is_refused(tmp_path, kind):
    folder = write_folder(tmp_path / "model", MODELS[kind])
    (folder / "sentencepiece.bpe.model").write_bytes(b"\x0a\x0e")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tokenizer_files == ["sentencepiece.bpe.model"]
    with pytest.raises(NoTokenizer) as error:
        checkpoint.tokenizer()
    assert str(error.value) == (
        f"{folder}: no tokenizer.json, and a SentencePiece vocabulary is read from it alone; transformers writes it: "
        f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')"
    )


REFUSED = {
    "bert's vocabulary": (
        "distilbert",
        {"config.json": {"model_type": "roberta"}},
        "no tokenizer.json and no vocab.json and no merges.txt, which RobertaTokenizer needs",
    ),
    "another kind": (
        "roberta-json",
        config(tokenizer_class="XLMRobertaTokenizer"),
        "is 'XLMRobertaTokenizer', whose model is Unigram, and tokenizer.json has a BPE; to use tokenizer.json alone",
    ),
    "no class token": ("roberta", config(cls_token=None), "cls_token is null, and RobertaTokenizer needs one"),
    "an unknown end": ("roberta", config(sep_token="<x>"), "vocab.json: lacks sep_token '<x>'; if it has another name"),
    "no end": ("camembert-json", config(eos_token=None), "eos_token is null, and CamembertTokenizer needs one"),
    "an unknown beginning": (
        "xlm-roberta-json",
        config(bos_token="<x>"),
        "tokenizer.json: lacks bos_token '<x>'; if it has another name, set bos_token in tokenizer_config.json",
    ),
    "a space": ("xlm-roberta-json", config(add_prefix_space=None), "add_prefix_space = None is not true or false"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_file_and_key(tmp_path, name):
    base, files, message = REFUSED[name]
    folder = write(tmp_path / "model", base, files)
    with pytest.raises(CheckpointError) as error:
        built(folder, base_of(base)[0])
    assert message in str(error.value)
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)


# --- the command that compares with transformers ---


@pytest.mark.parametrize(
    ("kind", "base", "files"),
    [
        ("roberta", "roberta-json", {}),
        ("roberta", "bert", config(tokenizer_class="BertTokenizer")),
        ("distilbert", "distilbert", {}),
    ],
)
def test_verify_compares_token_ids(tmp_path, capsys, monkeypatch, kind, base, files):
    """Those of all its texts, and says so; tests of architectures compare the model."""
    pytest.importorskip("torch", exc_type=ImportError)
    pytest.importorskip("transformers", exc_type=ImportError)
    monkeypatch.setattr(comparison, "compare", lambda *arguments: [])
    model = {"roberta": ROBERTA, "distilbert": DISTILBERT}[kind]
    folder = write_folder(tmp_path / "model", changed(model, vocab_size=300))
    saved = (folder / "config.json").read_text()
    (write_other if base == "bert" else write)(folder, base, files)
    (folder / "config.json").write_text(saved)
    report = tmp_path / "verify.json"
    assert main(["verify", str(folder), "--text", "I saw the", "--out", str(report)]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("token ids")]
    tokens = json.loads(report.read_text())["token ids"]
    assert tokens["texts"] > 20
    assert tokens["different"] == []
    assert row.split() == ["token", "ids", "0", "of", str(tokens["texts"]), "texts", "pass"]
