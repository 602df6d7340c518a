"""A PyTorch model of `transformers` whose values are changed by hooks; scores and pattern by their definition."""

import numpy as np
import torch

from jaxqkv.model import torch_reference


def hooked(model, config, ids, mask, change):
    """Returns the final hidden states and logits, if there are any, of a model in float64.

    Args:
      model: from `torch_reference.build`, in float64.
      config: of the same model here.
      ids, mask: of the batch.
      change: of a field's name, a layer's number and its value as an array, returns the value to go on with; None
        where it leaves the field alone.
    """
    about, handles, found = config.counterpart, [], {}
    together = about.q == about.k == about.v
    visible = np.broadcast_to(mask[:, None, :] & mask[:, :, None], (*mask.shape, mask.shape[1]))
    visible = np.tril(visible) if config.causal else visible

    def changed(field, layer, x):
        new = change(field, layer, x.numpy())
        return x if new is None else torch.tensor(new)

    def heads(x):
        return x.unflatten(-1, (config.n_head, -1)).transpose(1, 2)

    def merged(x):
        return x.transpose(1, 2).flatten(-2)

    def on_qkv(names, layer):
        def hook(module, arguments, output):
            parts = output.chunk(len(names), dim=-1)
            for name, part in zip(names, parts, strict=True):
                found[name] = changed(name, layer, heads(part))
            return torch.cat([merged(found[name]) for name in names], dim=-1)

        return hook

    def before_o(layer):
        def hook(module, arguments):
            z = heads(arguments[0])
            scale = float(config.attention_scale(np.int32(layer), np.float64))
            scores = (found["q"] @ found["k"].transpose(-1, -2) * scale).numpy()
            new_scores = change("scores", layer, scores)
            scores = scores if new_scores is None else new_scores
            seen = np.where(visible[:, None], scores, -np.inf)
            largest = np.where(visible.any(-1)[:, None, :, None], seen.max(-1, keepdims=True), 0)
            weights = np.exp(seen - largest)
            pattern = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
            new = change("pattern", layer, pattern)
            by_definition = torch.tensor(pattern if new is None else new) @ found["v"]
            if new is None and new_scores is None:  # the definition is that of transformers; pads are its own business
                real = torch.tensor(mask)[:, None, :, None]
                assert torch.where(real, by_definition - z, 0).abs().max() < 1e-9 * by_definition.abs().max()
            return (merged(changed("z", layer, by_definition)),)

        return hook

    def after(field, layer):
        def hook(module, arguments, output):
            if isinstance(output, tuple):
                return (changed(field, layer, output[0]), *output[1:])
            return changed(field, layer, output)

        return hook

    def before(layer):
        def hook(module, arguments):
            return (changed("resid_pre", layer, arguments[0]), *arguments[1:])

        return hook

    module = torch_reference._module
    for layer, block in enumerate(module(model, about.blocks)):
        handles.append(block.register_forward_pre_hook(before(layer)))
        for names, path in [("qkv", about.q)] if together else zip("qkv", (about.q, about.k, about.v), strict=True):
            handles.append(module(block, path).register_forward_hook(on_qkv(names, layer)))
        handles.append(module(block, about.o).register_forward_pre_hook(before_o(layer)))
        handles.append(module(block, about.o).register_forward_hook(after("attn_out", layer)))
        handles.append(module(block, about.mlp).register_forward_hook(after("mlp_out", layer)))
        handles.append(block.register_forward_hook(after("resid_post", layer)))
    hidden = []
    backbone = module(model, about.backbone)
    handles.append(backbone.register_forward_hook(lambda module, inputs, output: hidden.append(output[0])))
    attended = torch.tensor(mask).long()
    arguments = {"input_ids": torch.tensor(ids).long(), "attention_mask": attended}
    if about.positions:
        arguments["position_ids"] = (attended.cumsum(-1) - 1).clamp(min=0) + config.first_position
    try:
        with torch.no_grad():
            output = model(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    return {"hidden": hidden[0].numpy()} | ({"logits": output.logits.numpy()} if config.has_logits else {})
