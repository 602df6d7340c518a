"""The PyTorch path as somebody who knows it well would write it: vectorised, in inference mode, no logits.

The same functions as in `torch_notebook.py`, with the same results.
"""

import torch


@torch.inference_mode()
def qkv(model, ids, mask):
    """Q, K and V of every layer, from the base model, which is not run beyond the last projection."""
    base = model.base_model
    kept = {}

    class Done(Exception):
        pass

    def hook(name, last=False):
        def keep(module, inputs, output):
            kept[name] = output
            if last:
                raise Done

        return keep

    handles = []
    if model.config.model_type == "gpt2":
        modules = [(block.attn.c_attn,) for block in base.h]
    else:
        modules = [(a.query, a.key, a.value) for a in (block.attention.self for block in base.encoder.layer)]
    for layer, parts in enumerate(modules):
        for part, module in enumerate(parts):
            last = layer == len(modules) - 1 and part == len(parts) - 1
            handles.append(module.register_forward_hook(hook((layer, part), last)))
    try:
        base(ids, attention_mask=mask)
    except Done:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if model.config.model_type == "gpt2":
        return torch.stack([kept[layer, 0].unflatten(-1, (3, -1)).movedim(-2, 0) for layer in range(len(modules))])
    return torch.stack([torch.stack([kept[layer, part] for part in range(3)]) for layer in range(len(modules))])


def _densities(samples, edges):
    edges = torch.as_tensor(edges, dtype=torch.float32)
    return torch.stack([torch.histogram(sample.flatten(), edges, density=True).hist for sample in samples])


@torch.inference_mode()
def last_token_densities(q, k, edges):
    """One einsum over all pairs of heads."""
    scores = torch.einsum("hd,gpd->hgp", q[:, -1], k)[:, :, 1:-1] / q.shape[-1] ** 0.5
    same = torch.eye(len(q), dtype=torch.bool)
    return _densities((scores[same], scores[~same]), edges)


@torch.inference_mode()
def causal_densities(q, k, edges):
    """One batched product and softmax."""
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
    pattern = torch.softmax(scores, dim=-1)
    diagonal = torch.diagonal(pattern, dim1=1, dim2=2)
    return _densities((pattern[:, -1, :-1], diagonal[:, 1:], diagonal[:, :1]), edges)


@torch.inference_mode()
def head_pair_densities(w, n_head, edges):
    """One product of all columns, and two masks."""
    unit = w / torch.linalg.norm(w, dim=0, keepdim=True)
    cosine = unit.T @ unit
    head = torch.arange(w.shape[1]) // (w.shape[1] // n_head)
    same = head[:, None] == head[None, :]
    return _densities((cosine[same.triu(1)], cosine[head[:, None] < head[None, :]]), edges)


@torch.inference_mode()
def group_densities(samples, edges):
    """One product, its blocks taken apart."""
    x = samples - samples.mean(dim=0, keepdim=True)
    x = x / torch.linalg.norm(x, dim=0, keepdim=True)
    width = x.shape[1] // 3
    blocks = (x.T @ x).view(3, width, 3, width)
    upper = torch.ones(width, width, dtype=torch.bool).triu(1)
    pairs = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
    return _densities([blocks[a, :, b][upper] if a == b else blocks[a, :, b] for a, b in pairs], edges)


@torch.inference_mode()
def column_cosine_moments(w):
    """One product and a mask."""
    unit = w / torch.linalg.norm(w, dim=0, keepdim=True)
    values = (unit.T @ unit)[torch.ones(w.shape[1], w.shape[1], dtype=torch.bool).triu(1)]
    return torch.stack([values.mean(), values.std()])


@torch.inference_mode()
def binned_moments(sums, scores, edges):
    """Bins found once; sums and squares about each layer's mean by one product with the one-hot bins."""
    edges = torch.as_tensor(edges, dtype=sums.dtype)
    index = (torch.searchsorted(edges, sums.flatten(), right=True) - 1).clamp(max=len(edges) - 2)
    bins = torch.nn.functional.one_hot(index, len(edges) - 1).float()
    values = scores.flatten(1)
    centre = values.mean(dim=1, keepdim=True)
    values = values - centre
    count = bins.sum(dim=0)
    mean, square = values @ bins / count, values**2 @ bins / count
    return torch.stack([mean + centre, (square - mean**2).clamp(min=0).sqrt()], dim=1)


@torch.inference_mode()
def principal_components(w):
    """Through the smaller Gram matrix."""
    z = (w - w.mean(dim=0)) / w.std(dim=0, correction=0)
    values = torch.linalg.eigvalsh(z @ z.T).flip(0).clamp(min=0)
    return values / values.sum()


@torch.inference_mode()
def ks_normal(w):
    """One sort."""
    values = w.flatten().sort().values
    normal = torch.special.ndtr((values - w.mean()) / w.std(correction=0))
    step = torch.arange(len(values), dtype=torch.float32)
    return torch.maximum(((step + 1) / len(values) - normal).max(), (normal - step / len(values)).max())[None]
