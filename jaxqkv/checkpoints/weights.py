"""`Weights`: a checkpoint's tensors by name and by role, each read when it is asked for."""

import dataclasses
import functools
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from jaxqkv.checkpoints import tables
from jaxqkv.checkpoints.checkpoint import Checkpoint
from jaxqkv.checkpoints.mapped import FLOATS
from jaxqkv.checkpoints.named import NamedWeights, read_only
from jaxqkv.errors import CheckpointError, JaxqkvError, JaxqkvWarning, listed, printable
from jaxqkv.runtime import showing
from jaxqkv.runtime.showing import plural

# Beginning of a place in the parameters → category of the tensor, in the order of reports.
CATEGORIES = {
    "wte": "Token Embedding",
    "word": "Token Embedding",
    "wpe": "Positional Embedding",
    "position": "Positional Embedding",
    "token_type": "Token Type Embedding",
    "attn": "Attention",
    "mlp": "Feed Forward",
    "ln_": "Layer Norm",
    "norm": "Layer Norm",
    "lm_head": "Output Embedding",
}
# Rows of two embeddings that are compared at a time.
ROWS = 4096
# Bits of the exponent; all are 1 only in NaN and the infinities.
EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80}


class TensorInfo(NamedTuple):
    """One tensor of a model: name, category, layer (None outside of layers) and shape."""

    name: str
    category: str
    layer: int | None
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Weights(NamedWeights):
    """The tensors of a checkpoint, in `dtype` (float32 unless given).

    Nothing is kept: every call reads from the file again. A tensor that is stored in `dtype` is a view of the mapped
    file, without a copy. All arrays are read-only; `numpy.array` makes a copy that can be changed. A layer or a name
    that the model does not have is a `JaxqkvError`.

    A tensor with NaN or infinite values is read as it is, with a `JaxqkvWarning` that names it. `layer`, which a run
    calls for every layer, does not check values; `check_layers` does so if the results are not finite.

    Attributes:
      checkpoint: checkpoint that they are read from.
      config: config of the checkpoint.
      dtype: dtype of the arrays.

    Raises:
      CheckpointError: listing every tensor that is missing, unexpected, repeated or wrongly shaped.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: Any = np.float32):
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.dtype = np.dtype(dtype)
        self._table = self.config.table()
        self._rules = self._table.rules(self.config.n_layer)
        self._keys = tables.resolve(
            self._table, self.config.n_layer, checkpoint.shapes, checkpoint.where, checkpoint.absent
        )
        self._rules |= {rule.key: rule for rule in self._table.head if rule.key in self._keys}
        self._masked_faults: list[str] | None = None  # None where there is no such head
        if self._table.masked and self._table.masked.is_in(self._table.prefix, checkpoint.shapes):
            found, self._masked_faults = self._table.masked.find(self._table.prefix, checkpoint.shapes)
            if not self._masked_faults:
                taken = set(self._keys.values())  # a decoder may be stored in place of the token embedding
                self._keys |= {name: key for name, key in found.items() if key not in taken}
        for key in self._keys.values():
            if (stored := checkpoint.dtypes[key]) not in FLOATS:
                expected = ", ".join(FLOATS)
                raise CheckpointError(f"{checkpoint.file_of(key)}: {key} is {stored}, expected one of {expected}")
        # Tensors and layers that are checked, so that each is warned of once.
        self._checked: set[str] = set()
        self._checked_layers: set[int] = set()

    @property
    def names(self) -> list[str]:
        """The canonical names of all tensors of the model, in the order of the forward pass."""
        return [tensor.name for tensor in self.inventory()]

    @property
    def nbytes(self) -> int:
        """Size of all tensors of the model in bytes, in `dtype`; a tied output embedding counts if it is stored."""
        return sum(math.prod(rule.shape) for rule in self._rules.values()) * self.dtype.itemsize

    def inventory(self) -> list[TensorInfo]:
        """Returns every tensor of the model, once, in the order of the forward pass."""
        table = self._table

        def info(rule: tables.Rule, layer: int | None) -> TensorInfo:
            return TensorInfo(rule.key.format(layer=layer), _category(rule), layer, rule.shape)

        layers = [info(rule, layer) for layer in range(self.config.n_layer) for rule in table.layer]
        final = (*table.final, *self._head)
        return [*(info(r, None) for r in table.embed), *layers, *(info(r, None) for r in final)]

    @functools.cached_property
    def _head(self) -> tuple[tables.Rule, ...]:
        """The rule of the output embedding, if it differs from the token embedding.

        If a file stores both although config.json ties them, their values decide, as in transformers. They are compared
        once, when the output embedding is first used or counted, and only up to the first difference.
        """
        return self._with_own_values(self._table.head)

    def _with_own_values(self, rules: tuple[tables.Rule, ...]) -> tuple[tables.Rule, ...]:
        """Returns the rule of an output embedding; none if it equals the token embedding."""
        head = tuple(rule for rule in rules if rule.key in self._keys)
        if not head or not self._table.tied:
            return head
        mine, other = (self._keys[rule.key] for rule in (*head, self._table.embed[0]))
        one, two = self.checkpoint.tensor(mine), self.checkpoint.tensor(other)
        pieces = (slice(start, start + ROWS) for start in range(0, len(one), ROWS))
        if all(np.array_equal(self._cast(one[piece]), self._cast(two[piece])) for piece in pieces):
            return ()
        message = (
            f"{self.checkpoint.file_of(mine)}: {mine} differs from {other}, though config.json ties them; logits use "
            f'{mine}, as in transformers; set "tie_word_embeddings": false in config.json, or remove {mine}'
        )
        warnings.warn(printable(message), JaxqkvWarning, stacklevel=3)
        return head

    @functools.cached_property
    def masked_head(self) -> tuple[tables.Rule, ...]:
        """The rules of the head that predicts masked tokens; none if the checkpoint has no part of it.

        Raises:
          CheckpointError: if part of it is missing or has a wrong shape.
        """
        masked = self._table.masked
        if masked is None or self._masked_faults is None:
            return ()
        faults = list(self._masked_faults)
        if not self._table.tied and masked.decoder.key not in self._keys:
            faults.append(f"missing {masked.decoder.key}, which config.json does not tie to the token embedding")
        if faults:
            where = self.checkpoint.where
            raise CheckpointError(f"{where}: the head that predicts masked tokens is broken: {listed(faults, '; ')}")
        return (*masked.rules, *self._with_own_values((masked.decoder,)))

    @property
    def tied(self) -> bool:
        """Whether logits are made with the token embedding; False too if there are no logits."""
        return bool(self._table.head) and not self._head

    @functools.cached_property
    def left_out(self) -> list[str]:
        """Keys of the files' tensors that belong to other heads and are not read."""
        return tables.left_out(self._table, self.checkpoint.shapes.keys(), self._keys.values())

    def parameters(self) -> dict[str, int]:
        """Returns the number of parameters by category."""
        sizes = dict.fromkeys(CATEGORIES.values(), 0)
        for tensor in self.inventory():
            sizes[tensor.category] += tensor.parameters
        return sizes

    @property
    def stored(self) -> list[str]:
        """Dtypes of the model's tensors in the files, in safetensors' names."""
        return sorted({self.checkpoint.dtypes[key] for key in self._keys.values()})

    def facts(self) -> dict[str, Any]:
        """Returns all that is known of the checkpoint without reading a tensor, for programs."""
        config, checkpoint = self.config, self.checkpoint
        return {
            **checkpoint.identity(),
            "config": {"model_type": config.model_type, **dataclasses.asdict(config), "head_dim": config.head_dim},
            "parameters": self.parameters() | {"all": sum(self.parameters().values())},
            "stored as": self.stored,
            "left out": self.left_out,
            "bytes": {str(self.dtype): self.nbytes},
            "tokenizer": checkpoint.tokenizer_files,
        }

    def summary(self) -> dict[str, str]:
        """Returns the same for people, as `jaxqkv info` prints it."""
        config, sizes = self.config, self.parameters()
        modules = Counter(printable(key.removeprefix(self._table.prefix).split(".")[0]) for key in self.left_out)
        heads = listed([f"{name} ({count} {plural(count, 'tensor')})" for name, count in modules.items()])
        return {
            "checkpoint": self.checkpoint.spec,
            "architecture": config.architecture,
            "width": f"{config.n_embd}, MLP {config.n_inner} ({config.activation})",
            "vocabulary": config.vocabulary,
            "parameters": f"{sum(sizes.values()):,}",
            "  embeddings": f"{sum(size for name, size in sizes.items() if name.endswith('Embedding')):,}",
            "  attention": f"{sizes['Attention']:,}",
            "  MLP": f"{sizes['Feed Forward']:,}",
            "  norms": f"{sizes['Layer Norm']:,}",
            "stored as": f"{', '.join(self.stored)}, {showing.megabytes(self.nbytes)} MB in {self.dtype}",
            **({"left out": heads} if heads else {}),
            **self.checkpoint.summary(),
        }

    def __repr__(self) -> str:
        size = f"{sum(self.parameters().values()):,} parameters, {showing.megabytes(self.nbytes)} MB in {self.dtype}"
        return f"Weights of {self.checkpoint.spec}: {self.config.architecture}; {size}"

    def _repr_html_(self) -> str:
        """Returns a table with a row for each tensor; equal tensors of all layers share a row with their number."""
        rows = []
        for rules, count in (
            (self._table.embed, 1),
            (self._table.layer, self.config.n_layer),
            ((*self._table.final, *self._head), 1),
        ):
            for rule in rules:
                name = rule.key.format(layer="*") + (f" (× {count})" if "{layer}" in rule.key else "")
                size = count * showing.nbytes(rule.shape, self.dtype)
                rows.append((name, _category(rule), str(list(rule.shape)), str(self.dtype), showing.megabytes(size)))
        return showing.table(repr(self), ("tensor", "part", "shape", "dtype", "MB"), rows)

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads a tensor by name, with or without the file's prefix, in the shape that the file has.

        Raises:
          JaxqkvError: when there is no tensor of that name.
        """
        key = self._keys.get(tables.canonical(name, self._table.prefix), name)
        if key not in self.checkpoint.shapes:
            raise JaxqkvError(f"{self.checkpoint.spec}: no tensor named {name}; `names` lists them")
        return self._tensor(key)

    def _tensor(self, key: str, check: bool = True) -> np.ndarray:
        stored = self.checkpoint.tensor(key)
        if check:
            self._warn_of({key: stored})
        return self._cast(stored)

    def _cast(self, tensor: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # a value too large for `dtype` becomes infinite, and is warned of
            return read_only(tensor.astype(self.dtype, copy=False))

    def _warn_of(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Warns of the tensors that have NaN or infinite values, once for each."""
        found: dict[str, str] = {}
        for key in () if self.checkpoint.finite else tensors.keys() - self._checked:
            tensor = tensors[key]
            if broken := count_broken(self._cast(tensor) if tensor.itemsize > self.dtype.itemsize else tensor):
                found[key] = f"{key} ({broken:,} of {tensor.size:,})"
        self._checked |= tensors.keys()
        if found:
            files = listed(list(dict.fromkeys(self.checkpoint.file_of(key) for key in found)))
            what = listed([found[key] for key in tensors if key in found])
            warnings.warn(printable(f"{files}: NaN or infinite values in {what}"), JaxqkvWarning, stacklevel=3)

    def are_checked(self, layers: Iterable[int]) -> bool:
        """Tells whether the values of these layers are checked already, or cannot be wrong."""
        return self.checkpoint.finite or self._checked_layers.issuperset(layers)

    def check_layers(self, layers: Iterable[int]) -> None:
        """Warns of the tensors in these layers that have NaN or infinite values, once for each."""
        fresh = sorted(set(layers) - self._checked_layers)
        keys = [self._keys[rule.key.format(layer=layer)] for layer in fresh for rule in self._table.layer]
        self._warn_of({key: self.checkpoint.tensor(key) for key in keys})
        self.trust_layers(layers)

    def trust_layers(self, layers: Iterable[int]) -> None:
        """Marks layers as checked: what was computed from them is finite."""
        self._checked_layers.update(layers)

    @property
    def positions(self) -> Float[np.ndarray, "pos embed"]:
        """The position embedding as the file has it."""
        return self.W_pos

    def _rule(self, layer: int, place: str) -> tables.Rule:
        if not 0 <= layer < self.config.n_layer:
            raise JaxqkvError(
                f"{self.checkpoint.spec}: no layer {layer}; its layers are 0 to {self.config.n_layer - 1}"
            )
        return next(rule for rule in self._table.layer if place in rule.places)

    def embed(self, tokens: Int[np.ndarray, " row"] | None = None) -> dict[str, Any]:
        """Reads the parameters of the embedding module; with `tokens`, only those rows of the token embedding.

        Returns nested dicts in Flax's layout, as `forward` takes them; so do `layer` and `final`.
        """
        if tokens is None:
            return self._read(self._table.embed)
        rule, *others = self._table.embed
        whole = self.checkpoint.tensor(self._keys[rule.key])
        rows = self._cast(whole[tokens])
        if count_broken(rows):
            self._warn_of({self._keys[rule.key]: whole})
        return self._read(others) | tables.nest(rule.apply(rows))

    def layer(self, layer: int) -> dict[str, Any]:
        """Reads the parameters of one block, without checking their values."""
        return self._read(self._table.layer, layer, check=False)

    def final(self, unembedding: bool = True) -> dict[str, Any]:
        """Reads the parameters after the last block; none for BERT without a head that predicts masked tokens.

        Args:
          unembedding: whether to include what makes logits: the output embedding, if it differs from the token
            embedding, and the head that predicts masked tokens.
        """
        masked = () if self._masked_faults else self.masked_head
        return self._read((*self._table.final, *((*self._head, *masked) if unembedding else ())))

    def _read(self, rules: Sequence[tables.Rule], layer: int | None = None, check: bool = True) -> dict[str, Any]:
        flat: dict[str, np.ndarray] = {}
        for rule in rules:
            flat |= rule.apply(self._tensor(self._keys[rule.key.format(layer=layer)], check))
        return tables.nest(flat)


def _category(rule: tables.Rule) -> str:
    """Returns the category of a tensor."""
    return next(category for start, category in CATEGORIES.items() if rule.places[0].startswith(start))


def count_broken(tensor: Shaped[np.ndarray, "..."]) -> int:
    """Counts the values that are NaN or infinite, at the speed of memory if there are none.

    The sum of squares, which BLAS computes, is finite if all values are; only otherwise are they checked one by one.
    For numbers of 16 bits NumPy's arithmetic is slow, so their bits are compared.
    """
    if tensor.dtype.name in EXPONENTS:
        exponent = np.uint16(EXPONENTS[tensor.dtype.name])
        return int(((tensor.view(np.uint16) & exponent) == exponent).sum())
    flat = tensor.reshape(-1)
    with np.errstate(all="ignore"):
        if np.isfinite(flat @ flat):
            return 0
    return int(tensor.size - np.isfinite(flat).sum())
