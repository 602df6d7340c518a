"""Tokenizer files that are refused, by file and key."""

import pytest
from conftest import CONFIGS
from helpers.tokenizer_cases import FAST, config, flagged, write

from jaxqkv.errors import CheckpointError
from jaxqkv.text.tokenizers import Tokenizer

CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
REFUSED = {
    "no JSON": ("bert", {CONFIG: "{"}, f"{CONFIG}: not readable as JSON"),
    "a list": ("bert", {ADDED: "[]"}, f"{ADDED}: expected a JSON object, found list"),
    "no object": ("bert", {MAP: "3"}, f"{MAP}: expected a JSON object, found int"),
    "a class that is none": ("bert", config(tokenizer_class=3), f"{CONFIG}: tokenizer_class = 3 is not the name"),
    "japanese": (
        "bert",
        config(tokenizer_class="BertJapaneseTokenizer"),
        f"{CONFIG}: tokenizer_class is 'BertJapaneseTokenizer', which is not supported without tokenizer.json; "
        "supported are GPT2Tokenizer, BertTokenizer",
    ),
    "japanese, in config.json": (
        "bert",
        {"config.json": {"tokenizer_class": "BertJapaneseTokenizer"}},
        "/config.json: tokenizer_class is 'BertJapaneseTokenizer', which is not supported without",
    ),
    "another model's": ("gpt2", {"config.json": {"model_type": "xlm"}}, "/config.json: model_type is 'xlm', which is"),
    "fast without file": (
        "bert",
        config(**FAST),
        "tokenizer_class is 'PreTrainedTokenizer.*', which needs tokenizer.json",
    ),
    "another kind": (
        "gpt2-json",
        config(tokenizer_class="BertTokenizer"),
        "is 'BertTokenizer', whose model is WordPiece, and tokenizer.json has a BPE; to use tokenizer.json alone",
    ),
    "other files": (
        "gpt2",
        config(tokenizer_class="BertTokenizer"),
        "no tokenizer.json and no vocab.txt, which BertTokenizer needs; if that is the wrong class",
    ),
    "no merges": ("gpt2", {"merges.txt": None}, "no tokenizer.json and no merges.txt, which GPT2Tokenizer needs"),
    "a flag": ("bert", config(do_lower_case="no"), f"{CONFIG}: do_lower_case = 'no' is not true or false"),
    "a null": ("bert", config(do_lower_case=None), f"{CONFIG}: do_lower_case = None is not true or false"),
    "accents": ("bert", config(strip_accents=1), f"{CONFIG}: strip_accents = 1 is not true or false"),
    "a space": ("gpt2", config(add_prefix_space=1), f"{CONFIG}: add_prefix_space = 1 is not true or false"),
    "a side": ("bert", config(truncation_side="up"), f"{CONFIG}: truncation_side = 'up' is neither 'left' nor 'right'"),
    "no token": ("bert", config(cls_token=7), f"{CONFIG}: cls_token: expected a token, .* not 7"),
    "true": ("bert", config(cls_token=True), f"{CONFIG}: cls_token: expected a token, .* not True"),
    "an empty token": ("bert", {MAP: {"cls_token": ""}}, f"{MAP}: cls_token: expected a token, .* not ''"),
    "no list": ("bert", config(additional_special_tokens="[E1]"), r": expected a list of tokens, not '\[E1\]'"),
    "a number in a list": (
        "bert",
        config(extra_special_tokens=[5]),
        "extra_special_tokens: expected a token, .* not 5",
    ),
    "another flag": (
        "bert",
        config(added_tokens_decoder={"16": flagged("[E1]") | {"strip": True}}),
        f"{CONFIG}: added_tokens_decoder: 16: strip = True is no flag of a token; they are lstrip, rstrip",
    ),
    "a string declared": (
        "bert",
        config(added_tokens_decoder={"16": "[E1]"}),
        "added_tokens_decoder: 16: expected an id",
    ),
    "no id": (
        "bert",
        config(added_tokens_decoder={"x": flagged("[E1]")}),
        "added_tokens_decoder: x: expected an id and",
    ),
    "a list declared": ("bert", config(added_tokens_decoder=[]), f"{CONFIG}: added_tokens_decoder: expected an object"),
    "an id that is none": (
        "bert",
        {ADDED: {"[E1]": "16"}},
        r"added_tokens.json: '\[E1\]': expected a token and its id",
    ),
    "no class token": ("bert", config(cls_token=None), f"{CONFIG}: cls_token is null, and BertTokenizer needs one"),
    "no unknown token": ("bert", config(unk_token="<x>"), "vocab.txt: lacks unk_token '<x>'; if it has another name"),
    "an unknown end": ("bert", config(sep_token="<x>"), "vocab.txt: lacks sep_token '<x>'; if it has another name"),
    "an unknown end in the file": ("bert-json", config(sep_token="<x>"), "tokenizer.json: lacks sep_token '<x>'"),
    "an unknown beginning": (
        "gpt2",
        config(add_bos_token=True, bos_token="<x>"),
        "vocab.json: lacks bos_token '<x>'; if it has another name, set bos_token in tokenizer_config.json",
    ),
    "other files named": (
        "bert",
        config(fast_tokenizer_files=["tokenizer.4.json"]),
        "fast_tokenizer_files is not supp",
    ),
    "merges there": ("gpt2", config(merges=["a b"]), f"{CONFIG}: merges is not supported; save the tokenizer again"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_file_and_key(tmp_path, name):
    base, files, message = REFUSED[name]
    kind = base.split("-")[0]
    folder = write(tmp_path / "model", base, files)
    with pytest.raises(CheckpointError, match=message) as error:
        Tokenizer.from_folder(folder, CONFIGS[kind])
    assert str(error.value).startswith(str(folder))
    assert "\n" not in str(error.value)
