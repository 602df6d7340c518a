"""Functions that the studies' baselines share."""

import contextlib
import json
from pathlib import Path

import numpy as np
import torch

from baselines.tuned import Done


def histogram(sample, bins, density=True):
    """Returns heights and edges of a histogram; zeros for an empty sample."""
    heights, edges = np.histogram(sample, bins=bins, density=False)
    return (heights / max(heights.sum(), 1) / np.diff(edges) if density else heights), edges


def nearest(index, size, seed_size):
    """Returns an index of GPT-2's, or the same fraction of a smaller size."""
    return index if index < size else index * size // seed_size


def shown_layer(wanted, layers):
    """Returns the layer that a figure shows: the study's, or the middle one of a shallower model."""
    return wanted if wanted < layers else layers // 2


def qkv_by_layer(model, ids, mask=None):
    """Returns the outputs of every layer's `c_attn` for the notebook side, from one pass of the whole model."""
    kept = {}
    handles = [
        block.attn.c_attn.register_forward_hook(
            lambda module, inputs, output, layer=layer: kept.__setitem__(layer, output.detach().cpu())
        )
        for layer, block in enumerate(model.transformer.h)
    ]
    with torch.no_grad():
        model(input_ids=ids.to(model.device), attention_mask=None if mask is None else mask.to(model.device))
    for handle in handles:
        handle.remove()
    return kept


class Weights:
    """Single tensors of a GPT-2 checkpoint for the tuned side, read straight onto the device."""

    def __init__(self, folder, device):
        from safetensors import safe_open

        self.config = json.loads((Path(folder) / "config.json").read_text())
        self.layers, self.width, self.n_head = (self.config[name] for name in ("n_layer", "n_embd", "n_head"))
        self.device = device
        self.file = safe_open(next(Path(folder).glob("*.safetensors")), "pt", device=str(device))
        self.keys = {key.removeprefix("transformer."): key for key in list(self.file.keys())}

    def __getitem__(self, name):
        return self.file.get_tensor(self.keys[name]).float()

    def size(self, name):
        return int(np.prod(self.file.get_slice(self.keys[name]).get_shape()))

    def attention(self, layer):
        return self[f"h.{layer}.attn.c_attn.weight"]


def host(tree):
    """Returns tensors as NumPy arrays, in nested dicts and tuples."""
    if isinstance(tree, dict):
        return {name: host(each) for name, each in tree.items()}
    if isinstance(tree, tuple):
        return tuple(map(host, tree))
    return tree.cpu().numpy() if isinstance(tree, torch.Tensor) else np.asarray(tree)


def freedman_diaconis(sample, density=True):
    """Returns NumPy's histogram; PyTorch has nothing faster for one sample."""
    return np.histogram(sample.cpu().numpy().ravel(), bins="fd", density=density)


def run_layers(model, modules, ids, mask, reduce):
    """Returns `reduce(layer, output)` of one module of each layer for the tuned side; the last hook ends the pass."""
    results = [None] * len(modules)

    def hook(layer):
        def keep(module, inputs, output):
            results[layer] = reduce(layer, output)
            if layer == len(modules) - 1:
                raise Done

        return keep

    handles = [module.register_forward_hook(hook(layer)) for layer, module in enumerate(modules)]
    with contextlib.suppress(Done):
        model(ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return results
