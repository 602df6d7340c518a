"""The same models in PyTorch, from `transformers`, for `jaxqkv verify` and the tests to compare with.

An architecture's `counterpart` names their classes and modules. Needs the extra `torch`.
"""

import operator
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import transformers
from jaxtyping import Bool, Int, Shaped

from jaxqkv.architectures.base import Architecture
from jaxqkv.checkpoints import tables
from jaxqkv.checkpoints.checkpoint import Checkpoint
from jaxqkv.checkpoints.folder import FolderCheckpoint


def load(checkpoint: Checkpoint) -> torch.nn.Module:
    """Returns the checkpoint in float32: a folder as `transformers` reads it, fresh weights copied into its model."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = cast(Architecture, checkpoint.config)
    about = config.counterpart
    options = {"dtype": torch.float32, "attn_implementation": "eager", "use_safetensors": True}
    options |= {"local_files_only": True, "trust_remote_code": False}
    if isinstance(checkpoint, FolderCheckpoint):
        table = config.table()
        if about.head_model and tables.stands_in(table, config.n_layer, checkpoint.shapes, checkpoint.where):
            name, path = about.head_model
            whole = getattr(transformers, name).from_pretrained(checkpoint.folder, **options)
            return _module(whole, path).eval()
        return (
            getattr(transformers, about.model).from_pretrained(checkpoint.folder, **about.arguments, **options).eval()
        )
    model = _untrained(config)
    tensors = {key: torch.tensor(checkpoint.tensor(key), dtype=torch.float32) for key in checkpoint.shapes}
    missing, unexpected = _module(model, about.backbone).load_state_dict(tensors, strict=False)
    if missing or unexpected:
        raise ValueError(f"{checkpoint.spec}: PyTorch's model has other tensors: {missing + unexpected}")
    return model.eval()


def double(model: torch.nn.Module) -> torch.nn.Module:
    """Returns the model in float64.

    `reorder_and_upcast_attn` is switched off: `transformers` fails with it in float64, which needs no upcast.
    """
    for module in model.modules():
        if hasattr(module, "reorder_and_upcast_attn"):
            module.reorder_and_upcast_attn = False
    return model.double()


def build(config: Architecture, seed: int) -> torch.nn.Module:
    """Returns a PyTorch model of an architecture whose weights, biases and norms are all random."""
    model = _untrained(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = name.endswith("weight") and parameter.ndim == 1
            parameter.copy_(1 + 0.3 * noise if is_scale else config.initializer_range * noise)
    return model.eval()


def _untrained(config: Architecture) -> torch.nn.Module:
    about = config.counterpart
    settings = {key: value for key, value in config.to_json().items() if key not in ("model_type", "architectures")}
    theirs = getattr(transformers, about.config)(**settings, **about.settings, attn_implementation="eager")
    return getattr(transformers, about.model)(theirs, **about.arguments)


def _module(model: torch.nn.Module, path: str) -> Any:
    return operator.attrgetter(path)(model) if path else model


def intermediates(
    model: torch.nn.Module,
    config: Architecture,
    ids: Int[np.ndarray, "batch pos"],
    mask: Bool[np.ndarray, "batch pos"],
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Returns arrays named and shaped as in `jaxqkv.Activations`, with `hidden`, and `logits` if there are any."""
    about = config.counterpart
    found: dict[str, list[torch.Tensor]] = {}

    def keep(name: str, pick: Callable[[Any, Any], torch.Tensor]) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: Any, output: Any) -> None:
            found.setdefault(name, []).append(pick(arguments, output).detach())

        return hook

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (config.n_head, -1)).transpose(1, 2)

    def keep_output(module: torch.nn.Module, name: str, shape: Callable[[Any], torch.Tensor] = lambda x: x) -> Any:
        return module.register_forward_hook(keep(name, lambda arguments, output: shape(output)))

    def keep_input(module: torch.nn.Module, name: str, shape: Callable[[Any], torch.Tensor] = lambda x: x) -> Any:
        return module.register_forward_hook(keep(name, lambda arguments, output: shape(arguments[0])))

    backbone = _module(model, about.backbone)
    handles = [keep_output(backbone, "hidden", lambda output: output.last_hidden_state)]
    together = about.q == about.k == about.v
    for block in _module(model, about.blocks):
        handles.append(keep_input(block, "resid_pre"))
        handles.append(keep_output(block, "resid_post", lambda out: out[0] if isinstance(out, tuple) else out))
        for index, (name, path) in enumerate(zip("qkv", (about.q, about.k, about.v), strict=True)):
            part = lambda x, index=index: heads(x.chunk(3, dim=-1)[index] if together else x)  # noqa: E731
            handles.append(keep_output(_module(block, path), name, part))
        out, mlp = _module(block, about.o), _module(block, about.mlp)
        handles += [keep_input(out, "z", heads), keep_output(out, "attn_out"), keep_output(mlp, "mlp_out")]

    attended = torch.tensor(mask).long()
    arguments: dict[str, Any] = {"input_ids": torch.tensor(ids).long(), "attention_mask": attended}
    if about.positions:
        arguments["position_ids"] = (attended.cumsum(-1) - 1).clamp(min=0) + config.first_position
    with torch.no_grad():
        output = model(**arguments, output_attentions=True)
    for handle in handles:
        handle.remove()
    arrays = {name: torch.stack(layers).numpy() for name, layers in found.items()}
    q, k = torch.stack(found["q"]), torch.stack(found["k"])
    scales = [float(config.attention_scale(np.int32(layer), np.float64)) for layer in range(len(q))]
    scale = torch.tensor(scales, dtype=torch.float64).to(q.dtype)
    arrays["scores"] = (q @ k.transpose(-1, -2) * scale[:, None, None, None, None]).numpy()
    arrays["pattern"] = torch.stack(output.attentions).numpy()
    arrays["hidden"] = arrays["hidden"][0]
    return arrays | ({"logits": output.logits.numpy()} if config.has_logits else {})
