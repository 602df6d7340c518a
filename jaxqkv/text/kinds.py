"""The two kinds of tokenizer that are built here: WordPiece and byte-level BPE.

Each takes its vocabulary from files of its own or from a tokenizer.json, and its other settings from the
side files, as transformers 5 does; where a tokenizer.json says otherwise, it is named.
"""

import abc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from jaxqkv.text.side_files import SETTINGS, SideFiles


class Kind(abc.ABC):
    """A kind of tokenizer.

    Attributes:
      name: of its model, as tokenizer.json has it.
      files: that hold its vocabulary.
      needs: the special tokens, by role, that its model cannot do without.
    """

    name: str
    files: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @abc.abstractmethod
    def read(self, folder: Path) -> Any:
        """Reads the model from those files."""

    @abc.abstractmethod
    def settle(self, model: Any, unknown: str | None) -> Iterator[tuple[str, str]]:
        """Gives the model this kind's settings and unknown token; yields keys of others, and what they were."""

    @abc.abstractmethod
    def steps(self, side: SideFiles) -> tuple[Any, Any, Any]:
        """Normaliser (or None), pre-tokeniser and decoder, as the settings say."""

    @abc.abstractmethod
    def differences(self, written: Tokenizer, side: SideFiles) -> Iterator[str]:
        """Yields what a tokenizer.json says otherwise of those steps, where no setting decides."""


class WordPiece(Kind):
    """BERT's: text is cleaned, split at spaces and punctuation, and cut to the longest pieces in the vocabulary."""

    name, files, needs = "WordPiece", ("vocab.txt",), ("unk_token",)

    def read(self, folder: Path) -> Any:
        return models.WordPiece.from_file(str(folder / "vocab.txt"))

    def settle(self, model: Any, unknown: str | None) -> Iterator[tuple[str, str]]:
        yield from _settle(
            model, {"unk_token": unknown, "max_input_chars_per_word": 100, "continuing_subword_prefix": "##"}
        )

    def steps(self, side: SideFiles) -> tuple[Any, Any, Any]:
        normalizer = normalizers.BertNormalizer(
            lowercase=side.flag("do_lower_case", True),
            strip_accents=side.flag("strip_accents", None),
            handle_chinese_chars=side.flag("tokenize_chinese_chars", True),
        )
        return normalizer, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()

    def differences(self, written: Tokenizer, side: SideFiles) -> Iterator[str]:
        ours, theirs = self.steps(side)[0], written.normalizer
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
    """GPT-2's: the text's bytes, split before words, and merged in the order of a list."""

    name, files = "BPE", ("vocab.json", "merges.txt")

    def read(self, folder: Path) -> Any:
        return models.BPE.from_file(*(str(folder / name) for name in self.files))

    def settle(self, model: Any, unknown: str | None) -> Iterator[tuple[str, str]]:
        settings = {"dropout": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
        yield from _settle(model, settings | {"continuing_subword_prefix": None, "end_of_word_suffix": None})
        if model.unk_token is not None:
            # A token for unknown characters is used only where a byte has none of its own.
            if any(model.token_to_id(byte) is None for byte in pre_tokenizers.ByteLevel.alphabet()):
                yield "unk_token", f"unk_token is {model.unk_token!r}"
            model.unk_token = None

    def steps(self, side: SideFiles) -> tuple[Any, Any, Any]:
        spaced = side.flag("add_prefix_space", False)
        return None, pre_tokenizers.ByteLevel(add_prefix_space=spaced), decoders.ByteLevel()

    def differences(self, written: Tokenizer, side: SideFiles) -> Iterator[str]:
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


def without_effect(written: Tokenizer, side: SideFiles) -> Iterator[str]:
    """Settings that contradict a tokenizer.json which alone decides."""
    normalizer, splitter = written.normalizer, written.pre_tokenizer
    has: dict[str, Any] = {}
    if isinstance(normalizer, normalizers.BertNormalizer):
        has = {"do_lower_case": normalizer.lowercase, "strip_accents": normalizer.strip_accents}
        has["tokenize_chinese_chars"] = normalizer.handle_chinese_chars
    if isinstance(splitter, pre_tokenizers.ByteLevel):
        has["add_prefix_space"] = splitter.add_prefix_space
    for key, value in has.items():
        if side.settings.get(key) not in (None, value):
            yield f"{key} = {_json(side.settings[key])}"


def _settle(model: Any, settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        before = getattr(model, key)
        if (before or None) != (value or None):
            setattr(model, key, value)
            yield key, f"{key} is {_json(before)}, not {_json(value)}"


def _strips(normalizer: Any) -> bool:
    strips = normalizer.strip_accents
    return bool(normalizer.lowercase if strips is None else strips)


def _json(value: Any) -> str:
    return {True: "true", False: "false", None: "null"}.get(value, repr(value))


def _name(step: Any) -> str:
    return "null" if step is None else type(step).__name__
