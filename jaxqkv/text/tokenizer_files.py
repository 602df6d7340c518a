"""Builds a tokenizer from a checkpoint's files, with the same ids as transformers 5.

The class that the files name decides how it is built: one of `CLASSES` from vocabulary and settings, wherever the
vocabulary is; `PreTrainedTokenizerFast` from tokenizer.json alone.
"""

import dataclasses
import json
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from jaxqkv.errors import CheckpointError, JaxqkvWarning, listed, printable
from jaxqkv.text import kinds
from jaxqkv.text.side_files import NAMED, SETTINGS, SideFiles, Token, content_of, read_side_files

FILE = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class TokenizerClass:
    """How a class of transformers makes its tokenizers.

    Attributes:
      kind: kind of the tokenizer: its model and its steps.
      named: special tokens by role, if the files name no others.
      template: roles of the tokens that it puts before and after a text; None if tokenizer.json, or add_bos_token and
        add_eos_token, decide.
      pair: how the template joins two texts, a key of `PAIRS`.
      extra: special tokens without a role, if the files list none.
      stripped: roles of tokens that absorb the spaces before them, if the files give only their text.
    """

    kind: kinds.Kind
    named: Mapping[str, str]
    template: tuple[str, str] | None
    pair: str = "doubled"
    extra: tuple[str, ...] = ()
    stripped: tuple[str, ...] = ()


END = "<|endoftext|>"
BERT = TokenizerClass(
    kinds.WordPiece(),
    {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
    template=("cls_token", "sep_token"),
    pair="segments",
)
ROBERTA_NAMES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "cls_token": "<s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "mask_token": "<mask>",
}
CLASSES: dict[str, TokenizerClass] = {
    "GPT2Tokenizer": TokenizerClass(
        kinds.ByteLevelBPE(), {"bos_token": END, "eos_token": END, "unk_token": END}, template=None, pair="anew"
    ),
    "BertTokenizer": BERT,
    "DistilBertTokenizer": BERT,
    "RobertaTokenizer": TokenizerClass(kinds.ByteLevelBPE(), ROBERTA_NAMES, template=("cls_token", "sep_token")),
    "XLMRobertaTokenizer": TokenizerClass(
        kinds.Unigram(unknown_id=3), ROBERTA_NAMES, template=("bos_token", "eos_token")
    ),
    "CamembertTokenizer": TokenizerClass(
        kinds.Unigram(unknown_id=None),
        ROBERTA_NAMES,
        template=("bos_token", "eos_token"),
        extra=("<s>NOTUSED", "</s>NOTUSED", "<unk>NOTUSED"),
        stripped=("mask_token",),
    ),
}
# Ways to join a pair of texts: functions from the tokens before and after a text to the template's pieces after the
# first text and its last token, with their token types.
PAIRS: dict[str, Callable[[list[str], list[str]], list[str]]] = {
    "segments": lambda first, last: ["$B:1", *(f"{token}:1" for token in last)],  # BERT
    "doubled": lambda first, last: [*last, "$B", *last],  # RoBERTa
    "anew": lambda first, last: [*(f"{token}:1" for token in first), "$B:1", *(f"{token}:1" for token in last)],
}
# Classes that are built from tokenizer.json alone.
GENERAL = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
# model_type → class of a folder that names none, if the folder belongs to another kind of model.
DEFAULTS = {
    "gpt2": "GPT2Tokenizer",
    "bert": "BertTokenizer",
    "distilbert": "DistilBertTokenizer",
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
}
# Settings of earlier versions that transformers 5 does not read → their harmless values.
IGNORED: dict[str, tuple[Any, ...]] = {
    "do_basic_tokenize": (True, None),
    "never_split": ([], None),
    "wordpieces_prefix": ("##", None),
    "sp_model_kwargs": ({}, None),
}


def build_tokenizer(folder: Path, model_type: str, default: str) -> tuple[Tokenizer, str]:
    """Builds a folder's tokenizer; returns it and the side at which texts are cut, "right" or "left".

    Args:
      folder: folder with tokenizer.json or the vocabulary's own files, and with any side files.
      model_type: model_type of the model, for messages, and to tell whether the folder belongs to such a model.
      default: class of the model's tokenizers, if no file names one.

    Raises:
      CheckpointError: when a file is missing or malformed or names a class that is not implemented, naming file and
        key.

    Warns:
      JaxqkvWarning: when files contradict each other in a way that changes token ids.
    """
    side = read_side_files(folder)
    written = Tokenizer.from_file(str(folder / FILE)) if (folder / FILE).exists() else None
    truncation_side, padding = side.settings.get("truncation_side"), None
    if written is not None:
        padding, truncation = written.padding, written.truncation
        truncation_side = truncation_side or (truncation or {}).get("direction")
        written.no_padding()
        written.no_truncation()
    truncation_side = truncation_side or "right"
    if truncation_side not in ("left", "right"):
        raise CheckpointError(f"{side.place}: truncation_side = {truncation_side!r} is neither 'left' nor 'right'")
    name, about = _class_of(side, model_type, default, written)
    if about is not None:
        backend = _of_class(name, about, side, written)
    else:
        assert written is not None
        backend = written
        for what in kinds.without_effect(written, side):
            _warn(f"{side.place}: {what} is without effect, as in transformers 5: {FILE} decides")
        pad = {"pad_token": padding["pad_token"]} if padding else {}
        _add_tokens(backend, side, {**dict.fromkeys(NAMED), **pad, **side.named}, side.extra or (), {})
    _warn_of_template(backend, side)
    for key, harmless in IGNORED.items():
        if side.settings.get(key) not in harmless:
            _warn(f"{side.place}: {key} = {json.dumps(side.settings[key])} is without effect, as in transformers 5")
    backend.encode_special_tokens = side.flag("split_special_tokens", False)
    return backend, truncation_side


def _class_of(
    side: SideFiles, model_type: str, default: str, written: Tokenizer | None
) -> tuple[str, TokenizerClass | None]:
    """Returns the name of the tokenizer's class and how it builds; None if tokenizer.json decides all."""
    kind = side.model_type or model_type
    own = default if kind == model_type else DEFAULTS.get(kind, f"the tokenizer of {kind}")
    name = side.class_name or own
    place = side.class_place or f"{side.folder / 'config.json'}: model_type"
    about = CLASSES.get(name)
    if written is None:
        if about is None and name in GENERAL:
            raise CheckpointError(f"{place} is {name!r}, which needs {FILE}; {side.folder} has none")
        if about is None:
            raise CheckpointError(
                f"{place} is {side.class_name or kind!r}, which is not supported without {FILE}; supported are "
                f"{', '.join(CLASSES)}; save the tokenizer with a {FILE}, or give another folder (--tokenizer FOLDER)"
            )
        return name, about
    model = type(written.model).__name__
    if about is not None and model != about.kind.name:
        if side.class_name is not None:
            raise CheckpointError(
                f"{place} is {name!r}, whose model is {about.kind.name}, and {FILE} has a {model}; to use {FILE} "
                'alone, write "PreTrainedTokenizerFast" there'
            )
        return name, None  # the folder is not of the model's own class
    if about is None and name not in GENERAL:
        _warn(f"{place}: {name} is not implemented here; the tokens are those of {FILE} alone")
    return name, about


def _of_class(name: str, about: TokenizerClass, side: SideFiles, written: Tokenizer | None) -> Tokenizer:
    """Builds a tokenizer as its class does; from tokenizer.json (`written`) it takes vocabulary and added tokens."""
    kind = about.kind
    named: dict[str, Token | None] = {**dict.fromkeys(NAMED), **about.named, **side.named}
    if written is not None:
        model = written.model
    elif all((side.folder / file).exists() for file in kind.files):
        model = kind.read(side.folder)
    else:
        absent = " and no ".join(file for file in kind.files if not (side.folder / file).exists())
        raise CheckpointError(
            f"{side.folder}: no {FILE} and no {absent}, which {name} needs; if that is the wrong class, "
            f"set tokenizer_class in {SETTINGS}"
        )
    for role in about.stripped:
        if isinstance(token := named[role], str):
            named[role] = AddedToken(token, lstrip=True, special=True)
    model, others = kind.settle(model, content_of(named["unk_token"]))
    differences = [what for key, what in others.items() if key not in side.named]
    backend = Tokenizer(model)
    normalizer, backend.pre_tokenizer, backend.decoder = kind.steps(side, written)
    if normalizer is not None:
        backend.normalizer = normalizer
    older = {}
    if written is None:
        differences = []  # files of a vocabulary alone have no settings of their own
    else:
        differences += kind.differences(written, side)
        if "added_tokens_decoder" not in side.settings:
            older = written.get_added_tokens_decoder()
    roles = about.template if about.template is not None else _asked_for(side, written)
    known = {token.content for token in (*older.values(), *(token for token, _ in side.declared.values()))}
    for role in (*kind.needs, *filter(None, roles)):
        content = content_of(named[role])
        if content is None:
            raise CheckpointError(f"{side.place}: {role} is null, and {name} needs one")
        if model.token_to_id(content) is None and (role in kind.needs or content not in known):
            where = " or ".join((FILE,) if written is not None else kind.files[:1])
            raise CheckpointError(
                f"{side.folder / where}: lacks {role} {content!r}; if it has another name, set {role} in {SETTINGS}"
            )
    _add_tokens(backend, side, named, about.extra if side.extra is None else side.extra, older)
    if written is not None:
        differences += _lost(written, backend)
        backend.post_processor = written.post_processor if about.template is None else None
    if about.template is not None or any(roles):
        ends = [content_of(named[role]) if role else None for role in roles]
        backend.post_processor = _template(backend, ends, about.pair)
    if written is not None and about.template is not None and _reframed(written, backend, side, about.template):
        differences.append("post_processor puts other tokens before or after a text")
    for what in differences:
        _warn(
            f"{side.folder / FILE}: {what}; that is without effect, as in transformers 5, because {name} sets its own; "
            f'to use {FILE} alone, set "tokenizer_class": "PreTrainedTokenizerFast" in {SETTINGS}'
        )
    return backend


def _asked_for(side: SideFiles, written: Tokenizer | None) -> tuple[str | None, str | None]:
    """Returns the roles of the tokens that add_bos_token and add_eos_token put before and after a text."""
    flags = [side.flag(key, False) and written is None for key in ("add_bos_token", "add_eos_token")]
    return "bos_token" if flags[0] else None, "eos_token" if flags[1] else None


def _template(backend: Tokenizer, ends: Sequence[str | None], pair: str) -> Any:
    first, last = ([end] if end else [] for end in ends)
    return processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *PAIRS[pair](first, last)],
        special_tokens=[(end, backend.token_to_id(end)) for end in dict.fromkeys(filter(None, ends))],
    )


def _add_tokens(
    backend: Tokenizer,
    side: SideFiles,
    named: Mapping[str, Token | None],
    extra: Sequence[Token],
    older: Mapping[int, AddedToken],
) -> None:
    """Adds the declared tokens, those of tokenizer.json (`older`), then special tokens not among them."""
    declared = {index: token for index, (token, _) in side.declared.items()} | dict(older)
    tokens: list[AddedToken] = [token for _, token in sorted(declared.items())]
    there = {token.content for token in (*tokens, *backend.get_added_tokens_decoder().values())}
    with_role = [token for token in (*named.values(), *side.specific.values()) if token is not None]
    for token in (*with_role, *extra):
        if content_of(token) not in there:
            tokens.append(AddedToken(token, special=True) if isinstance(token, str) else token)
    contents = {content_of(token) for token in with_role}
    for token in tokens:
        token.special = token.special or token.content in contents
    backend.add_tokens(tokens)
    for index, (token, where) in side.declared.items():
        actual = backend.token_to_id(token.content)
        if actual != index:
            _warn(f"{where}: the id of {token.content!r} is {actual}, by the vocabulary, not {index}")


def _lost(written: Tokenizer, backend: Tokenizer) -> Iterator[str]:
    """Yields which added tokens of tokenizer.json differ in the tokenizer that was built."""
    ours = backend.get_added_tokens_decoder()
    flags = operator.attrgetter("content", "lstrip", "rstrip", "single_word", "normalized")
    lost = [
        repr(token.content)
        for index, token in written.get_added_tokens_decoder().items()
        if index not in ours or flags(token) != flags(ours[index])
    ]
    if lost:
        yield f"added tokens {listed(lost)} are different in {SETTINGS}"


def _reframed(written: Tokenizer, backend: Tokenizer, side: SideFiles, roles: Sequence[str]) -> bool:
    """Tells whether tokenizer.json's template differs in more than the names that the side files give its tokens."""
    text = backend.encode("a", add_special_tokens=False)
    ours, theirs = (each.post_process(text) for each in (backend, written))
    if ours.special_tokens_mask != theirs.special_tokens_mask:
        return True
    return ours.ids != theirs.ids and not set(roles) <= set(side.named)


def _warn_of_template(backend: Tokenizer, side: SideFiles) -> None:
    """Warns if add_bos_token or add_eos_token contradict tokenizer.json or the class, which decide."""
    keys = {"add_bos_token": 0, "add_eos_token": -1}
    if not any(key in side.settings for key in keys):
        return
    mask = backend.encode("a").special_tokens_mask
    for key, index in keys.items():
        asked = side.flag(key, None)
        if asked is not None and mask and asked != bool(mask[index]):
            _warn(f"{side.place}: {key} = {json.dumps(asked)} is without effect, as in transformers 5")


def _warn(message: str) -> None:
    warnings.warn(JaxqkvWarning(printable(message)), stacklevel=2)
