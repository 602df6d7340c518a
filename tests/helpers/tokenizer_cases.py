"""Folders with tokenizer files of every kind, and the ids that transformers 5 gives for them.

`python tests/helpers/tokenizer_cases.py` writes those ids to goldens/tokenizers.json.
"""

import json
import tempfile
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

WORDPIECE = """
[PAD] [UNK] [CLS] [SEP] [MASK] the The THE ca ##fe café 会 社 会社 saw , [E1] [E2] <unk> <s> </s> [ ] e1 ##1 e E x a
""".split()  # noqa: SIM905 (forty strings)
MERGES = ["Ġ s", "a w", "Ġs aw", "Ġ t", "h e", "Ġt he", "Ġ I"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
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
    return write_over(folder, files)


def write_over(folder, files):
    """Writes files over a folder's own: objects are merged, None deletes; returns the folder."""
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
    """A tokenizer_config.json."""
    return {"tokenizer_config.json": settings}


def file(**changes):
    """Other entries in tokenizer.json."""
    return {"tokenizer.json": changes}


def template(*pieces):
    """The post_processor of a tokenizer.json: tokens with their ids, and None for the text."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    single = [{"SpecialToken": {"id": piece[0], "type_id": 0}} if piece else text for piece in pieces]
    tokens = {name: {"id": name, "ids": [index], "tokens": [name]} for name, index in filter(None, pieces)}
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": tokens}


def bert_normalizer(**settings):
    """BERT's normalizer in a tokenizer.json."""
    default = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
    return file(normalizer={"type": "BertNormalizer"} | default | settings)


def byte_level(**settings):
    """GPT-2's pre_tokenizer in a tokenizer.json."""
    return file(
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        | settings
    )


def cut_and_padded(direction):
    """Truncation and padding in a tokenizer.json."""
    padding = {"strategy": {"Fixed": 30}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    padding |= {"pad_type_id": 0, "pad_token": "[PAD]"}
    truncation = {"direction": direction, "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    return file(padding=padding, truncation=truncation)


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
LOWER, SPLIT = {"type": "Lowercase"}, {"type": "Whitespace"}
E1 = {"added_tokens_decoder": {"16": flagged("[E1]", special=True)}}
BERT = {
    "nothing": {},
    "do_lower_case false": config(do_lower_case=False),
    "do_lower_case true": config(do_lower_case=True),
    "strip_accents false": config(strip_accents=False),
    "strip_accents true": config(strip_accents=True, do_lower_case=False),
    "tokenize_chinese_chars": config(tokenize_chinese_chars=False),
    "additional_special_tokens": config(additional_special_tokens=["[E1]"]),
    "extra_special_tokens": config(extra_special_tokens=["[E1]"]),
    "extra and additional": config(extra_special_tokens=["[E1]"], additional_special_tokens=["[E2]"]),
    "no extra, additional": config(extra_special_tokens=[], additional_special_tokens=["[E2]"]),
    "extra by role": config(extra_special_tokens={"e_token": "[E1]"}),
    "another role": config(e_token="[E1]"),
    "declared": config(**E1),
    "declared lstrip": config(added_tokens_decoder={"17": flagged("[E2]", lstrip=True, rstrip=True)}),
    "declared single_word": config(added_tokens_decoder={"17": flagged("[E2]", single_word=True)}),
    "declared normalized": config(added_tokens_decoder={"17": flagged("[E2]", normalized=True)}),
    "declared, and a map": config(**E1) | {"special_tokens_map.json": {"additional_special_tokens": ["[E2]"]}},
    "added": {"added_tokens.json": {"[E1]": 16}},
    "added beyond": {"added_tokens.json": {"saw[E1]": len(WORDPIECE)}},
    "map": {"special_tokens_map.json": {"additional_special_tokens": ["[E2]"]}},
    "map extra": config(extra_special_tokens=["[E1]"])
    | {"special_tokens_map.json": {"extra_special_tokens": ["[E2]"]}},
    "map over config": config(cls_token="[CLS]") | {"special_tokens_map.json": {**CLS_SEP, "unk_token": "<unk>"}},
    "map flags": {"special_tokens_map.json": {"mask_token": flagged("[E2]", lstrip=True)}},
    "typed": config(mask_token=flagged("[E2]", lstrip=True) | {"__type": "AddedToken"}),
    "other names": config(**CLS_SEP, unk_token="<unk>", pad_token="[E1]", mask_token="[E2]"),
    "no pad_token": config(pad_token=None, mask_token=None),
    "split_special_tokens": config(split_special_tokens=True),
    "add_bos_token": config(add_bos_token=True, bos_token="<s>"),
    "without effect": config(model_max_length=7, padding_side="left", clean_up_tokenization_spaces=False, x=1),
    "class": config(tokenizer_class="BertTokenizerFast", do_lower_case=False),
    "class in config.json": {"config.json": {"tokenizer_class": "BertTokenizer", "model_type": "gpt2"}},
    "gpt2 model": config(tokenizer_class="BertTokenizer") | {"config.json": {"model_type": "gpt2"}},
    "never_split": config(never_split=["[E1]"]),
    "do_basic_tokenize": config(do_basic_tokenize=False),
}
BERT_FILE = {
    "cased": bert_normalizer(lowercase=False) | config(do_lower_case=False),
    "padding and truncation": cut_and_padded("Left"),
    "alone": config(**FAST),
    "alone, additional": config(**FAST, additional_special_tokens=["[E1]"]),
    "alone, bos_token": config(**FAST, bos_token="<s>"),
    "alone, its template": file(post_processor=template(("[CLS]", 2), ("[SEP]", 3), None)) | config(**FAST),
    "alone, no template": file(post_processor=None) | config(**FAST),
    "alone, declared": config(**FAST, **E1),
    "alone, split_special_tokens": config(**FAST, split_special_tokens=True),
    "alone, padded": cut_and_padded("Right") | config(**FAST),
    "alone, gpt2 model": config(**FAST) | {"config.json": {"model_type": "gpt2"}},
    "lowercase false": bert_normalizer(lowercase=False),
    "strip_accents false in it": bert_normalizer(strip_accents=False),
    "handle_chinese_chars false": bert_normalizer(handle_chinese_chars=False),
    "clean_text false": bert_normalizer(clean_text=False),
    "another normalizer": file(normalizer=LOWER),
    "no normalizer": file(normalizer=None),
    "another pre_tokenizer": file(pre_tokenizer=SPLIT),
    "another template": file(post_processor=template(("[CLS]", 2), None)),
    "another template, named": file(post_processor=template(("[CLS]", 2), None)) | config(**CLS_SEP),
    "no template": file(post_processor=None),
    "another flag": config(added_tokens_decoder={"2": flagged("[CLS]", special=True, lstrip=True)}),
    "alone, lower": config(**FAST, do_lower_case=False),
    "alone, add_bos_token": config(**FAST, add_bos_token=False),
    "class unknown": config(tokenizer_class="NoSuchTokenizer"),
}
GPT2 = {
    "nothing": {},
    "add_prefix_space": config(add_prefix_space=True),
    "eos_token": config(bos_token="<s>", eos_token="</s>", unk_token="<s>"),
    "no names": config(bos_token=None, eos_token=None, unk_token=None),
    "pad_token": config(pad_token="[E2]"),
    "additional_special_tokens": config(additional_special_tokens=["[E1]"]),
    "declared": config(added_tokens_decoder={"264": flagged("[E1]"), "265": flagged("[E2]", lstrip=True)}),
    "added": {"added_tokens.json": {"[E1]": 264}},
    "map": {"special_tokens_map.json": {"pad_token": flagged("[E2]", lstrip=True)}},
    "split_special_tokens": config(split_special_tokens=True),
    "errors": config(errors="strict", trim_offsets=False, clean_up_tokenization_spaces=True),
    "class": config(tokenizer_class="GPT2TokenizerFast"),
    "bert model": config(tokenizer_class="GPT2Tokenizer") | {"config.json": {"model_type": "bert"}},
    "add_bos_token": config(add_bos_token=True),
    "add_eos_token": config(add_eos_token=True, eos_token="</s>"),
    "both ends": config(add_bos_token=True, add_eos_token=True, bos_token="<s>", eos_token="</s>"),
}
GPT2_FILE = {
    "template": file(post_processor=template(("<s>", 266), None)),
    "template and add_bos_token": file(post_processor=template(("<s>", 266), None)) | config(add_bos_token=True),
    "alone": config(**FAST) | file(normalizer=LOWER),
    "spaced in it": byte_level(add_prefix_space=True),
    "no regex": byte_level(use_regex=False),
    "normalizer": file(normalizer=LOWER),
    "another pre_tokenizer": file(pre_tokenizer=SPLIT),
    "template against add_bos_token": file(post_processor=template(("<s>", 266), None)) | config(add_bos_token=False),
    "alone, spaced": config(**FAST, add_prefix_space=True),
}
# Name → base and changes.
CASES = {
    f"{base}: {name}": (base, files)
    for base, cases in (
        ("bert", BERT),
        ("bert-json", BERT | BERT_FILE),
        ("gpt2", GPT2),
        ("gpt2-json", GPT2 | GPT2_FILE),
    )
    for name, files in cases.items()
}
TEXTS = {"bert": BERT_TEXT, "gpt2": GPT2_TEXT}
GOLDENS = Path(__file__).parents[1] / "goldens" / "tokenizers.json"


def ids_of_transformers(folder, text):
    """What `AutoTokenizer` gives."""
    import transformers

    return list(transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)(text)["input_ids"])


def main():
    with tempfile.TemporaryDirectory() as base:
        ids = {
            name: ids_of_transformers(write(Path(base) / str(number), *case), TEXTS[case[0].split("-")[0]])
            for number, (name, case) in enumerate(CASES.items())
        }
    lines = [f"{json.dumps(name)}: {json.dumps(values)}" for name, values in ids.items()]
    GOLDENS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
