"""The PyTorch side as in the studies' notebooks: whole models, hooks, loops over heads, NumPy concatenation.

Written from the definitions of the figures. Nothing is slowed down on purpose: it runs in
`no_grad` and with all threads; what notebooks repeat (a key-value cache nobody reads, norms of the
same columns for every pair of heads) is repeated here.
"""

import itertools

import numpy as np
import torch

from baselines import hook_everything


def load(folder):
    """Returns the whole model with logits, as the studies load it; for BERT the model that its study loads."""
    from transformers import AutoConfig, AutoModelForCausalLM, BertModel

    kind = AutoModelForCausalLM if AutoConfig.from_pretrained(folder).model_type == "gpt2" else BertModel
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def load_with_logits(folder):
    """Returns the whole model, with attention that returns patterns."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def cached(model, ids, mask):
    """Returns logits, and of everything else one NumPy array of all layers, from one pass."""
    kept = {}

    def keep(name, x):
        kept.setdefault(name, []).append(x.cpu().numpy())

    handles = hook_everything(model.transformer.h, keep)
    with torch.no_grad():
        output = model(ids, attention_mask=mask, output_attentions=True)
    for handle in handles:
        handle.remove()
    kept["pattern"] = [x.cpu().numpy() for x in output.attentions]
    return {name: np.array(layers) for name, layers in kept.items()} | {"logits": output.logits.cpu().numpy()}


def each_head_edited(model, ids, edit):
    """Yields layer, head and the last token's logits with z of that head edited alone, one pass for each.

    `edit(layer, head, z)` gets a copy of all heads side by side, and changes it.
    """
    for layer in range(model.config.n_layer):
        for head in range(model.config.n_head):

            def change(module, inputs, layer=layer, head=head):
                z = inputs[0].clone()
                edit(layer, head, z)
                return (z, *inputs[1:])

            handle = model.transformer.h[layer].attn.c_proj.register_forward_pre_hook(change)
            with torch.no_grad():
                logits = model(ids).logits
            handle.remove()
            yield layer, head, logits[0, -1]


def silence(head_dim):
    """Returns an edit that sets a head to 0."""

    def edit(layer, head, z):
        z[:, :, head * head_dim : (head + 1) * head_dim] = 0

    return edit


def head_sweep(model, ids, answers):
    """Returns the logit difference of two answers with z of each head set to 0 alone, `[layer, head]`."""
    scores = np.zeros((model.config.n_layer, model.config.n_head))
    for layer, head, logits in each_head_edited(model, ids, silence(model.config.n_embd // model.config.n_head)):
        scores[layer, head] = logits[answers[0]] - logits[answers[1]]
    return scores


def _hooked(model, ids, mask, keep):
    """Returns `keep(output)` of the modules that make Q, K and V, by layer (GPT-2: one module) or (layer, part)."""
    kept = {}

    def hook(name):
        return lambda module, inputs, output: kept.__setitem__(name, keep(output.detach()))

    handles = []
    if model.config.model_type == "gpt2":
        for layer, block in enumerate(model.transformer.h):
            handles.append(block.attn.c_attn.register_forward_hook(hook(layer)))
    else:
        for layer, block in enumerate(model.encoder.layer):
            attention = block.attention.self
            for part, module in enumerate((attention.query, attention.key, attention.value)):
                handles.append(module.register_forward_hook(hook((layer, part))))
    with torch.no_grad():
        model(ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    return kept


def _by_layer(model, kept):
    """Returns tensors `[layer][3]`, with Q, K and V separated."""
    layers = range(model.config.num_hidden_layers)
    if model.config.model_type == "gpt2":
        return [kept[layer].chunk(3, dim=-1) for layer in layers]
    return [[kept[layer, part] for part in range(3)] for layer in layers]


def qkv(model, ids, mask):
    """Returns Q, K and V of every layer, `[layer, 3, batch, pos, embed]`, from hooks, as one NumPy array."""
    kept = _hooked(model, ids, mask, lambda output: output)
    return np.array([[part.cpu().numpy() for part in parts] for parts in _by_layer(model, kept)])


def qkv_norms(model, ids, mask):
    """Returns the norms of each token's Q, K and V over all heads of BERT, `[layer, 3, batch, pos]`."""
    kept = _hooked(model, ids, mask, lambda output: np.linalg.norm(output.cpu().numpy(), axis=-1))
    return np.array([[kept[layer, part] for part in range(3)] for layer in range(model.config.num_hidden_layers)])


def _densities(samples, edges):
    return np.stack([np.histogram(sample, edges, density=True)[0] for sample in samples])


def last_token_scores(q, k):
    """Returns the last token's scores within and across heads, from `[head, pos, head_dim]`."""
    within, across = np.array([]), np.array([])
    for a in range(len(q)):
        for b in range(len(k)):
            scores = (k[b] @ q[a, -1] / q.shape[-1] ** 0.5)[1:-1].cpu().numpy()
            if a == b:
                within = np.concatenate((within, scores))
            else:
                across = np.concatenate((across, scores))
    return within, across


def last_token_densities(q, k, edges):
    """Returns the densities of `last_token_scores`, `[2, bin]`."""
    return _densities(last_token_scores(q, k), edges)


def causal_samples(q, k):
    """Returns the last row of a causal pattern, its diagonal, and the diagonal's first entry."""
    final, others, first = np.array([]), np.array([]), np.array([])
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    for head in range(len(q)):
        scores = q[head] @ k[head].T / q.shape[-1] ** 0.5
        scores[hidden] = -torch.inf
        pattern = torch.softmax(scores, dim=-1)
        diagonal = torch.diag(pattern).cpu().numpy()
        final = np.concatenate((final, pattern[-1, :-1].cpu().numpy()))
        others = np.concatenate((others, diagonal[1:]))
        first = np.concatenate((first, diagonal[:1]))
    return final, others, first


def causal_densities(q, k, edges):
    """Returns the densities of `causal_samples`, `[3, bin]`."""
    return _densities(causal_samples(q, k), edges)


def head_pair_cosines(w, n_head):
    """Returns column cosines of a matrix within and across its heads."""
    within, across = np.array([]), np.array([])
    heads = w.chunk(n_head, dim=1)
    upper = np.triu_indices(heads[0].shape[1], 1)
    for a in range(n_head):
        for b in range(a, n_head):
            one, two = (x / torch.linalg.norm(x, dim=0, keepdim=True) for x in (heads[a], heads[b]))
            cosine = (one.T @ two).cpu().numpy()
            if a == b:
                within = np.concatenate((within, cosine[upper]))
            else:
                across = np.concatenate((across, cosine.ravel()))
    return within, across


def head_pair_densities(w, n_head, edges):
    """Returns the densities of `head_pair_cosines`, `[2, bin]`."""
    return _densities(head_pair_cosines(w, n_head), edges)


def group_densities(samples, edges):
    """Returns densities `[6, bin]` of the correlations of dimensions, QQ KK VV QK QV KV, selected by a mask."""
    x = samples.cpu().numpy()
    x = x - x.mean(axis=0, keepdims=True)
    x = x / np.linalg.norm(x, axis=0, keepdims=True)
    correlation = x.T @ x
    group = np.repeat([1, 2, 3], x.shape[1] // 3)
    mask = np.triu(np.outer(group, group), 1)
    return _densities([correlation[mask == g] for g in (1, 4, 9, 2, 3, 6)], edges)


def column_cosine_moments(w):
    """Returns mean and sample standard deviation of all column cosines."""
    unit = w / torch.linalg.norm(w, dim=0, keepdim=True)
    values = (unit.T @ unit).cpu().numpy()[np.triu_indices(w.shape[1], 1)]
    return np.array([values.mean(), values.std(ddof=1)])


def binned_moments(sums, scores, edges):
    """Returns `[layer, 2, bin]`: mean and standard deviation of each layer's scores in bins of one sequence's sums."""
    from scipy.stats import binned_statistic

    x = sums.cpu().numpy().ravel()
    layers = [layer.cpu().numpy().ravel() for layer in scores]
    return np.array([[binned_statistic(x, y, name, bins=edges)[0] for name in ("mean", "std")] for y in layers])


def principal_components(w):
    """Returns the shares that principal components of standardised columns explain, and rows on the first two."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    analysis = PCA()
    scores = analysis.fit_transform(StandardScaler().fit_transform(w.cpu().numpy()))
    return np.concatenate([analysis.explained_variance_ratio_, scores[:, :2].ravel() / np.abs(scores[:, :2]).max()])


def ks_normal(w):
    """Returns the Kolmogorov–Smirnov distance from a normal distribution of the same mean and standard deviation."""
    from scipy.stats import kstest

    values = w.cpu().numpy().ravel()
    return np.array([kstest(values, "norm", args=(values.mean(), values.std())).statistic])


def neighbour_correlations(x):
    """Returns Pearson's correlation of every row with the next."""
    from scipy.stats import pearsonr

    rows = x.cpu().numpy()
    return np.array([pearsonr(one, two)[0] for one, two in itertools.pairwise(rows)])


def spectrum(w):
    """Returns effective rank and largest singular value."""
    values = np.linalg.svd(w.cpu().numpy(), compute_uv=False)
    p = values / values.sum()
    return np.array([np.exp(-(p * np.log(p)).sum()), values[0]])


def permuted_divergences(flags, values, bins):
    """Returns divergences `[permutation, layer]` of each layer's values where a flag is 1 from those where it is 0."""
    layers = [layer.cpu().numpy() for layer in values]
    results = np.zeros((len(flags), len(layers)))
    for row, chosen in enumerate(flags.cpu().numpy() == 1):
        for column, layer in enumerate(layers):
            edges = np.linspace(layer.min(), layer.max(), bins + 1)
            one, other = (np.histogram(sample, edges)[0] for sample in (layer[chosen], layer[~chosen]))
            one, other = one / one.sum(), other / other.sum()
            middle = (one + other) / 2
            parts = [part[part > 0] * np.log(part[part > 0] / middle[part > 0]) for part in (one, other)]
            results[row, column] = sum(part.sum() for part in parts) / 2
    return results


def attention_statistics(q, k):
    """Returns logsumexp, entropy, largest weight, distance and mass on token 0, `[statistic, head, query]`."""
    place = torch.arange(q.shape[1], device=q.device)
    later = place > place[:, None]
    distance = (place[:, None] - place).abs()
    results = []
    for one, other in zip(q, k, strict=True):
        scores = (one @ other.T / one.shape[1] ** 0.5).masked_fill(later, -torch.inf)
        pattern = torch.softmax(scores, dim=-1)
        entropy = -torch.where(pattern > 0, pattern * pattern.log(), 0).sum(dim=-1)
        mean = (pattern * distance).sum(dim=-1)
        results.append(torch.stack([scores.logsumexp(dim=-1), entropy, pattern.amax(dim=-1), mean, pattern[:, 0]]))
    return torch.stack(results, dim=1)


def composition(left, right, other_left, other_right):
    """Returns composition `[head, other head]`, from the whole matrices of each pair."""
    ones = [a @ b.T for a, b in zip(left, right, strict=True)]
    others = [a @ b.T for a, b in zip(other_left, other_right, strict=True)]
    return torch.stack([torch.stack([(a @ b).norm() / (a.norm() * b.norm()) for b in others]) for a in ones])
