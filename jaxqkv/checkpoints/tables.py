"""Tables of tensors: checkpoint key → shape, place in the parameters, and transform.

Each architecture has one. Its keys are canonical: without the prefix `transformer.` or `bert.`, and `weight` and `bias`
for norms. `resolve` maps the keys of a file to them, each exactly once, or lists everything that is wrong in one error.
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
    """The rule for one tensor of a checkpoint.

    `key` has `{layer}` in the place of the layer's number. `places` are paths in the parameters; a tensor with several
    is cut along its last axis into equal pieces. `transpose` is for PyTorch's `[out, in]`. `init` says how fresh
    weights are initialised.
    """

    key: str
    shape: tuple[int, ...]
    places: tuple[str, ...]
    transpose: bool = False
    init: Init = "normal"

    def apply(self, tensor: Shaped[np.ndarray, "..."]) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Returns place → array, as views of `tensor`, so that the caller makes the only copy."""
        if self.transpose:
            tensor = tensor.T
        return dict(zip(self.places, np.split(tensor, len(self.places), axis=-1), strict=True))


@dataclasses.dataclass(frozen=True)
class MaskedHead:
    """The rules of the head that predicts masked tokens; a checkpoint has all of it or nothing.

    Attributes:
      rules: rules of the part before the output embedding, and of its bias.
      decoder: rule of an output embedding that is not the token embedding.
      bias: other key that the bias may be stored under.
    """

    rules: tuple[Rule, ...]
    decoder: Rule
    bias: str

    def is_in(self, prefix: str, shapes: Mapping[str, Sequence[int]]) -> bool:
        """Tells whether a checkpoint has any part of the head other than an output embedding."""
        names = {canonical(key, prefix) for key in shapes}
        return any(rule.key in names for rule in self.rules)

    def find(self, prefix: str, shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, str], list[str]]:
        """Returns canonical key → the file's key for what is there, and what is missing or has a wrong shape."""
        names = {canonical(key, prefix): key for key in shapes}
        if self.bias in names:  # transformers uses this one if a file has both
            names[self.rules[-1].key] = names[self.bias]
        found = {rule.key: names[rule.key] for rule in (*self.rules, self.decoder) if rule.key in names}
        wrong = [f"missing {rule.key}" for rule in self.rules if rule.key not in found]
        for rule in (*self.rules, self.decoder):
            if rule.key in found and tuple(shapes[found[rule.key]]) != rule.shape:
                wrong.append(f"wrong shape {found[rule.key]} {list(shapes[found[rule.key]])}, not {list(rule.shape)}")
        return found, wrong


@dataclasses.dataclass(frozen=True)
class Table:
    """The rules of one checkpoint, by part of the parameters.

    Attributes:
      embed, layer, final: rules of the backbone; every tensor is needed.
      head: rules of the output embedding; needed unless it is `tied` to the token embedding.
      tied: whether config.json ties them.
      prefix: prefix of the backbone's keys in the files of models with a head.
      buffers, heads: regular expressions for canonical keys that are not needed: constants, other heads.
      stand_ins: key of a tied tensor → the other key that it may be stored under.
      masked: head that predicts masked tokens, if the architecture can have one.
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
        """Returns canonical key (with layer number) → rule for all needed tensors, in the order of the forward pass."""
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
    """Returns the rules of a linear map stored `[in, out]`, as in GPT-2; `places` are side by side in it."""
    return (
        Rule(f"{key}.weight", (n_in, n_out), tuple(f"{place}/kernel" for place in places), init=init),
        Rule(f"{key}.bias", (n_out,), tuple(f"{place}/bias" for place in places), init="zeros"),
    )


def linear(key: str, n_in: int, n_out: int, place: str) -> tuple[Rule, Rule]:
    """Returns the rules of a linear map stored `[out, in]`, as in PyTorch."""
    return (
        Rule(f"{key}.weight", (n_out, n_in), (f"{place}/kernel",), transpose=True),
        Rule(f"{key}.bias", (n_out,), (f"{place}/bias",), init="zeros"),
    )


def masked_head(dense: str, norm_key: str, decoder: str, bias: str, sizes: tuple[int, int]) -> MaskedHead:
    """Returns the rules of a head (dense map, norm, output embedding), given its keys, width and vocabulary."""
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
    """Returns the canonical form of a file's key."""
    key = key.removeprefix(prefix)
    return re.sub(r"(LayerNorm)\.(gamma|beta)$", lambda m: f"{m[1]}.{'weight' if m[2] == 'gamma' else 'bias'}", key)


def resolve(
    known: Table,
    n_layer: int,
    shapes: Mapping[str, Sequence[int]],
    where: str,
    absent: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Maps canonical keys to the file's keys, for every needed tensor and for a stored output embedding.

    If the backbone's keys have the prefix, a key without it belongs to a head and is left out.

    Args:
      known: table of the checkpoint's architecture.
      n_layer: number of layers in its config.
      shapes: shape of every tensor in the file(s), by the file's key.
      where: name of the checkpoint, for error messages.
      absent: file's key of a missing tensor that an index names → why it is missing.

    Raises:
      CheckpointError: listing the first dozen of all missing, unexpected, repeated and wrongly shaped keys.
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
    missing: dict[str, list[str]] = {}  # by the reason, which all tensors of a missing file share
    for name, rule in needed.items():
        if name not in found:
            missing.setdefault(reasons.get(name, ""), []).append(f"{name} {list(rule.shape)}")
    problems += [f"missing {name}" for name in missing.pop("", [])]
    problems += [f"missing {listed(each)} ({reason})" for reason, each in missing.items()]
    if problems:
        raise CheckpointError(f"{where}: tensors do not fit config.json: {listed(sorted(problems), '; ')}")
    return found


def stands_in(known: Table, n_layer: int, shapes: Mapping[str, Sequence[int]], where: str) -> bool:
    """Tells whether a tied tensor is stored only under its other name; arguments and errors as for `resolve`."""
    found = resolve(known, n_layer, shapes, where)
    return any(canonical(found[name], known.prefix) == other for name, other in known.stand_ins.items())


def left_out(known: Table, keys: Collection[str], used: Collection[str]) -> list[str]:
    """Returns the keys of a file that are neither `used` nor constants: those of its heads."""
    others = (key for key in keys if key not in set(used))
    return [key for key in others if not re.fullmatch(known.buffers, canonical(key, known.prefix))]


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turns `{"a/b": x}` into `{"a": {"b": x}}`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
