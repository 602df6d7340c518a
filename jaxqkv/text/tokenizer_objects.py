"""Copies tokenizers that are objects of `tokenizers` or of `transformers`."""

import warnings
from typing import Any

import tokenizers

from jaxqkv.errors import CheckpointError, JaxqkvError, JaxqkvWarning, first_line


def copied(given: Any, n_positions: int) -> tuple[tokenizers.Tokenizer, str, str]:
    """Returns a copy of a tokenizer, its name for messages, and the side at which texts are cut.

    Args:
      given: tokenizer of `tokenizers`, or a fast one of `transformers`, with its setting `split_special_tokens`.
      n_positions: number of the model's positions.

    Raises:
      JaxqkvError: for other objects, and for a tokenizer written in Python.

    Warns:
      JaxqkvWarning: when a tokenizer of `tokenizers` would cut texts that fit in the model.
    """
    name, kind = f"the given {type(given).__name__}", type(given).__module__.partition(".")[0]
    if isinstance(given, tokenizers.Tokenizer):
        truncation = given.truncation or {}
        if truncation.get("max_length", n_positions) < n_positions:
            message = (
                f"{name}: its truncation to {truncation['max_length']} tokens is not taken over; no text is cut that "
                f"fits in the model's {n_positions} positions"
            )
            warnings.warn(JaxqkvWarning(message), stacklevel=4)
        return _copy(given, given.encode_special_tokens, name), name, truncation.get("direction", "right")
    backend = getattr(given, "backend_tokenizer", None)
    if isinstance(backend, tokenizers.Tokenizer):
        split = bool(getattr(given, "split_special_tokens", False))
        return _copy(backend, split, name), name, getattr(given, "truncation_side", "right")
    if kind == "transformers" or callable(getattr(given, "convert_tokens_to_ids", None)):
        raise JaxqkvError(
            f"{name} runs in Python, without a backend_tokenizer, and is not supported; give the fast tokenizer of the "
            "same vocabulary (AutoTokenizer.from_pretrained), or a folder with its files"
        )
    raise JaxqkvError(f"tokenizer is a folder, or an object of tokenizers or transformers, not {type(given).__name__}")


def _copy(backend: tokenizers.Tokenizer, split: bool, name: str) -> tokenizers.Tokenizer:
    try:
        copy = tokenizers.Tokenizer.from_str(backend.to_str())
    except Exception as error:  # a bare one, where a part is written in Python
        raise CheckpointError(f"{name} cannot be copied ({first_line(error)})") from None
    copy.encode_special_tokens = split
    return copy
