"""Folders with tokenizer files of every kind, for `test_tokenizer_files.py`."""

import json

import tokenizers

PIECES = [
    "the",
    "The",
    "THE",
    "ca",
    "##fe",
    "café",
    "会",
    "社",
    "会社",
    "saw",
    ",",
    "[E1]",
    "[E2]",
    "<unk>",
    "<s>",
    "</s>",
    "[",
    "]",
    "e1",
    "##1",
    "e",
    "E",
    "x",
]
WORDPIECE = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES]
MERGES = ["Ġ s", "a w", "Ġs aw", "Ġ t", "h e", "Ġt he", "Ġ I"]
ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
BYTE_LEVEL = [*ALPHABET, *(merge.replace(" ", "") for merge in MERGES), "<|endoftext|>", "[E1]", "[E2]", "<s>", "</s>"]
BERT_TEXT = "The café, 会社 saw[E1] [SEP] e1 [E2]x"
GPT2_TEXT = "I saw[E1] the<|endoftext|> I [E2]"
CLS_SEP = {"cls_token": "<s>", "sep_token": "</s>"}


def flagged(content, **flags):
    """An added token as `added_tokens_decoder` and `tokenizer.json` have it."""
    off = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), False)
    return {"content": content} | off | flags


def write(folder, base, files):
    """A folder of a base, and `files` over it: objects are merged, None deletes."""
    kind, _, form = base.partition("-")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    if kind == "bert":
        (folder / "vocab.txt").write_text("\n".join(WORDPIECE) + "\n")
    else:
        (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(BYTE_LEVEL)}))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    if form == "json":
        write_backend(folder, kind)
        for name in ("vocab.txt", "vocab.json", "merges.txt"):
            (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        path = folder / name
        if content is None:
            path.unlink()
        elif isinstance(content, str):
            path.write_text(content)
        else:
            before = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(before | content))
    return folder


def write_backend(folder, kind):
    """A tokenizer.json of the vocabulary's own files, as the class of that kind builds it from them alone."""
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    if kind == "bert":
        backend = tokenizers.Tokenizer(models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token="[UNK]"))
        backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        backend.add_special_tokens(WORDPIECE[:5])
        backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    else:
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        backend.add_special_tokens(["<|endoftext|>"])
    backend.save(str(folder / "tokenizer.json"))


def config(**settings):
    return {"tokenizer_config.json": settings}


# What the files say, by base: `bert` and `gpt2` with the vocabulary's own files, `-json` with tokenizer.json alone.
BERT = {
    "nothing": {},
    "do_lower_case false": config(do_lower_case=False),
    "do_lower_case true": config(do_lower_case=True),
    "strip_accents false": config(strip_accents=False),
    "strip_accents true": config(strip_accents=True, do_lower_case=False),
    "tokenize_chinese_chars": config(tokenize_chinese_chars=False),
    "never_split": config(never_split=["[E1]"]),
    "do_basic_tokenize": config(do_basic_tokenize=False),
    "additional_special_tokens": config(additional_special_tokens=["[E1]"]),
    "extra_special_tokens": config(extra_special_tokens=["[E1]"]),
    "extra and additional": config(extra_special_tokens=["[E1]"], additional_special_tokens=["[E2]"]),
    "extra empty": config(extra_special_tokens=[], additional_special_tokens=["[E2]"]),
    "extra by role": config(extra_special_tokens={"e_token": "[E1]"}),
    "another role": config(e_token="[E1]"),
    "decoder": config(added_tokens_decoder={"16": flagged("[E1]", special=True)}),
    "decoder lstrip": config(added_tokens_decoder={"17": flagged("[E2]", lstrip=True, rstrip=True)}),
    "decoder single_word": config(added_tokens_decoder={"17": flagged("[E2]", single_word=True)}),
    "decoder normalized": config(added_tokens_decoder={"17": flagged("[E2]", normalized=True)}),
    "decoder and map": config(added_tokens_decoder={"16": flagged("[E1]", special=True)})
    | {"special_tokens_map.json": {"additional_special_tokens": ["[E2]"]}},
    "added_tokens": {"added_tokens.json": {"[E1]": 16}},
    "added_tokens beyond": {"added_tokens.json": {"saw[E1]": len(WORDPIECE)}},
    "map": {"special_tokens_map.json": {"additional_special_tokens": ["[E2]"]}},
    "map extra": {"special_tokens_map.json": {"extra_special_tokens": ["[E2]"]}}
    | config(extra_special_tokens=["[E1]"]),
    "map over config": {"special_tokens_map.json": CLS_SEP | {"unk_token": "<unk>"}} | config(cls_token="[CLS]"),
    "map flags": {"special_tokens_map.json": {"mask_token": flagged("[E2]", lstrip=True)}},
    "typed": config(mask_token=flagged("[E2]", lstrip=True) | {"__type": "AddedToken"}),
    "other names": config(**CLS_SEP, unk_token="<unk>", pad_token="[E1]", mask_token="[E2]"),
    "split_special_tokens": config(split_special_tokens=True),
    "add_bos_token": config(add_bos_token=True, bos_token="<s>"),
    "class": config(tokenizer_class="BertTokenizerFast", do_lower_case=False),
    "class in config.json": {"config.json": {"tokenizer_class": "BertTokenizer"}},
}
GPT2 = {
    "nothing": {},
    "add_prefix_space": config(add_prefix_space=True),
    "add_bos_token": config(add_bos_token=True),
    "add_eos_token": config(add_eos_token=True, eos_token="</s>"),
    "both ends": config(add_bos_token=True, add_eos_token=True, bos_token="<s>", eos_token="</s>"),
    "other names": config(bos_token="<s>", eos_token="</s>", unk_token="<s>"),
    "no names": config(bos_token=None, eos_token=None, unk_token=None),
    "pad_token": config(pad_token="[E2]"),
    "additional_special_tokens": config(additional_special_tokens=["[E1]"]),
    "decoder": config(added_tokens_decoder={"264": flagged("[E1]"), "265": flagged("[E2]", lstrip=True)}),
    "added_tokens": {"added_tokens.json": {"[E1]": 264}},
    "map": {"special_tokens_map.json": {"additional_special_tokens": [flagged("[E2]", lstrip=True)]}},
    "split_special_tokens": config(split_special_tokens=True),
    "errors": config(errors="strict", trim_offsets=False, clean_up_tokenization_spaces=True, model_max_length=7),
    "class": config(tokenizer_class="GPT2TokenizerFast"),
}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
LOWER, SPLIT = {"type": "Lowercase"}, {"type": "Whitespace"}


def template(*pieces):
    """The post_processor of a tokenizer.json: tokens with their ids, and None for the text."""
    single = [
        {"SpecialToken": {"id": piece[0], "type_id": 0}} if piece else {"Sequence": {"id": "A", "type_id": 0}}
        for piece in pieces
    ]
    tokens = {name: {"id": name, "ids": [index], "tokens": [name]} for name, index in filter(None, pieces)}
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": tokens}


def file(**changes):
    return {"tokenizer.json": changes}


# A tokenizer.json whose class builds otherwise.
BERT_FILE = {
    "lowercase in the file": file(
        normalizer={
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": False,
        }
    ),
    "lowercase in both": file(
        normalizer={
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": False,
        }
    )
    | config(do_lower_case=False),
    "another normalizer": file(normalizer=LOWER),
    "no normalizer": file(normalizer=None),
    "another pre_tokenizer": file(pre_tokenizer=SPLIT),
    "another template": file(post_processor=template(("[CLS]", 2), None)),
    "another template, named": file(post_processor=template(("[CLS]", 2), None))
    | config(cls_token="[CLS]", sep_token="[SEP]"),
    "no template": file(post_processor=None),
    "fewer tokens declared": config(added_tokens_decoder={"16": flagged("[E1]", special=True)}, unk_token=None)
    if False
    else config(added_tokens_decoder={"2": flagged("[CLS]", special=True, lstrip=True)}),
    "padding and truncation": file(
        padding={
            "strategy": {"Fixed": 30},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
        truncation={"direction": "Left", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
    ),
    "the file alone": config(**FAST),
    "the file alone, E1": config(**FAST, additional_special_tokens=["[E1]"]),
    "the file alone, lower": config(**FAST, do_lower_case=False, strip_accents=False, tokenize_chinese_chars=False),
    "the file alone, add_bos": config(**FAST, add_bos_token=True, bos_token="<s>"),
    "the file alone, its template": file(post_processor=template(("[CLS]", 2), ("[SEP]", 3), None)) | config(**FAST),
    "the file alone, declared": config(**FAST, added_tokens_decoder={"16": flagged("[E1]")}),
    "the file alone, never_split": config(**FAST, split_special_tokens=True),
    "unknown class": config(tokenizer_class="NoSuchTokenizer"),
    "japanese": config(tokenizer_class="BertJapaneseTokenizer"),
    "gpt2 model": config(tokenizer_class="BertTokenizer") | {"config.json": {"model_type": "gpt2"}},
    "gpt2 model, fast": config(**FAST) | {"config.json": {"model_type": "gpt2"}},
}
GPT2_FILE = {
    "add_prefix_space in the file": file(
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    ),
    "normalizer": file(normalizer=LOWER),
    "another pre_tokenizer": file(pre_tokenizer=SPLIT),
    "template": file(post_processor=template(("<s>", 266), None)),
    "template and add_bos_token": file(post_processor=template(("<s>", 266), None))
    | config(add_bos_token=True, bos_token="<s>"),
    "template and no add_bos_token": file(post_processor=template(("<s>", 266), None))
    | config(add_bos_token=False, bos_token="<s>"),
    "the file alone": config(**FAST) | file(normalizer=LOWER),
    "the file alone, spaced": config(**FAST, add_prefix_space=True),
    "bert model": config(tokenizer_class="GPT2Tokenizer") | {"config.json": {"model_type": "bert"}},
    "bert model, roberta": config(tokenizer_class="RobertaTokenizer") | {"config.json": {"model_type": "bert"}},
}
