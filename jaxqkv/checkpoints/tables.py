"""Tables of tensors: checkpoint key → shape, place in the parameters, transform on the way.

Each architecture has one. They speak in canonical keys: no `transformer.` or `bert.` prefix, `weight` and `bias` for
the norms. `resolve` maps the keys of a real file onto them, each exactly once, or lists all that is
wrong in one error.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped

from jaxqkv.errors import CheckpointError, listed

Init = Literal["normal", "zeros", "ones", "residual"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor of a checkpoint.

    `key` holds `{layer}` where the layer's number stands. `places` are paths in the parameters; a
    tensor with several is cut along its last axis in that many equal pieces. `transpose` is for
    PyTorch's `[out, in]`. `init` is how a fresh model fills it.
    """

    key: str
    shape: tuple[int, ...]
    places: tuple[str, ...]
    transpose: bool = False
    init: Init = "normal"

    def apply(self, tensor: Shaped[np.ndarray, "..."]) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Place → array, as views of `tensor`: whoever takes them makes the only copy."""
        if self.transpose:
            tensor = tensor.T
        return dict(zip(self.places, np.split(tensor, len(self.places), axis=-1), strict=True))


@dataclasses.dataclass(frozen=True)
class MaskedHead:
    """The rules of the head that predicts masked tokens, which a checkpoint may have: all of it or nothing.

    Attributes:
      rules: of what comes before the output embedding, and its bias.
      decoder: of an output embedding that is not the token embedding.
      bias: the other key that the bias may be stored under.
    """

    rules: tuple[Rule, ...]
    decoder: Rule
    bias: str

    def is_in(self, prefix: str, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Whether a checkpoint has any of it, but for an output embedding alone."""
        names = {canonical(key, prefix) for key in shapes}
        return any(rule.key in names for rule in self.rules)

    def find(self, prefix: str, shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, str], list[str]]:
        """Returns canonical key → the file's key of what is there, and what is wrong with what is not."""
        names = {canonical(key, prefix): key for key in shapes}
        if self.bias in names:  # which transformers computes with, where a file has both
            names[self.rules[-1].key] = names[self.bias]
        found = {rule.key: names[rule.key] for rule in (*self.rules, self.decoder) if rule.key in names}
        wrong = [f"missing {rule.key}" for rule in self.rules if rule.key not in found]
        for rule in (*self.rules, self.decoder):
            if rule.key in found and tuple(shapes[found[rule.key]]) != rule.shape:
                wrong.append(f"wrong shape {found[rule.key]} {list(shapes[found[rule.key]])}, not {list(rule.shape)}")
        return found, wrong


@dataclasses.dataclass(frozen=True)
class Table:
    """The rules of one checkpoint, by the part of the parameters that they fill.

    Attributes:
      embed, layer, final: of the backbone; every tensor is needed.
      head: of the output embedding; needed unless it is `tied` to the token embedding.
      tied: what config.json says of it.
      prefix: of the backbone's keys in the files of models with a head.
      buffers, heads: regular expressions for canonical keys that are not needed: constants, other heads.
      stand_ins: key of a tied tensor → the other key that it may be stored under.
      masked: the head that predicts masked tokens, of an architecture that may have one.
    """

    embed: tuple[Rule, ...]
    layer: tuple[Rule, ...]
    final: tuple[Rule, ...]
    head: tuple[Rule, ...]
    tied: bool
    prefix: str
    buffers: str
    heads: str
    stand_ins: Mapping[str, str]
    masked: MaskedHead | None = None

    def rules(self, n_layer: int) -> dict[str, Rule]:
        """Canonical key, with the layer filled in → the rule of what is needed, in the order of the forward pass."""
        layers = ((rule.key.format(layer=layer), rule) for layer in range(n_layer) for rule in self.layer)
        head = () if self.tied else self.head
        return {r.key: r for r in self.embed} | dict(layers) | {r.key: r for r in (*self.final, *head)}


def norm(key: str, place: str, width: int) -> tuple[Rule, Rule]:
    """Returns the rules of a layer norm."""
    return (
        Rule(f"{key}.weight", (width,), (f"{place}/scale",), init="ones"),
        Rule(f"{key}.bias", (width,), (f"{place}/bias",), init="zeros"),
    )


def conv1d(key: str, n_in: int, n_out: int, *places: str, init: Init = "normal") -> tuple[Rule, Rule]:
    """Returns the rules of a linear map stored `[in, out]`, as GPT-2's; several places stand side by side in it."""
    return (
        Rule(f"{key}.weight", (n_in, n_out), tuple(f"{place}/kernel" for place in places), init=init),
        Rule(f"{key}.bias", (n_out,), tuple(f"{place}/bias" for place in places), init="zeros"),
    )


def linear(key: str, n_in: int, n_out: int, place: str) -> tuple[Rule, Rule]:
    """Returns the rules of a linear map stored `[out, in]`, as PyTorch's."""
    return (
        Rule(f"{key}.weight", (n_out, n_in), (f"{place}/kernel",), transpose=True),
        Rule(f"{key}.bias", (n_out,), (f"{place}/bias",), init="zeros"),
    )


def masked_head(dense: str, norm_key: str, decoder: str, bias: str, sizes: tuple[int, int]) -> MaskedHead:
    """Returns the rules of a head of dense map, norm and output embedding, from their keys, width and vocabulary."""
    width, vocab = sizes
    return MaskedHead(
        rules=(
            *linear(dense, width, width, "masked/transform"),
            *norm(norm_key, "masked/norm", width),
            Rule(bias, (vocab,), ("masked/bias",), init="zeros"),
        ),
        decoder=Rule(f"{decoder}.weight", (vocab, width), ("masked/decoder/embedding",)),
        bias=f"{decoder}.bias",
    )


def canonical(key: str, prefix: str) -> str:
    """A file's key in the tables' spelling."""
    key = key.removeprefix(prefix)
    return re.sub(r"(LayerNorm)\.(gamma|beta)$", lambda m: f"{m[1]}.{'weight' if m[2] == 'gamma' else 'bias'}", key)


def resolve(
    known: Table,
    n_layer: int,
    shapes: Mapping[str, Sequence[int]],
    where: str,
    absent: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Canonical key → the file's key, for every tensor that the model needs, and for a tied output embedding.

    A key without the prefix, in a file whose backbone has it, is a head's and left out.

    Args:
      known: the table of the checkpoint's architecture.
      n_layer: how many layers its config says.
      shapes: shape of every tensor in the file(s), by the file's key.
      where: the checkpoint's name, for error messages.
      absent: why a tensor that an index names is not there, by the file's key.

    Raises:
      CheckpointError: listing missing, unexpected, repeated and wrongly shaped keys, the first dozen of all.
    """
    needed = known.rules(n_layer)
    allowed = re.compile(f"{known.buffers}|{known.heads}")
    names: dict[str, str] = {}
    problems = []
    for key in shapes:
        name = canonical(key, known.prefix)
        if name in needed and name in names:
            problems.append(f"repeated {key} (also there as {names[name]})")
        names.setdefault(name, key)
    backbone = [key for name, key in names.items() if name in needed and key not in {rule.key for rule in known.head}]
    prefixed = bool(backbone) and all(key.startswith(known.prefix) for key in backbone)
    for name, other in known.stand_ins.items():
        if name not in names and other in names:
            names[name] = names.pop(other)
    wanted = needed | {rule.key: rule for rule in known.head}
    found = {name: key for name, key in names.items() if name in wanted}
    for name, key in found.items():
        if tuple(shapes[key]) != wanted[name].shape:
            problems.append(f"wrong shape {key} {list(shapes[key])}, config says {list(wanted[name].shape)}")
    for name, key in names.items():
        outside = prefixed and not key.startswith(known.prefix)
        if name not in wanted and not outside and not allowed.fullmatch(name):
            problems.append(f"unexpected {key} {list(shapes[key])}")
    reasons = {canonical(key, known.prefix): reason for key, reason in (absent or {}).items()}
    missing: dict[str, list[str]] = {}  # by the reason, as of all that a file would hold which is not there
    for name, rule in needed.items():
        if name not in found:
            missing.setdefault(reasons.get(name, ""), []).append(f"{name} {list(rule.shape)}")
    problems += [f"missing {name}" for name in missing.pop("", [])]
    problems += [f"missing {listed(each)} ({reason})" for reason, each in missing.items()]
    if problems:
        raise CheckpointError(f"{where}: tensors do not fit config.json: {listed(sorted(problems), '; ')}")
    return found


def stands_in(known: Table, n_layer: int, shapes: Mapping[str, Sequence[int]], where: str) -> bool:
    """Whether a tied tensor is stored under its other name alone; arguments and errors as for `resolve`."""
    found = resolve(known, n_layer, shapes, where)
    return any(canonical(found[name], known.prefix) == other for name, other in known.stand_ins.items())


def left_out(known: Table, keys: Collection[str], used: Collection[str]) -> list[str]:
    """Of a file's keys those that are neither `used` nor constants: its heads."""
    others = (key for key in keys if key not in set(used))
    return [key for key in others if not re.fullmatch(known.buffers, canonical(key, known.prefix))]


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a/b": x}` → `{"a": {"b": x}}`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
