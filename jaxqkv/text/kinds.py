"""The kinds of tokenizer that are built here: WordPiece, byte-level BPE and SentencePiece's unigrams.

Each takes its vocabulary from its own files or from a tokenizer.json, and its other settings from the side files, as
transformers 5 does. If a tokenizer.json contradicts them, the difference is named.
"""

import abc
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from jaxqkv.errors import NoTokenizer
from jaxqkv.text.side_files import SETTINGS, SideFiles

# SentencePiece's mark of a space.
MARK = "▁"
# The normaliser in many SentencePiece tokenizers that replaces several spaces by one.
SPACES_TO_ONE = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}


class Kind(abc.ABC):
    """A kind of tokenizer.

    Attributes:
      name: name of its model in tokenizer.json.
      files: files that hold its vocabulary.
      needs: roles of the special tokens that its model needs.
    """

    name: str
    files: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @abc.abstractmethod
    def read(self, folder: Path) -> Any:
        """Reads the model from those files."""

    @abc.abstractmethod
    def settle(self, model: Any, unknown: str | None) -> tuple[Any, dict[str, str]]:
        """Returns the model with this kind's settings and unknown token, and what it had instead, by key."""

    @abc.abstractmethod
    def steps(self, side: SideFiles, written: Tokenizer | None) -> tuple[Any, Any, Any]:
        """Returns normaliser (or None), pre-tokeniser and decoder, as the settings say.

        Args:
          side: the settings.
          written: the folder's tokenizer.json, if it has one.
        """

    @abc.abstractmethod
    def differences(self, written: Tokenizer, side: SideFiles) -> Iterator[str]:
        """Yields how a tokenizer.json's steps differ from this kind's, where no setting decides."""


class WordPiece(Kind):
    """BERT's kind: text is cleaned, split at spaces and punctuation, and cut into the vocabulary's longest pieces."""

    name, files, needs = "WordPiece", ("vocab.txt",), ("unk_token",)

    def read(self, folder: Path) -> Any:
        """Reads vocab.txt."""
        return models.WordPiece.from_file(str(folder / "vocab.txt"))

    def settle(self, model: Any, unknown: str | None) -> tuple[Any, dict[str, str]]:
        """Returns the model with BERT's settings; see `Kind.settle`."""
        settings = {"unk_token": unknown, "max_input_chars_per_word": 100, "continuing_subword_prefix": "##"}
        return model, dict(_settle(model, settings))

    def steps(self, side: SideFiles, written: Tokenizer | None) -> tuple[Any, Any, Any]:
        """Returns BERT's steps; see `Kind.steps`."""
        normalizer = normalizers.BertNormalizer(
            lowercase=side.flag("do_lower_case", True),
            strip_accents=side.flag("strip_accents", None),
            handle_chinese_chars=side.flag("tokenize_chinese_chars", True),
        )
        return normalizer, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()

    def differences(self, written: Tokenizer, side: SideFiles) -> Iterator[str]:
        """Yields differences in normaliser and pre-tokeniser; see `Kind.differences`."""
        ours, theirs = self.steps(side, written)[0], written.normalizer
        if not isinstance(theirs, normalizers.BertNormalizer):
            yield f"normalizer is {_name(theirs)}, not BertNormalizer"
        else:
            keys = {"lowercase": "do_lower_case", "strip_accents": "strip_accents"}
            for name, key in (keys | {"handle_chinese_chars": "tokenize_chinese_chars"}).items():
                value = getattr(theirs, name)
                same = value == getattr(ours, name) or (name == "strip_accents" and _strips(theirs) == _strips(ours))
                if not same and key not in side.settings:
                    yield f"{name} is {_json(value)}, and {SETTINGS} has no {key}"
            if not theirs.clean_text:
                yield "clean_text is false"
        if not isinstance(written.pre_tokenizer, pre_tokenizers.BertPreTokenizer):
            yield f"pre_tokenizer is {_name(written.pre_tokenizer)}, not BertPreTokenizer"


class ByteLevelBPE(Kind):
    """GPT-2's and RoBERTa's kind: the text's bytes, split before words, and merged in the order of a list."""

    name, files = "BPE", ("vocab.json", "merges.txt")

    def read(self, folder: Path) -> Any:
        """Reads vocab.json and merges.txt."""
        return models.BPE.from_file(*(str(folder / name) for name in self.files))

    def settle(self, model: Any, unknown: str | None) -> tuple[Any, dict[str, str]]:
        """Returns the model with GPT-2's settings; see `Kind.settle`."""
        settings = {"dropout": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
        settings |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
        others = dict(_settle(model, settings))
        if model.unk_token is not None:
            # The unknown token is used only if some byte has no token of its own.
            if any(model.token_to_id(byte) is None for byte in pre_tokenizers.ByteLevel.alphabet()):
                others["unk_token"] = f"unk_token is {model.unk_token!r}"
            model.unk_token = None
        return model, others

    def steps(self, side: SideFiles, written: Tokenizer | None) -> tuple[Any, Any, Any]:
        """Returns GPT-2's steps; see `Kind.steps`."""
        spaced = side.flag("add_prefix_space", False)
        return None, pre_tokenizers.ByteLevel(add_prefix_space=spaced), decoders.ByteLevel()

    def differences(self, written: Tokenizer, side: SideFiles) -> Iterator[str]:
        """Yields differences in normaliser and pre-tokeniser; see `Kind.differences`."""
        if written.normalizer is not None:
            yield f"normalizer is {_name(written.normalizer)}, not null"
        theirs = written.pre_tokenizer
        if not isinstance(theirs, pre_tokenizers.ByteLevel):
            yield f"pre_tokenizer is {_name(theirs)}, not ByteLevel"
            return
        if theirs.add_prefix_space != side.flag("add_prefix_space", False) and "add_prefix_space" not in side.settings:
            yield f"add_prefix_space is {_json(theirs.add_prefix_space)}, and {SETTINGS} has no add_prefix_space"
        if not theirs.use_regex:
            yield "use_regex is false"


class Unigram(Kind):
    """XLM-RoBERTa's and CamemBERT's kind: words, with a mark for the space before, cut into the likeliest pieces."""

    name, files = "Unigram", ()

    def __init__(self, unknown_id: int | None):
        """Takes the unknown token's id; None to look it up in the vocabulary, with 0 if it is not there."""
        self.unknown_id = unknown_id

    def read(self, folder: Path) -> Any:
        """Refuses: SentencePiece's own file format is not read."""
        code = f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        raise NoTokenizer(
            f"{folder}: no tokenizer.json, and a SentencePiece vocabulary is read from it alone; transformers writes "
            f"it: {code}"
        )

    def settle(self, model: Any, unknown: str | None) -> tuple[Any, dict[str, str]]:
        """Returns a model of the same pieces with this kind's settings; see `Kind.settle`."""
        state = _state(model)
        pieces = [(piece, score) for piece, score in state.pop("vocab")]
        named = {piece: place for place, (piece, _) in enumerate(pieces)} if self.unknown_id is None else {}
        index = self.unknown_id or named.get(unknown or "", 0)
        settings = {"type": self.name, "unk_id": index, "byte_fallback": False}
        others = {
            "unk_token" if key == "unk_id" and unknown in named else key: f"{key} is {_json(value)}, not {_json(ours)}"
            for key, value in state.items()
            if value != (ours := settings.get(key))
        }
        return models.Unigram(pieces, unk_id=index, byte_fallback=False), others

    def steps(self, side: SideFiles, written: Tokenizer | None) -> tuple[Any, Any, Any]:
        """Returns SentencePiece's steps, with the normaliser of tokenizer.json; see `Kind.steps`."""
        spaced = "always" if side.flag("add_prefix_space", True) else "never"
        mark = pre_tokenizers.Metaspace(replacement=MARK, prepend_scheme=spaced)
        splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), mark])
        # This decoder keeps the space before a piece, which would otherwise read as one within a word.
        decoder = decoders.Metaspace(replacement=MARK, prepend_scheme="never")
        for step in _steps_of(None if written is None else written.normalizer):
            if step["type"] == "Precompiled":
                table = base64.b64decode(step["precompiled_charsmap"])
                return normalizers.Precompiled(table), splitter, decoder
        return None, splitter, decoder

    def differences(self, written: Tokenizer, side: SideFiles) -> Iterator[str]:
        """Yields differences in normaliser and pre-tokeniser; see `Kind.differences`."""
        # To the pre-tokeniser, one space and several are the same.
        rest = [step for step in _steps_of(written.normalizer) if step != SPACES_TO_ONE]
        if len(rest) > 1 or any(step["type"] != "Precompiled" for step in rest):
            yield f"normalizer is {_listed(rest)}, not Precompiled or null"
        ours = _steps_of(self.steps(side, written)[1])
        theirs = _steps_of(written.pre_tokenizer)
        if [step["type"] for step in theirs] != [step["type"] for step in ours]:
            yield f"pre_tokenizer is {_listed(theirs)}, not {_listed(ours)}"
            return
        for key, value in theirs[-1].items():
            if value == ours[-1][key]:
                continue
            if key != "prepend_scheme":
                yield f"{key} of Metaspace is {_json(value)}"
            elif "add_prefix_space" not in side.settings:
                yield f"prepend_scheme is {_json(value)}, and {SETTINGS} has no add_prefix_space"


def without_effect(written: Tokenizer, side: SideFiles) -> Iterator[str]:
    """Yields settings that contradict a tokenizer.json which decides alone."""
    normalizer, splitter = written.normalizer, written.pre_tokenizer
    has: dict[str, Any] = {}
    if isinstance(normalizer, normalizers.BertNormalizer):
        has = {"do_lower_case": normalizer.lowercase, "strip_accents": normalizer.strip_accents}
        has["tokenize_chinese_chars"] = normalizer.handle_chinese_chars
    if isinstance(splitter, pre_tokenizers.ByteLevel):
        has["add_prefix_space"] = splitter.add_prefix_space
    for step in _steps_of(splitter):
        if step["type"] == "Metaspace":
            has["add_prefix_space"] = step["prepend_scheme"] != "never"
    for key, value in has.items():
        if side.settings.get(key) not in (None, value):
            yield f"{key} = {_json(side.settings[key])}"


def _settle(model: Any, settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        before = getattr(model, key)
        if (before or None) != (value or None):
            setattr(model, key, value)
            yield key, f"{key} is {_json(before)}, not {_json(value)}"


def _state(part: Any) -> dict[str, Any]:
    """Returns a model or a step as tokenizer.json writes it."""
    state: dict[str, Any] = json.loads(part.__getstate__())
    return state


def _steps_of(step: Any) -> list[dict[str, Any]]:
    """Returns the steps of a sequence, or the one step, as tokenizer.json writes them."""
    if step is None:
        return []
    state = _state(step)
    return list(state.get("normalizers", state.get("pretokenizers", []))) if state["type"] == "Sequence" else [state]


def _strips(normalizer: Any) -> bool:
    strips = normalizer.strip_accents
    return bool(normalizer.lowercase if strips is None else strips)


def _json(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def _listed(steps: list[dict[str, Any]]) -> str:
    return " and ".join(step["type"] for step in steps) or "null"


def _name(step: Any) -> str:
    return "null" if step is None else type(step).__name__
