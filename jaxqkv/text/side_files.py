"""The files of a folder that describe its tokenizer besides the vocabulary.

    tokenizer_config.json     the class, its settings and special tokens
    special_tokens_map.json   special tokens                  } of older folders; read only if tokenizer_config.json
    added_tokens.json         further tokens and their ids    } has no added_tokens_decoder
    config.json               the class, if tokenizer_config.json names none

They are read in the order and with the precedence of transformers 5.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import AddedToken

from jaxqkv.errors import CheckpointError, first_line
from jaxqkv.runtime.files import read_whole

SETTINGS, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
# Special tokens with a role, in the order in which they are added.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Lists of special tokens without a role, by their present and their former name.
EXTRA = ("extra_special_tokens", "additional_special_tokens")
FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
# Settings that are refused: they would change which files are read or their contents, and no folder needs them.
REFUSED = ("fast_tokenizer_files", "init_inputs", "vocab", "merges")
# Most bytes of a side file; the largest list some thousand tokens.
MOST_BYTES = 30_000_000

# A special token: a string in some files, and with flags in others.
Token: TypeAlias = str | AddedToken


@dataclasses.dataclass(frozen=True)
class SideFiles:
    """The checked contents of the side files.

    Attributes:
      folder: folder of the files.
      settings: all of tokenizer_config.json.
      class_name: class of the tokenizer, without `Fast` at its end; None if no file names it.
      class_place: file and key that name the class.
      model_type: model_type in config.json, read only if no file names the class.
      declared: id → token, and the file and key that declare it.
      named: special tokens by role; None if a file says that there is none.
      specific: special tokens with other roles.
      extra: special tokens without a role; None if no file lists them.
    """

    folder: Path
    settings: Mapping[str, Any]
    class_name: str | None
    class_place: str
    model_type: str | None
    declared: Mapping[int, tuple[AddedToken, str]]
    named: Mapping[str, Token | None]
    specific: Mapping[str, Token]
    extra: tuple[Token, ...] | None

    @property
    def place(self) -> str:
        """The path of tokenizer_config.json, for messages."""
        return str(self.folder / SETTINGS)

    def flag(self, key: str, default: bool | None) -> Any:
        """Returns a setting that is true or false, or null if that is its default.

        Raises:
          CheckpointError: when it is anything else.
        """
        value = self.settings.get(key, default)
        if not isinstance(value, bool) and value is not default:
            raise CheckpointError(f"{self.place}: {key} = {value!r} is not true or false")
        return value


def read_side_files(folder: Path) -> SideFiles:
    """Reads the side files that the folder has.

    Raises:
      CheckpointError: for a malformed file, naming it and the key.
    """
    settings = _object(folder / SETTINGS)
    place = str(folder / SETTINGS)
    for key in REFUSED:
        if settings.get(key) and settings[key] != ["tokenizer.json"]:
            raise CheckpointError(f"{place}: {key} is not supported; save the tokenizer again with transformers")
    class_name, class_place, model_type = _class_name(folder, settings)
    special: dict[str, tuple[Any, str]] = {}  # key → value, place
    for key, value in settings.items():
        if key in EXTRA or key.endswith("_token"):
            special[key] = value, f"{place}: {key}"
    if EXTRA[1] in special and not special.get(EXTRA[0], (None,))[0]:
        special[EXTRA[0]] = special.pop(EXTRA[1])
    listed = [] if (tokens := settings.get("added_tokens_decoder")) is None else [tokens]
    declared: dict[int, tuple[AddedToken, str]] = {}
    if listed:
        for index, token in _entries(tokens, f"{place}: added_tokens_decoder"):
            where = f"{place}: added_tokens_decoder: {index}"
            if not index.isdecimal() or not isinstance(token, dict):
                raise CheckpointError(f"{where}: expected an id and an object that describes its token")
            declared[int(index)] = _token(token, where, special=False), where
    else:
        _merge_older(folder / SPECIAL, special)
    named, specific, extra = _sorted_out(special)
    if not listed:
        contents = {content_of(token) for token in (*named.values(), *specific.values(), *(extra or ()))}
        where = str(folder / ADDED)
        for content, index in _object(folder / ADDED).items():
            if isinstance(index, bool) or not isinstance(index, int) or index < 0 or not content:
                raise CheckpointError(f"{where}: {content!r}: expected a token and its id, not {index!r}")
            is_special = content in contents
            flags = {"content": content, "normalized": not is_special, "special": is_special}
            declared[index] = _token(flags, where, special=False), f"{where}: {content}"
    return SideFiles(folder, settings, class_name, class_place, model_type, declared, named, specific, extra)


def _class_name(folder: Path, settings: Mapping[str, Any]) -> tuple[str | None, str, str | None]:
    """Returns the class, the file and key that name it, and, if none does, config.json's model_type."""
    places = {folder / SETTINGS: settings}
    if settings.get("tokenizer_class") is None:
        places[folder / "config.json"] = _object(folder / "config.json")
    for path, data in places.items():
        name = data.get("tokenizer_class")
        if name is not None:
            if not isinstance(name, str):
                raise CheckpointError(f"{path}: tokenizer_class = {name!r} is not the name of a class")
            return name.removesuffix("Fast"), f"{path}: tokenizer_class", None
    kind = data.get("model_type")
    return None, "", kind if isinstance(kind, str) else None


def _merge_older(path: Path, special: dict[str, tuple[Any, str]]) -> None:
    """Adds the tokens of special_tokens_map.json, which overrides other files; its lists are appended to theirs."""
    for key, value in _object(path).items():
        where = f"{path}: {key}"
        if key == EXTRA[0] and isinstance(value, list):
            before = special.get(key, ([], ""))[0] or []
            value = [*before, *(token for token in value if token not in before)] if isinstance(before, list) else value
        if key in EXTRA or key.endswith("_token"):
            special[key] = value, where
    if EXTRA[1] in special and EXTRA[0] not in special and (listed := special.pop(EXTRA[1]))[0] is not None:
        special[EXTRA[0]] = listed


def _sorted_out(
    special: Mapping[str, tuple[Any, str]],
) -> tuple[dict[str, Token | None], dict[str, Token], tuple[Token, ...] | None]:
    named: dict[str, Token | None] = {}
    specific: dict[str, Token] = {}
    extra: tuple[Token, ...] | None = None
    # If both names are there, one an object by role and one a list, both count.
    by_role = isinstance(special.get(EXTRA[0], (None,))[0], dict)
    for key, (value, where) in special.items():
        if key in NAMED:
            named[key] = None if value is None else _token(value, where)
        elif key == EXTRA[0] and isinstance(value, dict):
            specific |= {role: _token(token, f"{where}: {role}") for role, token in value.items()}
        elif key == EXTRA[0] or (key == EXTRA[1] and by_role and value is not None):
            if value is not None and not isinstance(value, list):
                raise CheckpointError(f"{where}: expected a list of tokens, not {value!r}")
            extra = tuple(_token(token, where) for token in value or ())
        elif key not in EXTRA and isinstance(value, str | dict):
            specific[key] = _token(value, where)
    return named, specific, extra


def _token(value: Any, where: str, special: bool = True) -> Any:
    """Returns a token from its text, or from an object with flags; `special` is the default of that flag."""
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, dict) or not isinstance(value.get("content"), str) or not value["content"]:
        raise CheckpointError(f"{where}: expected a token, as a string or an object with its content, not {value!r}")
    flags = {key: flag for key, flag in value.items() if key not in ("content", "__type", "id")}
    for key, flag in flags.items():
        if key not in FLAGS or not isinstance(flag, bool):
            raise CheckpointError(f"{where}: {key} = {flag!r} is no flag of a token; they are {', '.join(FLAGS)}")
    return AddedToken(value["content"], **({"special": special} | flags))


def content_of(token: Token | None) -> str | None:
    """Returns the text of a token, with or without flags."""
    return token if token is None or isinstance(token, str) else token.content


def _entries(value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected an object, not {value!r}")
    return value.items()


def _object(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file; empty if there is no file."""
    try:
        data = json.loads(read_whole(path, MOST_BYTES).decode())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({first_line(error)})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(data).__name__}")
    return data
