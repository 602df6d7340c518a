"""`GPT2Config` and `BertConfig`: the numbers of a checkpoint, read from its `config.json`.

Both architectures answer to the same names (`n_layer`, `n_head`, `n_embd`, `head_dim`, …), so that
everything downstream is written once. Values that change the arithmetic have no defaults here: a
file that lacks one is refused, and so is a setting that this package does not implement. Every key is
used, known to change nothing (`config_keys`), refused or warned of.
"""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from jaxqkv.checkpoints import config_keys
from jaxqkv.errors import CheckpointError, JaxqkvWarning, listed, printable
from jaxqkv.runtime.files import read_whole, refuse_pointer

# The names that transformers has for activations, by the formula that they mean.
ACTIVATIONS = {
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"), "gelu_tanh"),
    **dict.fromkeys(("gelu", "gelu_python"), "gelu_erf"),
    **dict.fromkeys(("silu", "swish"), "silu"),
    **{name: name for name in ("relu", "relu2", "relu6", "quick_gelu", "tanh", "sigmoid", "mish", "linear")},
}
# Numbers above these are no sizes of a model, and would fill the memory before anything else fails.
MOST_LAYERS, LARGEST = 10_000, 2**31 - 1
# Of a config.json, whose like have a few thousand.
MOST_BYTES = 10_000_000


@dataclasses.dataclass(frozen=True)
class Config:
    """What GPT-2 and BERT have in common. Hashable, so that it can be a static argument of `jax.jit`."""

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
    # Field → the key in config.json.
    keys: ClassVar[Mapping[str, str]]
    # Keys that change the numbers → the only values that are implemented; a missing key means the first.
    only: ClassVar[Mapping[str, tuple[Any, ...]]]
    # Keys that are true or false → what a file means that lacks them, by the definition of the format.
    switches: ClassVar[Mapping[str, bool]]
    # Other names that transformers has for some keys.
    aliases: ClassVar[Mapping[str, str]] = {}
    # Keys that change none of the numbers.
    harmless: ClassVar[frozenset[str]]
    # What transformers takes where a file lacks a key: what the message about it proposes.
    usual: ClassVar[Mapping[str, Any]]

    @property
    def token_types(self) -> int:
        """How many token types there are: 1, type 0, where the architecture has none."""
        return 1

    @property
    def head_dim(self) -> int:
        """Width of a head: that of the model over the number of heads."""
        return self.n_embd // self.n_head

    @property
    def architecture(self) -> str:
        """The kind of model and its size, in words."""
        return f"{self.model_type}, {self.n_layer} layers, {self.n_head} heads of {self.head_dim}"

    @property
    def vocabulary(self) -> str:
        """How many tokens and positions there are, in words."""
        return f"{self.vocab_size} tokens, {self.n_positions} positions"


@dataclasses.dataclass(frozen=True)
class GPT2Config(Config):
    """GPT-2: pre-norm blocks, causal attention, tanh GELU, tied or untied output embedding.

    With `reorder_and_upcast_attn`, scores and softmax are float32 where the arithmetic is of 16 bits.
    """

    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    tie_word_embeddings: bool
    reorder_and_upcast_attn: bool = False

    model_type = "gpt2"
    causal = True
    keys: ClassVar = {
        "vocab_size": "vocab_size",
        "n_positions": "n_positions",
        "n_embd": "n_embd",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_inner": "n_inner",
        "activation": "activation_function",
        "layer_norm_epsilon": "layer_norm_epsilon",
    }
    aliases: ClassVar = {
        "max_position_embeddings": "n_positions",
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
    }
    only: ClassVar = {"add_cross_attention": (False,), "pruned_heads": ({}, None), "per_layer_config": (None, {})}
    switches: ClassVar = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "tie_word_embeddings": True,
        "reorder_and_upcast_attn": False,
    }
    harmless = config_keys.GPT2
    usual: ClassVar = {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-05,
        "initializer_range": 0.02,
    }


@dataclasses.dataclass(frozen=True)
class BertConfig(Config):
    """BERT: post-norm blocks, bidirectional attention, erf GELU, token types.

    `tie_word_embeddings` says whether the decoder of a language modelling head is the token embedding.
    """

    type_vocab_size: int
    tie_word_embeddings: bool = True

    model_type = "bert"
    causal = False
    keys: ClassVar = {
        "vocab_size": "vocab_size",
        "n_positions": "max_position_embeddings",
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_inner": "intermediate_size",
        "activation": "hidden_act",
        "layer_norm_epsilon": "layer_norm_eps",
        "type_vocab_size": "type_vocab_size",
    }
    only: ClassVar = {
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "pruned_heads": ({}, None),
        "per_layer_config": (None, {}),
    }
    switches: ClassVar = {"tie_word_embeddings": True}
    harmless = config_keys.BERT
    usual: ClassVar = {
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "type_vocab_size": 2,
        "initializer_range": 0.02,
    }

    @property
    def token_types(self) -> int:
        return self.type_vocab_size


ARCHITECTURES: dict[str, type[Config]] = {"gpt2": GPT2Config, "bert": BertConfig}


def parse_config(data: Any, where: str) -> Config:
    """Makes a config from the contents of `config.json`; warns of keys that are not known.

    Args:
      data: the decoded JSON object.
      where: the file's name, for messages.

    Raises:
      CheckpointError: naming the file, the key and the reason.
    """
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(data).__name__}")
    kind = data.get("model_type")
    cls = ARCHITECTURES.get(kind) if isinstance(kind, str) else None
    if cls is None:
        found = repr(data["model_type"]) if "model_type" in data else "missing"
        raise CheckpointError(f"{where}: model_type is {found}; supported are 'gpt2' and 'bert'")
    for key, allowed in cls.only.items():
        if key in data and data[key] not in allowed:
            raise CheckpointError(f"{where}: {key} = {data[key]!r} is not supported, only {allowed[0]!r}")
    if data.get("quantization_config"):
        raise CheckpointError(f"{where}: quantization_config is not supported; use an unquantised checkpoint")

    names = _names(cls, data, where)
    values: dict[str, Any] = {"initializer_range": _initializer_range(data, where)}
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    for field, key in cls.keys.items():
        value = data.get(names[key])
        if field == "n_inner" and value is None and cls is GPT2Config:
            value = 4 * values["n_embd"]  # what `null` means in GPT-2's files
        if value is None:
            raise CheckpointError(f"{where}: {missing(cls, key)}")
        if types[field] is int:
            _check_size(value, MOST_LAYERS if field == "n_layer" else LARGEST, f"{where}: {names[key]}")
        values[field] = value
    epsilon = values["layer_norm_epsilon"]
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 <= epsilon < 1:
        raise CheckpointError(f"{where}: {cls.keys['layer_norm_epsilon']} = {epsilon!r} is not a number in [0, 1)")
    if not isinstance(values["activation"], str) or values["activation"] not in ACTIVATIONS:
        raise CheckpointError(
            f"{where}: {cls.keys['activation']} = {values['activation']!r} is not supported; "
            f"supported are {', '.join(ACTIVATIONS)}"
        )
    if values["n_embd"] % values["n_head"]:
        width, heads = (names[cls.keys[field]] for field in ("n_embd", "n_head"))
        raise CheckpointError(
            f"{where}: {width} = {values['n_embd']} is not a multiple of {heads} = {values['n_head']}"
        )
    for key, absent in cls.switches.items():
        values[key] = data.get(key, absent)
        if not isinstance(values[key], bool):
            raise CheckpointError(f"{where}: {key} = {values[key]!r} is not true or false")
    _warn_of_unknown(cls, data, where)
    return cls(**values)


def missing(cls: type[Config], key: str) -> str:
    """What to say of a key that a file lacks: the line to add to it."""
    line = f'"{key}": {json.dumps(cls.usual[key])}'
    return f"{key} is missing; add {line} to config.json if that, which transformers takes, is the model's"


def _names(cls: type[Config], data: Mapping[str, Any], where: str) -> dict[str, str]:
    """Key → the name that the file has for it: its own or an alias."""
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


def _check_size(value: Any, most: int, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{what} = {value!r} is not a positive integer")
    if value > most:
        raise CheckpointError(f"{what} = {value} is more than {most:,}")


def _warn_of_unknown(cls: type[Config], data: Mapping[str, Any], where: str) -> None:
    used = {*cls.keys.values(), *cls.aliases, *cls.only, *cls.switches, "initializer_range", "quantization_config"}
    unknown = sorted(data.keys() - used - cls.harmless)
    if unknown:
        them, they = ("it", "it changes") if len(unknown) == 1 else ("them", "any of them changes")
        message = f"{where}: unknown key{'s' * (len(unknown) > 1)} {listed(unknown)}; jaxqkv ignores {them}: if {they} "
        warnings.warn(printable(f"{message}how the model computes, the results are not the model's"), JaxqkvWarning, 3)


def read_config(path: Path) -> Config:
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
    return parse_config(data, str(path))


def config_to_json(config: Config) -> dict[str, Any]:
    """The inverse of `parse_config`: the object that `config.json` holds."""
    data: dict[str, Any] = {"model_type": config.model_type, "initializer_range": config.initializer_range}
    data |= {key: getattr(config, field) for field, key in config.keys.items()}
    data |= {key: getattr(config, key) for key in config.switches}
    if isinstance(config, GPT2Config):
        return data | {"architectures": ["GPT2LMHeadModel"]}
    return data | {"architectures": ["BertModel"], "position_embedding_type": "absolute", "pad_token_id": 0}


def _gpt2(n_embd: int, n_layer: int, n_head: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=50257,
        n_positions=1024,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        n_inner=4 * n_embd,
        activation="gelu_new",
        layer_norm_epsilon=1e-5,
        initializer_range=0.02,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        tie_word_embeddings=True,
    )


def _bert(n_embd: int, n_layer: int, n_head: int) -> BertConfig:
    return BertConfig(
        vocab_size=30522,
        n_positions=512,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        n_inner=4 * n_embd,
        activation="gelu",
        layer_norm_epsilon=1e-12,
        initializer_range=0.02,
        type_vocab_size=2,
    )


# Architectures known by name, so that `random:gpt2-xl` needs no download.
KNOWN: dict[str, Config] = {
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "bert-base-uncased": _bert(768, 12, 12),
    "bert-large-uncased": _bert(1024, 24, 16),
}
