"""Comparison of every intermediate of a checkpoint, and of token ids, with PyTorch's.

Both sides run in float32 and in float64 (jaxqkv's on the CPU if the device has no float64), which shows whose rounding
causes a difference. Needs the extra `torch`.
"""

import contextlib
import dataclasses
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float

from jaxqkv.checkpoints.checkpoint import Checkpoint
from jaxqkv.checkpoints.weights import Weights
from jaxqkv.errors import JaxqkvError, JaxqkvWarning, NoTokenizer, first_line, printable
from jaxqkv.model.model import Model
from jaxqkv.runtime import console
from jaxqkv.runtime.devices import precision
from jaxqkv.text.batches import Batch
from jaxqkv.text.tokenizers import Tokenizer

# `hidden` is the residual stream after each layer, after GPT-2's last one with the final norm. `final_hidden` is the
# last of these, as `Model.hidden` returns it; `logits` are compared if the model has them.
TENSORS = ("q", "k", "v", "scores", "pattern", "z", "attn_out", "hidden", "final_hidden", "logits")
ONCE = ("final_hidden", "logits")
CAPTURED = frozenset(TENSORS) - {"hidden", *ONCE} | {"resid_pre"}
# Largest errors that always pass, relative to the largest magnitude in the tensor and layer. That of bfloat16 is both
# for products of bfloat16 numbers and for models in bfloat16.
TOLERANCES = {"highest": 2e-5, "high": 1e-3, "default": 3e-2, "bfloat16": 1e-1, "float64": 1e-10}
# Largest ratio to PyTorch's own float32 error that passes. Over 24 random checkpoints of both architectures, with
# initializer_range from 0.02 to 0.4, the largest ratio of a layer was 2.5, that of 99 in 100 tensors 2.2; doubled for
# devices that sum in another order.
PYTORCH_TIMES = 5
# Texts that tokenizers differ on: accents, other scripts, case, spaces, special tokens, and nothing.
ODD = (
    "Déjà vu — naïve façade, café ÀÉÎ",
    "日本語の会社 한국어 ١٢٣ 🙂",
    "THE The the McDonald's can't 2,048.5 I'LL",
    "  two  spaces \t tab\r\nline\u00a0\u200b ",
    "[CLS] her [MASK][SEP] <s>her</s> <mask><unk> [PAD] <|endoftext|>her <|endoftext|>",
    "<b>x</b> https://a.b/c_d?e=f #tag @name \x00\ufffd",
    " ",
    "\n",
    "",
)
# Tokens of the two random sequences that are compared if there is no tokenizer.
LENGTHS = (61, 23)
# Most added tokens that are compared; a tokenizer may have thousands.
MOST_ADDED = 200
Intermediates = dict[str, Float[np.ndarray, "layer batch ..."]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One tensor's differences, each relative to the largest magnitude of the exact values.

    There is one value for each layer; for outputs of the whole model, one value.

    Attributes:
      name: name of the tensor.
      difference: difference between jaxqkv, in the dtype asked for, and PyTorch in float32.
      error: difference between jaxqkv and PyTorch in float64.
      torch_error: difference between PyTorch in float32 and in float64.
      double: difference between jaxqkv and PyTorch, both in float64.
    """

    name: str
    difference: Float[np.ndarray, " layer"]
    error: Float[np.ndarray, " layer"]
    torch_error: Float[np.ndarray, " layer"]
    double: Float[np.ndarray, " layer"]

    def limit(self, precision: str) -> Float[np.ndarray, " layer"]:
        """Returns the largest error that passes, by layer.

        A checkpoint with large scores amplifies every rounding, in PyTorch as here. PyTorch's own error in float32
        shows by how much: if `PYTORCH_TIMES` that error exceeds the tolerance of float32, all tolerances grow by the
        ratio.

        Args:
          precision: a key of `TOLERANCES`.
        """
        growth: Float[np.ndarray, " layer"] = PYTORCH_TIMES * self.torch_error / TOLERANCES["highest"]
        return TOLERANCES[precision] * np.maximum(growth, 1)

    def passes(self, precision: str) -> bool:
        """Tells whether every layer's error is within its limit and float64 agrees; NaN on either side fails."""
        right = (self.error <= self.limit(precision)) & (self.double <= TOLERANCES["float64"])
        return bool(right.all())


def compare_tokens(tokenizer: Tokenizer, folder: Path, texts: Sequence[str]) -> dict[str, Any]:
    """Compares token ids with those of transformers' `AutoTokenizer`.

    Args:
      tokenizer: tokenizer of the folder.
      folder: folder with the tokenizer's files.
      texts: texts to compare, besides the `ODD` ones and those with added tokens.

    Returns:
      `texts`, their number; `different`, the texts with other ids; `passed`; and `reason`, why nothing is compared.

    Raises:
      JaxqkvError: when transformers is not installed.

    Warns:
      JaxqkvWarning: when transformers cannot load the tokenizer.
    """
    try:
        import transformers
    except ImportError as error:
        raise JaxqkvError(f"verify needs {error.name}: pip install 'jaxqkv[torch]'") from None
    transformers.logging.set_verbosity_error()
    added = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
    chosen = [*texts, *ODD]
    chosen += [text for token in added[:MOST_ADDED] for text in (token, f"her{token} her", f"Her {token}her")]
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # of any kind, depending on the files
        reason = f"transformers cannot load the tokenizer ({type(error).__name__}: {printable(first_line(error))})"
        warnings.warn(JaxqkvWarning(f"{tokenizer.where}: token ids are not compared: {reason}"), stacklevel=2)
        return {"texts": 0, "different": [], "passed": True, "reason": reason}

    def both(text: str) -> bool:
        one = _ids_or_none(lambda: tokenizer.backend.encode(text).ids)
        return one == _ids_or_none(lambda: theirs(text)["input_ids"])

    different = [text for text in chosen if not both(text)]
    return {"texts": len(chosen), "different": different, "passed": not different, "reason": None}


def _ids_or_none(encode: Callable[[], Sequence[int]]) -> list[int] | None:
    """Returns ids, or None if a tokenizer fails, perhaps with a panic that is not an `Exception`."""
    try:
        return list(encode())
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException:
        return None


def compare(checkpoint: Checkpoint, batch: Batch, dtype: Any = np.float32) -> list[Comparison]:
    """Returns the differences of every tensor, on this device and in the matmul precision that is set.

    Args:
      checkpoint: from `open_checkpoint`.
      batch: sequences, padded on either side or not.
      dtype: dtype of jaxqkv's arithmetic; PyTorch's is float32.

    Raises:
      JaxqkvError: when PyTorch or transformers are not installed.
    """
    model = Model(checkpoint, dtype=dtype)  # a broken checkpoint is refused before PyTorch reads it
    try:
        from jaxqkv.model import torch_reference
    except ImportError as error:
        raise JaxqkvError(f"verify needs {error.name}: pip install 'jaxqkv[torch]'") from None
    ids, mask = np.asarray(batch.ids), np.asarray(batch.mask)
    with console.bar(total=4, desc="runs", unit="run") as progress:
        torch_model = torch_reference.load(checkpoint)
        theirs = _with_hidden(torch_reference.intermediates(torch_model, model.config, ids, mask))
        progress.update()
        exact = _with_hidden(
            torch_reference.intermediates(torch_reference.double(torch_model), model.config, ids, mask)
        )
        progress.update()
        ours = _intermediates(model, batch)
        progress.update()
        with _double_precision():
            ours_exact = _intermediates(Model(checkpoint, dtype=np.float64), batch)
        progress.update()
    results = []
    for name in exact:
        mine, other, truth, double = (_real(arrays[name], name, mask) for arrays in (ours, theirs, exact, ours_exact))
        scale = np.array([np.abs(layer).max(initial=0) or 1.0 for layer in truth])
        pairs = ((mine, other), (mine, truth), (other, truth), (double, truth))
        results.append(Comparison(name, *(_largest(one, two) / scale for one, two in pairs)))
    return results


def _intermediates(model: Model, batch: Batch) -> Intermediates:
    names = CAPTURED | ({"hidden", "logits"} if model.config.has_logits else {"hidden"})
    acts = model.run(batch, capture=names)
    return _with_hidden({name: np.asarray(getattr(acts, name), np.float64) for name in names})


def _with_hidden(arrays: dict[str, np.ndarray]) -> Intermediates:
    """Returns the arrays with `hidden` of every layer, and what the model returns at the end as one layer."""
    streams = np.concatenate([arrays["resid_pre"][1:], arrays["hidden"][None]])
    whole = {**arrays, "hidden": streams, "final_hidden": streams[-1:]}
    if "logits" in arrays:
        whole["logits"] = arrays["logits"][None]
    return {name: whole[name] for name in TENSORS if name in whole}


def _real(
    values: Float[np.ndarray, "layer batch ..."], name: str, mask: Bool[np.ndarray, "batch pos"]
) -> Float[np.ndarray, "layer value"]:
    """Returns the values at real tokens, in float64; of scores and pattern, those of pairs of real tokens."""
    values = np.asarray(values, np.float64)
    if name in ("scores", "pattern"):
        pairs = mask[:, :, None] & mask[:, None, :]
        return np.moveaxis(values, 2, -1)[:, pairs].reshape(len(values), -1)
    if name in ("q", "k", "v", "z"):
        values = np.moveaxis(values, 2, 3)
    return values[:, mask].reshape(len(values), -1)


def _largest(
    one: Float[np.ndarray, "layer value"], two: Float[np.ndarray, "layer value"]
) -> Float[np.ndarray, " layer"]:
    return np.abs(one - two).max(axis=1, initial=0)


@contextlib.contextmanager
def _double_precision() -> Iterator[None]:
    """Switches float64 on in JAX, on the CPU if JAX may use it: a TPU has no float64.

    Flax's norms promote float64 to float64, which strict promotion forbids.
    """
    # Older versions of JAX have it in jax.experimental.
    enable = (jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")).enable_x64
    try:
        device = jax.devices("cpu")[0]
    except RuntimeError:  # JAX was told to use other platforms only
        device = None
    with enable(True), jax.default_device(device), jax.numpy_dtype_promotion("standard"):
        yield


def batch_of(checkpoint: Checkpoint, texts: Sequence[str], tokenizer: Tokenizer | None) -> Batch:
    """Returns the texts as a batch, cut if too long; without a tokenizer, random ids of two lengths."""
    config = checkpoint.config
    if tokenizer is None:
        generator = np.random.default_rng(0)
        lengths = [min(LENGTHS[0], config.n_positions), min(LENGTHS[1], max(1, config.n_positions // 2))]
        ids = generator.integers(0, config.vocab_size, (2, max(lengths))).astype(np.int32)
        mask = np.arange(max(lengths))[None] < np.array(lengths)[:, None]
        return Batch(ids=ids, mask=mask, token_types=np.zeros_like(ids))
    return tokenizer.batch(texts, config, truncate=True)


def report(checkpoint: Checkpoint, texts: Sequence[str] | None, dtype: str, own_texts: Sequence[str]) -> dict[str, Any]:
    """Returns every difference with its limit and its verdict, for the saved report.

    Args:
      checkpoint: from `open_checkpoint`.
      texts: texts to run; the first two of `own_texts` unless given.
      dtype: dtype of jaxqkv's arithmetic.
      own_texts: texts whose token ids are always compared.

    Raises:
      JaxqkvError: when PyTorch or transformers are not installed, or texts are given and there is no tokenizer.
    """
    Weights(checkpoint)  # broken weights are refused before the texts are read
    try:
        tokenizer = checkpoint.tokenizer()
    except NoTokenizer:  # for instance fresh weights without a network
        if texts:
            raise
        tokenizer = None
    if texts and tokenizer is not None:
        batch, what = tokenizer.batch(texts, checkpoint.config), "given"
    else:
        batch = batch_of(checkpoint, own_texts[:2], tokenizer)
        what = "two texts of the studies" if tokenizer else "random ids: there is no tokenizer"
    arithmetic = "bfloat16" if dtype == "bfloat16" else precision()
    tensors = {}
    for each in compare(checkpoint, batch, dtype):
        by_layer = {field.name: getattr(each, field.name).tolist() for field in dataclasses.fields(each)[1:]}
        limit = each.limit(arithmetic).tolist()
        tensors[each.name] = by_layer | {"limit": limit, "passed": each.passes(arithmetic)}
    tokens = {"texts": 0, "different": [], "passed": True, "reason": "there is no tokenizer"}
    if tokenizer is not None and (folder := checkpoint.tokenizer_source()) is not None:
        tokens = compare_tokens(tokenizer, folder, [*(texts or ()), *own_texts])
    return {
        "checkpoint": checkpoint.identity(),
        "batch": f"{len(batch.ids)} sequences of {', '.join(map(str, batch.mask.sum(axis=1)))} tokens ({what})",
        "tolerance": TOLERANCES[arithmetic],
        "times PyTorch's error": PYTORCH_TIMES,
        "tolerance in float64": TOLERANCES["float64"],
        "passed": all(each["passed"] for each in (*tensors.values(), tokens)),
        "token ids": tokens,
        "tensors": tensors,
    }
