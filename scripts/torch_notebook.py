"""The PyTorch path as the studies' notebooks take it: whole models, hooks, loops over heads, NumPy concatenation.

Written from the definitions of the figures, to compare with. Nothing is slowed down: it runs in
`no_grad`, with all threads, and does nothing twice.
"""

import numpy as np
import torch


def qkv(model, ids, mask):
    """Q, K and V of every layer, `[layer, 3, batch, pos, embed]`: hooks on a whole model, logits and all."""
    kept = {}

    def hook(name):
        return lambda module, inputs, output: kept.__setitem__(name, output.detach())

    handles = []
    if model.config.model_type == "gpt2":
        blocks = model.transformer.h
        for layer, block in enumerate(blocks):
            handles.append(block.attn.c_attn.register_forward_hook(hook(layer)))
    else:
        blocks = model.bert.encoder.layer
        for layer, block in enumerate(blocks):
            attention = block.attention.self
            for part, module in enumerate((attention.query, attention.key, attention.value)):
                handles.append(module.register_forward_hook(hook((layer, part))))
    with torch.no_grad():
        model(ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    if model.config.model_type == "gpt2":
        return np.array([[part.numpy() for part in kept[layer].chunk(3, dim=-1)] for layer in range(len(blocks))])
    return np.array([[kept[layer, part].numpy() for part in range(3)] for layer in range(len(blocks))])


def last_token_densities(q, k, edges):
    """`[2, bin]`: the last token's scores within and across heads, from `[head, pos, head_dim]`."""
    within, across = np.array([]), np.array([])
    for a in range(len(q)):
        for b in range(len(k)):
            scores = (k[b] @ q[a, -1] / q.shape[-1] ** 0.5)[1:-1].numpy()
            if a == b:
                within = np.concatenate((within, scores))
            else:
                across = np.concatenate((across, scores))
    return np.stack([np.histogram(sample, edges, density=True)[0] for sample in (within, across)])


def causal_densities(q, k, edges):
    """`[3, bin]`: a causal pattern's last row, its diagonal, and the diagonal's first place."""
    final, others, first = np.array([]), np.array([]), np.array([])
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    for head in range(len(q)):
        scores = q[head] @ k[head].T / q.shape[-1] ** 0.5
        scores[hidden] = -torch.inf
        pattern = torch.softmax(scores, dim=-1)
        diagonal = torch.diag(pattern).numpy()
        final = np.concatenate((final, pattern[-1, :-1].numpy()))
        others = np.concatenate((others, diagonal[1:]))
        first = np.concatenate((first, diagonal[:1]))
    return np.stack([np.histogram(sample, edges, density=True)[0] for sample in (final, others, first)])


def head_pair_densities(w, n_head, edges):
    """`[2, bin]`: column cosines of a matrix within and across its heads."""
    within, across = np.array([]), np.array([])
    heads = w.chunk(n_head, dim=1)
    upper = np.triu_indices(heads[0].shape[1], 1)
    for a in range(n_head):
        for b in range(a, n_head):
            one, two = (x / torch.linalg.norm(x, dim=0, keepdim=True) for x in (heads[a], heads[b]))
            cosine = (one.T @ two).numpy()
            if a == b:
                within = np.concatenate((within, cosine[upper]))
            else:
                across = np.concatenate((across, cosine.ravel()))
    return np.stack([np.histogram(sample, edges, density=True)[0] for sample in (within, across)])


def group_densities(samples, edges):
    """`[6, bin]`: correlations of dimensions, QQ KK VV QK QV KV, picked by a mask of products."""
    x = samples.numpy()
    x = x - x.mean(axis=0, keepdims=True)
    x = x / np.linalg.norm(x, axis=0, keepdims=True)
    correlation = x.T @ x
    group = np.repeat([1, 2, 3], x.shape[1] // 3)
    mask = np.triu(np.outer(group, group), 1)
    return np.stack([np.histogram(correlation[mask == g], edges, density=True)[0] for g in (1, 4, 9, 2, 3, 6)])


def column_cosine_moments(w):
    """Mean and sample standard deviation of all column cosines."""
    unit = w / torch.linalg.norm(w, dim=0, keepdim=True)
    values = (unit.T @ unit).numpy()[np.triu_indices(w.shape[1], 1)]
    return np.array([values.mean(), values.std(ddof=1)])


def binned_moments(sums, scores, edges):
    """`[layer, 2, bin]`: mean and standard deviation of each layer's scores in bins of one sequence's sums."""
    from scipy.stats import binned_statistic

    x = sums.numpy().ravel()
    layers = [layer.numpy().ravel() for layer in scores]
    return np.array([[binned_statistic(x, y, name, bins=edges)[0] for name in ("mean", "std")] for y in layers])


def principal_components(w):
    """Explained shares of the rows' principal components, columns standardised."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    return PCA().fit(StandardScaler().fit_transform(w.numpy())).explained_variance_ratio_


def ks_normal(w):
    """Kolmogorov and Smirnov's distance from a normal distribution of the same mean and standard deviation."""
    from scipy.stats import kstest

    values = w.numpy().ravel()
    return np.array([kstest(values, "norm", args=(values.mean(), values.std())).statistic])
