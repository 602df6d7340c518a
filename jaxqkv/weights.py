"""`Weights`: a checkpoint's tensors by name and by role, each read when it is asked for."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxqkv import weight_map
from jaxqkv.checkpoint import Checkpoint
from jaxqkv.errors import CheckpointError, JaxqkvError

# A place in the parameters begins with one of these → what the tensor is for, in the order of reports.
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


class TensorInfo(NamedTuple):
    """One tensor of a model: its name, what it is for, its layer (None outside of layers) and shape."""

    name: str
    category: str
    layer: int | None
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return int(np.prod(self.shape))


class Weights:
    """The tensors of a checkpoint, in `dtype` (float32 unless told otherwise).

    Nothing is kept: every call reads from the file again, and what is stored in `dtype` already
    comes as a read-only view of the mapped file, without a copy.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: Any = np.float32):
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.dtype = np.dtype(dtype)
        self._table = weight_map.table(self.config)
        self._rules = self._table.rules(self.config.n_layer)
        self._keys = weight_map.resolve(self.config, checkpoint.shapes, checkpoint.where)

    @property
    def names(self) -> list[str]:
        """The canonical names of all tensors of the model, in the order of the forward pass."""
        return list(self._rules)

    @property
    def nbytes(self) -> int:
        """Bytes that all tensors of the model take in `dtype`."""
        return sum(int(np.prod(rule.shape)) for rule in self._rules.values()) * self.dtype.itemsize

    def inventory(self) -> list[TensorInfo]:
        """Every tensor of the model, once, in the order of the forward pass."""
        table = self._table

        def info(rule: weight_map.Rule, layer: int | None) -> TensorInfo:
            category = next(c for start, c in CATEGORIES.items() if rule.places[0].startswith(start))
            return TensorInfo(rule.key.format(layer=layer), category, layer, rule.shape)

        layers = [info(rule, layer) for layer in range(self.config.n_layer) for rule in table.layer]
        return [*(info(r, None) for r in table.embed), *layers, *(info(r, None) for r in table.final)]

    def summary(self) -> dict[str, str]:
        """What `jaxqkv info` prints: architecture, parameters by part, files, dtype, tokenizer."""
        config = self.config
        sizes = dict.fromkeys(CATEGORIES.values(), 0)
        for tensor in self.inventory():
            sizes[tensor.category] += tensor.parameters
        dtypes = sorted({self.checkpoint.dtypes[key] for key in self._keys.values()})
        return {
            "checkpoint": self.checkpoint.spec,
            "architecture": f"{config.model_type}, {config.n_layer} layers, {config.n_head} heads of {config.head_dim}",
            "width": f"{config.n_embd}, MLP {config.n_inner} ({config.activation})",
            "vocabulary": f"{config.vocab_size} tokens, {config.n_positions} positions",
            "parameters": f"{sum(sizes.values()):,}",
            "  embeddings": f"{sum(size for name, size in sizes.items() if name.endswith('Embedding')):,}",
            "  attention": f"{sizes['Attention']:,}",
            "  MLP": f"{sizes['Feed Forward']:,}",
            "  norms": f"{sizes['Layer Norm']:,}",
            "stored as": f"{', '.join(dtypes)}, {self.nbytes / 2**20:,.1f} MiB in {self.dtype}",
            **self.checkpoint.summary(),
        }

    def __getitem__(self, name: str) -> np.ndarray:
        """A tensor by name, with or without the file's prefix, in the shape that the file has."""
        key = self._keys.get(weight_map.canonical(name, self._table.prefix), name)
        if key not in self.checkpoint.shapes:
            raise JaxqkvError(f"{self.checkpoint.spec}: no tensor named {name}; `names` lists them")
        return self.checkpoint.tensor(key).astype(self.dtype, copy=False)

    def W_Q(self, layer: int, by_head: bool = False) -> Float[np.ndarray, "..."]:
        """Query weights `[embed, embed]`; `[head, embed, head_dim]` by head. x @ W_Q gives q."""
        return self._projection("q", layer, by_head)

    def W_K(self, layer: int, by_head: bool = False) -> Float[np.ndarray, "..."]:
        """Key weights, shaped as `W_Q`."""
        return self._projection("k", layer, by_head)

    def W_V(self, layer: int, by_head: bool = False) -> Float[np.ndarray, "..."]:
        """Value weights, shaped as `W_Q`."""
        return self._projection("v", layer, by_head)

    def W_O(self, layer: int, by_head: bool = False) -> Float[np.ndarray, "..."]:
        """Output projection `[embed, embed]`; `[head, head_dim, embed]` by head. z @ W_O gives attn_out."""
        matrix = self._part(layer, "attn/o/kernel")
        return matrix.reshape(self.config.n_head, self.config.head_dim, -1) if by_head else matrix

    @property
    def positions(self) -> Float[np.ndarray, "pos embed"]:
        """The position embeddings."""
        return next(self[t.name] for t in self.inventory() if t.category == "Positional Embedding")

    def W_QKV(self, layer: int) -> Float[np.ndarray, "embed three_embed"]:
        """W_Q, W_K and W_V side by side: GPT-2's `c_attn` as it is, joined for BERT."""
        rule = self._rule(layer, "attn/q/kernel")
        if len(rule.places) == 3:
            return self[rule.key.format(layer=layer)]
        return np.concatenate([self.W_Q(layer), self.W_K(layer), self.W_V(layer)], axis=1)

    def _projection(self, which: str, layer: int, by_head: bool) -> np.ndarray:
        matrix = self._part(layer, f"attn/{which}/kernel")
        if not by_head:
            return matrix
        return matrix.reshape(-1, self.config.n_head, self.config.head_dim).swapaxes(0, 1)

    def _rule(self, layer: int, place: str) -> weight_map.Rule:
        if not 0 <= layer < self.config.n_layer:
            raise JaxqkvError(
                f"{self.checkpoint.spec}: no layer {layer}; its layers are 0 to {self.config.n_layer - 1}"
            )
        return next(rule for rule in self._table.layer if place in rule.places)

    def _part(self, layer: int, place: str) -> np.ndarray:
        rule = self._rule(layer, place)
        return rule.apply(self[rule.key.format(layer=layer)])[place]

    def embed(self, tokens: Int[np.ndarray, " row"] | None = None) -> dict[str, Any]:
        """Parameters of the embedding module; of the token embedding only the rows of `tokens`, if given."""
        if tokens is None:
            return self._read(self._table.embed)
        rule, *others = self._table.embed
        rows = self.checkpoint.tensor(self._keys[rule.key])[tokens].astype(self.dtype, copy=False)
        return self._read(others) | weight_map.nest(rule.apply(rows))

    def layer(self, layer: int) -> dict[str, Any]:
        """Parameters of one block."""
        return self._read(self._table.layer, layer)

    def final(self) -> dict[str, Any]:
        """Parameters of what comes after the last block; empty for BERT."""
        return self._read(self._table.final)

    def _read(self, rules: Sequence[weight_map.Rule], layer: int | None = None) -> dict[str, Any]:
        flat = {}
        for rule in rules:
            flat |= rule.apply(self[rule.key.format(layer=layer)])
        return weight_map.nest(flat)


def tensors_from_params(params: dict[str, Any], config: Any) -> dict[str, np.ndarray]:
    """The inverse of reading: canonical key → tensor, from parameters as `forward` takes them."""

    def pick(tree: dict[str, Any], rule: weight_map.Rule) -> np.ndarray:
        parts = []
        for place in rule.places:
            leaf = tree
            for step in place.split("/"):
                leaf = leaf[step]
            parts.append(np.asarray(leaf))
        tensor = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        return tensor.T if rule.transpose else tensor

    table = weight_map.table(config)
    if len(params["layers"]) != config.n_layer:
        raise CheckpointError(f"parameters have {len(params['layers'])} layers, the config says {config.n_layer}")
    tensors = {rule.key: pick(params["embed"], rule) for rule in table.embed}
    for index, layer in enumerate(params["layers"]):
        tensors |= {rule.key.format(layer=index): pick(layer, rule) for rule in table.layer}
    return tensors | {rule.key: pick(params["final"], rule) for rule in table.final}
