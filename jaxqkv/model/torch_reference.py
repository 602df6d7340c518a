"""Every attention intermediate from the PyTorch models of `transformers`, through forward hooks.

`jaxqkv verify`, the parity tests and `make_goldens.py` compare with this. Needs the extra `torch`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Bool, Int, Shaped
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2Config, GPT2LMHeadModel

import jaxqkv.checkpoints.config
from jaxqkv.checkpoints import tables
from jaxqkv.checkpoints.checkpoint import Checkpoint, FolderCheckpoint


def load(checkpoint: Checkpoint) -> torch.nn.Module:
    """The checkpoint in float32: a folder as `transformers` reads it itself, fresh weights handed over."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options = {"dtype": torch.float32, "attn_implementation": "eager", "use_safetensors": True}
    options |= {"local_files_only": True, "trust_remote_code": False}
    is_gpt2 = isinstance(checkpoint.config, jaxqkv.checkpoints.config.GPT2Config)
    if isinstance(checkpoint, FolderCheckpoint):
        if is_gpt2:
            return GPT2LMHeadModel.from_pretrained(checkpoint.folder, **options).eval()
        if tables.stands_in(checkpoint.config, checkpoint.shapes, checkpoint.where):
            return BertForMaskedLM.from_pretrained(checkpoint.folder, **options).bert.eval()
        return BertModel.from_pretrained(checkpoint.folder, add_pooling_layer=False, **options).eval()
    model = _untrained(checkpoint.config)
    inner = model.transformer if is_gpt2 else model
    tensors = {key: torch.tensor(checkpoint.tensor(key), dtype=torch.float32) for key in checkpoint.shapes}
    missing, unexpected = inner.load_state_dict(tensors, strict=False)
    if missing or unexpected:
        raise ValueError(f"{checkpoint.spec}: PyTorch's model has other tensors: {missing + unexpected}")
    return model.eval()


def double(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64, where scores that are to be float32 at least are float64: `transformers` refuses them."""
    for module in model.modules():
        if hasattr(module, "reorder_and_upcast_attn"):
            module.reorder_and_upcast_attn = False
    return model.double()


def _untrained(config: jaxqkv.checkpoints.config.Config) -> torch.nn.Module:
    settings = jaxqkv.checkpoints.config.config_to_json(config)
    settings = {key: value for key, value in settings.items() if key not in ("model_type", "architectures")}
    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    if isinstance(config, jaxqkv.checkpoints.config.GPT2Config):
        return GPT2LMHeadModel(GPT2Config(**settings, **dropout, attn_implementation="eager"))
    return BertModel(BertConfig(**settings, attn_implementation="eager"), add_pooling_layer=False)


def build(config: jaxqkv.checkpoints.config.Config, seed: int) -> torch.nn.Module:
    """A PyTorch model of that architecture whose weights, biases and norms are all random."""
    model = _untrained(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = name.endswith("weight") and parameter.ndim == 1
            parameter.copy_(1 + 0.3 * noise if is_scale else config.initializer_range * noise)
    return model.eval()


def intermediates(
    model: torch.nn.Module, ids: Int[np.ndarray, "batch pos"], mask: Bool[np.ndarray, "batch pos"]
) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Arrays named and shaped as `jaxqkv.Activations`', with `hidden`, and `logits` for GPT-2."""
    is_gpt2 = model.config.model_type == "gpt2"
    n_head = model.config.num_attention_heads
    found: dict[str, list[torch.Tensor]] = {}

    def keep(name: str, pick: Callable[[Any, Any], torch.Tensor]) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: Any, output: Any) -> None:
            found.setdefault(name, []).append(pick(arguments, output).detach())

        return hook

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (n_head, -1)).transpose(1, 2)

    def keep_output(module: torch.nn.Module, name: str, shape: Callable[[Any], torch.Tensor] = lambda x: x) -> Any:
        return module.register_forward_hook(keep(name, lambda arguments, output: shape(output)))

    def keep_input(module: torch.nn.Module, name: str, shape: Callable[[Any], torch.Tensor] = lambda x: x) -> Any:
        return module.register_forward_hook(keep(name, lambda arguments, output: shape(arguments[0])))

    inner = model.transformer if is_gpt2 else model
    handles = [keep_output(inner, "hidden", lambda output: output.last_hidden_state)]
    for block in model.transformer.h if is_gpt2 else model.encoder.layer:
        handles.append(keep_input(block, "resid_pre"))
        if is_gpt2:
            for index, name in enumerate("qkv"):
                part = lambda x, index=index: heads(x.chunk(3, dim=-1)[index])  # noqa: E731
                handles.append(keep_output(block.attn.c_attn, name, part))
            out, mlp = block.attn.c_proj, block.mlp
        else:
            for name, module in zip("qkv", ("query", "key", "value"), strict=True):
                handles.append(keep_output(getattr(block.attention.self, module), name, heads))
            out, mlp = block.attention.output.dense, block.output.dense
        handles += [keep_input(out, "z", heads), keep_output(out, "attn_out"), keep_output(mlp, "mlp_out")]

    attended = torch.tensor(mask).long()
    positions = (attended.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        output = model(
            input_ids=torch.tensor(ids).long(),
            attention_mask=attended,
            position_ids=positions,
            output_attentions=True,
        )
    for handle in handles:
        handle.remove()
    arrays = {name: torch.stack(layers).numpy() for name, layers in found.items()}
    q, k = torch.stack(found["q"]), torch.stack(found["k"])
    scale = q.shape[-1] ** -0.5 if getattr(model.config, "scale_attn_weights", True) else 1.0
    scale = torch.full((len(q), 1, 1, 1, 1), scale, dtype=torch.float64)
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        scale /= torch.arange(1, len(q) + 1).view_as(scale)
    arrays["scores"] = (q @ k.transpose(-1, -2) * scale.to(q.dtype)).numpy()
    arrays["pattern"] = torch.stack(output.attentions).numpy()
    arrays["hidden"] = arrays["hidden"][0]
    return arrays | ({"logits": output.logits.numpy()} if is_gpt2 else {})
