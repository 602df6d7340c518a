"""`Config`: the numbers of a checkpoint, read from its `config.json` as its architecture declares.

All architectures have the same field names (`n_layer`, `n_head`, `n_embd`, `head_dim`, …), so that the rest of the
package is written once. Values that change the arithmetic have no defaults: a file that lacks one is refused, and so is
a setting that is not implemented. Every key is either used, known to change nothing (`config_keys`), refused or warned
of.
"""

import abc
import dataclasses
import functools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from jaxqkv.checkpoints import config_keys
from jaxqkv.checkpoints.tables import Table
from jaxqkv.errors import CheckpointError, JaxqkvWarning, listed, printable
from jaxqkv.runtime.files import read_whole, refuse_pointer
from jaxqkv.runtime.showing import plural

# Names of activations in transformers → formula.
ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), "gelu_tanh"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu_erf"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    **{name: name for name in ("relu", "relu2", "relu6", "quick_gelu", "tanh", "sigmoid", "mish", "linear")},
}
# Implausibly large sizes are refused, since they would fill the memory before anything else fails.
MOST_LAYERS, LARGEST = 10_000, 2**31 - 1
# Most bytes of a config.json; they usually have a few thousand.
MOST_BYTES = 10_000_000


@dataclasses.dataclass(frozen=True)
class Config(abc.ABC):
    """The config that all architectures share. Hashable, so that it can be a static argument of `jax.jit`.

    An architecture declares, as class variables, how its `config.json` is read:

    Attributes:
      model_type: name of the architecture in `config.json`.
      causal: whether a token attends only to earlier ones and to itself.
      keys: field → key.
      aliases: other name of a key → key.
      only: key that could change the numbers → the implemented values, the first of which is a missing key's meaning.
      switches: key and field that is true or false → its value if the file lacks it.
      fixed: field → value that the files do not name.
      harmless: keys that change no number.
      usual: key → transformers' default, which an error about a missing key proposes.
      always: entries that `to_json` adds.
      tokenizer_class: transformers' class for the tokenizer, if its files name none.
    """

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    activation: str
    layer_norm_epsilon: float
    initializer_range: float | None

    model_type: ClassVar[str]
    causal: ClassVar[bool]
    keys: ClassVar[Mapping[str, str]]
    aliases: ClassVar[Mapping[str, str]] = {}
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    switches: ClassVar[Mapping[str, bool]] = {}
    fixed: ClassVar[Mapping[str, Any]] = {}
    harmless: ClassVar[frozenset[str]] = config_keys.ANY
    usual: ClassVar[Mapping[str, Any]] = {}
    always: ClassVar[Mapping[str, Any]] = {}
    tokenizer_class: ClassVar[str]

    @abc.abstractmethod
    def table(self) -> Table:
        """Returns the table of the checkpoint's tensors, with this config's shapes."""

    @property
    def token_types(self) -> int:
        """Number of token types; 1 if the architecture has none."""
        return 1

    @functools.cached_property
    def head_dim(self) -> int:
        """Width of a head: the model's width divided by the number of heads.

        If an architecture's files name another, it declares `head_dim: int = dataclasses.field(kw_only=True)` and its
        key.
        """
        return self.n_embd // self.n_head

    @property
    def attention_width(self) -> int:
        """Width of q, k, v and z of all heads together."""
        return self.n_head * self.head_dim

    @property
    def architecture(self) -> str:
        """Architecture and sizes, for people."""
        return f"{self.model_type}, {self.n_layer} layers, {self.n_head} heads of {self.head_dim}"

    @property
    def vocabulary(self) -> str:
        """Number of tokens and of positions, for people."""
        return f"{self.vocab_size} tokens, {self.n_positions} positions"

    # --- config.json ---

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str) -> "Config":
        """Makes a config of this architecture from the contents of `config.json`; warns of unknown keys.

        Args:
          data: the decoded JSON object.
          where: name of the file, for messages.

        Raises:
          CheckpointError: naming the file, the key and the reason.
        """
        for key, allowed in cls.only.items():
            if key in data and data[key] not in allowed:
                raise CheckpointError(f"{where}: {key} = {data[key]!r} is not supported, only {allowed[0]!r}")
        if data.get("quantization_config"):
            raise CheckpointError(f"{where}: quantization_config is not supported; use an unquantised checkpoint")
        names = _names(cls, data, where)
        found = {field: data.get(names[key]) for field, key in cls.keys.items()}
        values = dict(cls.fixed) | {"initializer_range": _initializer_range(data, where)}
        types = {field.name: field.type for field in dataclasses.fields(cls)}
        for field, key in cls.keys.items():
            value = found[field] if found[field] is not None else cls.implied(field, found)
            if value is None:
                raise CheckpointError(f"{where}: {cls.missing(key)}")
            if types[field] is int:
                smallest = 0 if field == "pad_token_id" else 1
                _check_size(value, smallest, MOST_LAYERS if field == "n_layer" else LARGEST, f"{where}: {names[key]}")
            values[field] = value
        for key, absent in cls.switches.items():
            values[key] = data.get(key, absent)
            if not isinstance(values[key], bool):
                raise CheckpointError(f"{where}: {key} = {values[key]!r} is not true or false")
        _check_arithmetic(cls, values, names, where)
        _warn_of_unknown(cls, data, where)
        return cls(**cls.settle(values, where))

    @classmethod
    def implied(cls, field: str, found: Mapping[str, Any]) -> Any:
        """Returns the value that the format defines for `null` or a missing key; None if it defines none."""
        return None

    @classmethod
    def settle(cls, values: dict[str, Any], where: str) -> dict[str, Any]:
        """Returns the fields, given what the keys say; overridden where a key means something else than its field."""
        return values

    @classmethod
    def missing(cls, key: str) -> str:
        """Returns the end of an error about a missing key: the line to add to the file."""
        if key not in cls.usual:
            return f"{key} is missing; add it to config.json"
        line = f'"{key}": {json.dumps(cls.usual[key])}'
        return f"{key} is missing; add {line} to config.json if the model has this default of transformers"

    def to_json(self) -> dict[str, Any]:
        """Returns the object that `config.json` holds; `parse` makes the same config from it."""
        data: dict[str, Any] = {"model_type": self.model_type, "initializer_range": self.initializer_range}
        data |= {key: getattr(self, field) for field, key in self.keys.items()}
        return data | {key: getattr(self, key) for key in self.switches} | dict(self.always)


def _names(cls: type[Config], data: Mapping[str, Any], where: str) -> dict[str, str]:
    """Returns key → the name that the file uses for it: the key itself or an alias."""
    names = {key: key for key in cls.keys.values()}
    for alias, key in cls.aliases.items():
        if alias not in data:
            continue
        if key not in data:
            names[key] = alias
        elif data[alias] != data[key]:
            raise CheckpointError(
                f"{where}: {alias} = {data[alias]!r} contradicts {key} = {data[key]!r}, which means the same"
            )
    return names


def _initializer_range(data: Mapping[str, Any], where: str) -> float | None:
    spread = data.get("initializer_range")
    if spread is not None and (isinstance(spread, bool) or not isinstance(spread, int | float) or not 0 < spread < 1e6):
        raise CheckpointError(f"{where}: initializer_range = {spread!r} is not a positive number")
    return spread


def _check_size(value: Any, smallest: int, most: int, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
        kind = "a positive integer" if smallest else "an integer from 0 up"
        raise CheckpointError(f"{what} = {value!r} is not {kind}")
    if value > most:
        raise CheckpointError(f"{what} = {value} is more than {most:,}")


def _check_arithmetic(cls: type[Config], values: Mapping[str, Any], names: Mapping[str, str], where: str) -> None:
    epsilon, activation = values["layer_norm_epsilon"], values["activation"]
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 <= epsilon < 1:
        raise CheckpointError(f"{where}: {cls.keys['layer_norm_epsilon']} = {epsilon!r} is not a number in [0, 1)")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{where}: {cls.keys['activation']} = {activation!r} is not supported; "
            f"supported are {', '.join(ACTIVATIONS)}"
        )
    if "head_dim" not in cls.keys and values["n_embd"] % values["n_head"]:
        width, heads = (names[cls.keys[field]] for field in ("n_embd", "n_head"))
        raise CheckpointError(
            f"{where}: {width} = {values['n_embd']} is not a multiple of {heads} = {values['n_head']}"
        )


def _warn_of_unknown(cls: type[Config], data: Mapping[str, Any], where: str) -> None:
    used = {*cls.keys.values(), *cls.aliases, *cls.only, *cls.switches, "initializer_range", "quantization_config"}
    unknown = sorted(data.keys() - used - cls.harmless)
    if unknown:
        them, they = ("it", "it changes") if len(unknown) == 1 else ("them", "any of them changes")
        message = f"{where}: unknown {plural(len(unknown), 'key')} {listed(unknown)}; jaxqkv ignores {them}: if {they} "
        warnings.warn(printable(f"{message}how the model computes, the results are not the model's"), JaxqkvWarning, 3)


class Registry:
    """The architectures by their names in `config.json`, and the known models by their names on the hub."""

    def __init__(self, *architectures: type[Config]):
        self.architectures: dict[str, type[Config]] = {}
        self.known: dict[str, Config] = {}
        for each in architectures:
            self.add(each)

    def add(self, architecture: type[Config], known: Mapping[str, Config] | None = None) -> None:
        """Adds an architecture, and models whose sizes are known by name."""
        self.architectures[architecture.model_type] = architecture
        self.known |= known or {}

    def parse(self, data: Any, where: str) -> Config:
        """Makes a config from the contents of `config.json`; arguments and errors as for `Config.parse`."""
        if not isinstance(data, Mapping):
            raise CheckpointError(f"{where}: expected a JSON object, found {type(data).__name__}")
        kind = data.get("model_type")
        architecture = self.architectures.get(kind) if isinstance(kind, str) else None
        if architecture is None:
            found = repr(data["model_type"]) if "model_type" in data else "missing"
            raise CheckpointError(
                f"{where}: model_type is {found}; supported are {', '.join(map(repr, self.architectures))}"
            )
        return architecture.parse(data, where)

    def read(self, path: Path) -> Config:
        """Reads a `config.json`. Raises `CheckpointError` naming the file and the reason."""
        refuse_pointer(path)
        try:
            data = json.loads(read_whole(path, MOST_BYTES).decode())
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file; a checkpoint folder holds config.json") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not readable as JSON ({error})") from None
        return self.parse(data, str(path))
