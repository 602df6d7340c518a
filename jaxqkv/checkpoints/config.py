"""`GPT2Config` and `BertConfig`: the numbers of a checkpoint, read from its `config.json`.

Both architectures answer to the same names (`n_layer`, `n_head`, `n_embd`, `head_dim`, …), so that
everything downstream is written once. Values that change the arithmetic have no defaults here: a
file that lacks one is refused, and so is a setting that this package does not implement.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from jaxqkv.errors import CheckpointError
from jaxqkv.runtime.files import read_whole

# Hugging Face's names for activations, by the formula that they mean.
GELU_TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
ACTIVATIONS = dict.fromkeys(GELU_TANH, "gelu_tanh") | {"gelu": "gelu_erf", "relu": "relu"}
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
    # Other names that transformers has for some keys.
    aliases: ClassVar[Mapping[str, str]] = {}

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
    """GPT-2: pre-norm blocks, causal attention, tanh GELU, tied or untied output embedding."""

    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    tie_word_embeddings: bool

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
    only: ClassVar = {"reorder_and_upcast_attn": (False,), "add_cross_attention": (False,), "pruned_heads": ({}, None)}


@dataclasses.dataclass(frozen=True)
class BertConfig(Config):
    """BERT: post-norm blocks, bidirectional attention, erf GELU, token types."""

    type_vocab_size: int

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
    }


ARCHITECTURES: dict[str, type[Config]] = {"gpt2": GPT2Config, "bert": BertConfig}


def parse_config(data: Any, where: str) -> Config:
    """Makes a config from the contents of `config.json`.

    Args:
      data: the decoded JSON object.
      where: the file's name, for error messages.

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
    for alias, key in cls.aliases.items():
        if alias in data and data[alias] != data.get(key):
            raise CheckpointError(
                f"{where}: {alias} = {data[alias]!r} contradicts {key} = {data.get(key)!r}, which means the same"
            )
    if data.get("quantization_config"):
        raise CheckpointError(f"{where}: quantization_config is not supported; use an unquantised checkpoint")

    spread = data.get("initializer_range")
    if spread is not None and (isinstance(spread, bool) or not isinstance(spread, int | float) or not 0 < spread < 1e6):
        raise CheckpointError(f"{where}: initializer_range = {spread!r} is not a positive number")
    values: dict[str, Any] = {"initializer_range": spread}
    fields = {field.name: field.type for field in dataclasses.fields(cls)}
    for field, key in cls.keys.items():
        value = data.get(key)
        if field == "n_inner" and value is None and cls is GPT2Config:
            value = 4 * data["n_embd"]  # what `null` means in GPT-2's files; n_embd was checked above
        if value is None:
            raise CheckpointError(f"{where}: {key} is missing")
        if fields[field] is int and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise CheckpointError(f"{where}: {key} = {value!r} is not a positive integer")
        most = MOST_LAYERS if field == "n_layer" else LARGEST
        if fields[field] is int and value > most:
            raise CheckpointError(f"{where}: {key} = {value} is more than {most:,}")
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
        raise CheckpointError(
            f"{where}: {cls.keys['n_embd']} = {values['n_embd']} is not a multiple of "
            f"{cls.keys['n_head']} = {values['n_head']}"
        )
    if cls is GPT2Config:
        # Absent from older files, whose format defines these values.
        for key, absent in (
            ("scale_attn_weights", True),
            ("scale_attn_by_inverse_layer_idx", False),
            ("tie_word_embeddings", True),
        ):
            value = data.get(key, absent)
            if not isinstance(value, bool):
                raise CheckpointError(f"{where}: {key} = {value!r} is not true or false")
            values[key] = value
    return cls(**values)


def read_config(path: Path) -> Config:
    """Reads a `config.json`. Raises `CheckpointError` naming the file and the reason."""
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
    if isinstance(config, GPT2Config):
        data |= {
            "architectures": ["GPT2LMHeadModel"],
            "scale_attn_weights": config.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
            "tie_word_embeddings": config.tie_word_embeddings,
        }
    else:
        data |= {"architectures": ["BertModel"], "position_embedding_type": "absolute", "pad_token_id": 0}
    return data


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
