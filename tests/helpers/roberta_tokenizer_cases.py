"""Folders with tokenizer files of RoBERTa's kind, of DistilBERT, XLM-RoBERTa and CamemBERT, as tokenizer_cases.py has.

`python tests/helpers/roberta_tokenizer_cases.py` writes the ids of transformers 5 to goldens/roberta_tokenizers.json.
"""

import base64
import json
import struct
import tempfile
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from helpers.tokenizer_cases import (
    ALPHABET,
    BERT_TEXT,
    FAST,
    LOWER,
    MERGES,
    SPLIT,
    WORDPIECE,
    bert_normalizer,
    byte_level,
    config,
    file,
    flagged,
    ids_of_transformers,
    template,
    write_backend,
    write_over,
)

FIRST = ["<s>", "<pad>", "</s>", "<unk>"]
LAST = ["[E1]", "[E2]", "[CLS]", "[SEP]", "<mask>"]
BYTE_LEVEL = [*FIRST, *ALPHABET, *(merge.replace(" ", "") for merge in MERGES), *LAST]
PIECES = [*"▁ a c e f h s t w x é T [ ] < > / E 1 2".split(), *"▁the ▁The the aw ▁saw saw caf ▁café".split()]  # noqa: SIM905
UNIGRAM = {
    "xlm-roberta": [*FIRST, *PIECES, *LAST],
    "camembert": ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>", *PIECES, *LAST],
}
CLASSES = {"xlm-roberta": "XLMRobertaTokenizer", "camembert": "CamembertTokenizer", "roberta": "RobertaTokenizer"}
UNIGRAM_TEXT = "The café  Qaw[E1] the <mask> 会会 </s>x <s>NOTUSED [E2]\tsaw "
TEXTS = {
    "roberta": "I saw[E1] the <mask> I </s>é [E2]",
    "distilbert": BERT_TEXT,
    "xlm-roberta": UNIGRAM_TEXT,
    "camembert": UNIGRAM_TEXT,
}


def charsmap():
    """SentencePiece's compiled table of characters, here of one: Q becomes s.

    It is the size of a double-array trie in bytes, the trie, whose units have a label, an offset to their children
    and whether they end a key, and the texts that keys become.
    """
    label, children, leaf = ord("Q"), 256, 512
    units = [0] * (leaf + 1)
    units[0] = children << 10
    units[children ^ label] = ((children ^ label ^ leaf) << 10) | 1 << 8 | label
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + b"s\0"


def base_of(base):
    """The kind of model, and whether the vocabulary is in tokenizer.json."""
    return base.removesuffix("-json"), base.endswith("-json")


def write(folder, base, files):
    """A folder of a base, and `files` over it: objects are merged, None deletes."""
    kind, as_json = base_of(base)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    if kind == "distilbert":
        (folder / "vocab.txt").write_text("\n".join(WORDPIECE) + "\n")
        if as_json:
            write_backend(folder, "bert")
    elif kind == "roberta":
        (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(BYTE_LEVEL)}))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
        if as_json:
            write_roberta(folder)
    else:
        write_unigram(folder, kind)
    if as_json:
        for name in ("vocab.txt", "vocab.json", "merges.txt"):
            (folder / name).unlink(missing_ok=True)
    return write_over(folder, files)


def write_roberta(folder):
    """RoBERTa's tokenizer.json, as its checkpoints have it: the mask token takes in a space before it."""
    backend = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([*FIRST, tokenizers.AddedToken("<mask>", lstrip=True, special=True)])
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), True, False)
    backend.save(str(folder / "tokenizer.json"))


def write_unigram(folder, kind):
    """A tokenizer.json of SentencePiece's kind, as the class of that kind saves it."""
    vocabulary = UNIGRAM[kind]
    pieces = [(piece, -float(len(PIECES) - PIECES.index(piece)) if piece in PIECES else 0.0) for piece in vocabulary]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=False))
    backend.normalizer = normalizers.Precompiled(charsmap())
    mark = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), mark])
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    backend.add_special_tokens([*FIRST, tokenizers.AddedToken("<mask>", lstrip=True, special=True)])
    ends = [(token, vocabulary.index(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", None, ends)
    backend.save(str(folder / "tokenizer.json"))


def splitter(*steps):
    """Pre-tokenisers in a tokenizer.json: one, or several in a sequence."""
    return file(pre_tokenizer=steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": list(steps)})


def normalizer(*others):
    """SentencePiece's table and further normalizers in a tokenizer.json."""
    steps = [{"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap()).decode()}, *others]
    return file(normalizer={"type": "Sequence", "normalizers": steps})


def metaspace(scheme):
    """The pre-tokeniser that marks spaces, in a tokenizer.json."""
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True}


def unigram_model(kind, **settings):
    """SentencePiece's model in a tokenizer.json."""
    pieces = [[piece, -1.0 - index] for index, piece in enumerate(UNIGRAM[kind])]
    return file(model={"type": "Unigram", "unk_id": 3, "vocab": pieces, "byte_fallback": False} | settings)


E = {token: BYTE_LEVEL.index(token) for token in LAST}
CLS_SEP = {"cls_token": "[CLS]", "sep_token": "[SEP]"}
BOS_EOS = {"bos_token": "[CLS]", "eos_token": "[SEP]"}
WHITE = {"type": "WhitespaceSplit"}
ROBERTA = {
    "nothing": {},
    "add_prefix_space": config(add_prefix_space=True),
    "trim_offsets": config(trim_offsets=False, errors="strict"),
    "class": config(tokenizer_class="RobertaTokenizerFast", add_prefix_space=True),
    "class in config.json": {"config.json": {"tokenizer_class": "RobertaTokenizer", "model_type": "bert"}},
    "other names": config(**CLS_SEP, pad_token="[E1]", mask_token="[E2]"),
    "other bos_token": config(**BOS_EOS),
    "unk_token": config(unk_token="[E1]"),
    "no names": config(bos_token=None, eos_token=None, unk_token=None, pad_token=None, mask_token=None),
    "mask_token lstrip": config(mask_token=flagged("<mask>", lstrip=True) | {"__type": "AddedToken"}),
    "additional_special_tokens": config(additional_special_tokens=["[E1]"]),
    "by role, and a list": config(extra_special_tokens={"e_token": "[E1]"}, additional_special_tokens=["[E2]"]),
    "declared": config(
        added_tokens_decoder={
            str(E["[E1]"]): flagged("[E1]"),
            str(E["<mask>"]): flagged("<mask>", lstrip=True, special=True),
        }
    ),
    "added": {"added_tokens.json": {"[E1]": E["[E1]"]}},
    "map": {"special_tokens_map.json": {"mask_token": flagged("[E2]", lstrip=True), **CLS_SEP}},
    "split_special_tokens": config(split_special_tokens=True),
}
ROBERTA_FILE = {
    "alone": config(**FAST),
    "alone, no template": config(**FAST) | file(post_processor=None),
    "alone, spaced": config(**FAST) | byte_level(add_prefix_space=True),
    "spaced in both": config(add_prefix_space=True) | byte_level(add_prefix_space=True),
    "template of cls and sep": file(post_processor=template(("<s>", 0), None, ("</s>", 2))),
    "spaced in it": byte_level(add_prefix_space=True),
    "normalizer": file(normalizer=LOWER),
    "another pre_tokenizer": file(pre_tokenizer=SPLIT),
    "no template": file(post_processor=None),
    "another flag": config(added_tokens_decoder={str(E["<mask>"]): flagged("<mask>", special=True)}),
    "add_bos_token": config(add_bos_token=False),
}
DISTILBERT = {
    "nothing": {},
    "do_lower_case": config(do_lower_case=False),
    "class": config(tokenizer_class="DistilBertTokenizer"),
    "class of BERT": config(tokenizer_class="BertTokenizer", strip_accents=False),
    "other names": config(cls_token="<s>", sep_token="</s>", unk_token="<unk>"),
    "additional_special_tokens": config(additional_special_tokens=["[E1]"]),
    "roberta model": config(tokenizer_class="BertTokenizer") | {"config.json": {"model_type": "roberta"}},
}
DISTILBERT_FILE = {"lowercase false": bert_normalizer(lowercase=False)}
SENTENCEPIECE = {
    "nothing": {},
    "add_prefix_space true": config(add_prefix_space=True),
    "add_prefix_space false": config(add_prefix_space=False),
    "spaces to one": normalizer({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}),
    "no normalizer": file(normalizer=None),
    "other names": config(**BOS_EOS, pad_token="[E1]"),
    "other cls_token": config(**CLS_SEP),
    "unk_token named": config(unk_token="[E2]"),
    "mask_token": config(mask_token="[E2]"),
    "unk_token elsewhere": config(unk_token="[E2]") | file(added_tokens=[]),
    "mask_token flags": config(mask_token=flagged("[E2]", rstrip=True) | {"__type": "AddedToken"}),
    "additional_special_tokens": config(additional_special_tokens=["[E1]"]),
    "extra none": config(extra_special_tokens=[]),
    "additional null": config(additional_special_tokens=None),
    "extra null": config(extra_special_tokens=None),
    "extra by role": config(extra_special_tokens={"e_token": "[E1]"}),
    "by role, and a list": config(extra_special_tokens={"e_token": "[E1]"}, additional_special_tokens=["[E2]"]),
    "map": {"special_tokens_map.json": {"additional_special_tokens": ["[E2]"]}},
    "map null": {"special_tokens_map.json": {"additional_special_tokens": None}},
    "added tokens": file(added_tokens=[]),
    "alone": config(**FAST),
    "alone, spaced": config(**FAST) | splitter(metaspace("first")) | normalizer(LOWER),
    "sp_model_kwargs": config(sp_model_kwargs={}),
    "sp_model_kwargs set": config(sp_model_kwargs={"nbest_size": 2}),
    "never in both": splitter(WHITE, metaspace("never")) | config(add_prefix_space=False),
    "never in it": splitter(WHITE, metaspace("never")),
    "metaspace alone": splitter(metaspace("always")),
    "unsplit": splitter(WHITE, metaspace("always") | {"split": False}),
    "another normalizer": normalizer(LOWER),
    "lower": file(normalizer=LOWER),
    "no template": file(post_processor=None),
    "alone, add_prefix_space": config(**FAST, add_prefix_space=False),
    "add_bos_token": config(add_bos_token=False),
}
CASES = {
    f"{base}: {name}": (base, files)
    for base, cases in (
        ("roberta", ROBERTA),
        ("roberta-json", ROBERTA | ROBERTA_FILE),
        ("distilbert", DISTILBERT),
        ("distilbert-json", DISTILBERT | DISTILBERT_FILE),
        *((f"{kind}-json", SENTENCEPIECE) for kind in UNIGRAM),
    )
    for name, files in cases.items()
} | {
    f"{kind}-json: {name}": (f"{kind}-json", files)
    for kind in UNIGRAM
    for name, files in {
        "unk_id": unigram_model(kind, unk_id=1),
        "byte_fallback": unigram_model(kind, byte_fallback=True),
        "class": config(tokenizer_class=f"{CLASSES[kind]}Fast") | {"config.json": {"model_type": "bert"}},
        "bert model": {"config.json": {"model_type": "bert", "tokenizer_class": CLASSES[kind]}},
    }.items()
}
GOLDENS = Path(__file__).parents[1] / "goldens" / "roberta_tokenizers.json"


def main():
    with tempfile.TemporaryDirectory() as base:
        ids = {
            name: ids_of_transformers(write(Path(base) / str(number), *case), TEXTS[base_of(case[0])[0]])
            for number, (name, case) in enumerate(CASES.items())
        }
    lines = [f"{json.dumps(name)}: {json.dumps(values)}" for name, values in ids.items()]
    GOLDENS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
