"""The PyTorch side as an expert would write it: vectorised, in inference mode, without logits.

The same functions as in `notebook.py`, with the same results.
"""

import torch

from baselines import hook_everything

# Fastest number of sentences of 512 tokens together on a CPU.
PIECE = 8
# Fastest number of branches of a sweep together on a CPU, for texts of some 20 tokens.
BRANCHES = 16


def load(folder):
    """Returns the base model, without logits or pooler."""
    from transformers import AutoConfig, BertModel, GPT2Model

    options = {"dtype": torch.float32}
    if AutoConfig.from_pretrained(folder).model_type == "gpt2":
        return GPT2Model.from_pretrained(folder, **options).eval()
    return BertModel.from_pretrained(folder, add_pooling_layer=False, **options).eval()


def load_with_logits(folder):
    """Returns GPT-2 with its logits, and with attention that returns patterns."""
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.inference_mode()
def cached(model, ids, mask):
    """Returns logits, and lists by layer of everything else, from one pass, as TransformerLens' `run_with_cache`."""
    kept = {}
    handles = hook_everything(model.transformer.h, lambda name, x: kept.setdefault(name, []).append(x))
    output = model(ids, attention_mask=mask, use_cache=False, output_attentions=True)
    for handle in handles:
        handle.remove()
    return kept | {"pattern": output.attentions, "logits": output.logits}


def _z(block, x, n_head):
    """Returns z of a block, its heads side by side."""
    q, k, v = (
        each.unflatten(-1, (n_head, -1)).transpose(1, 2) for each in block.attn.c_attn(block.ln_1(x)).chunk(3, -1)
    )
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def _after(block, x, z):
    """Returns the residual stream after a block in which attention gave `z`."""
    x = x + block.attn.c_proj(z)
    return x + block.mlp(block.ln_2(x))


@torch.inference_mode()
def branch_ends(model, ids, edit, size):
    """Returns final hidden states of the last token with each head edited alone, `[layer · head, embed]`.

    Branches begin at the layer of their head, where `edit(layer, z)` returns z of each, `[head, pos, embed]`; those of
    all layers so far continue together, `size` at a time.
    """
    n_head = model.config.n_head
    clean = model.transformer.wte(ids) + model.transformer.wpe(torch.arange(ids.shape[1], device=ids.device))
    branches = clean[:0]
    for layer, block in enumerate(model.transformer.h):
        z = _z(block, clean, n_head)
        pieces = branches.split(size) if len(branches) else ()
        moved = [_after(block, piece, _z(block, piece, n_head)) for piece in pieces]
        branches = torch.cat([*moved, _after(block, clean, edit(layer, z))])
        clean = _after(block, clean, z)
    return model.transformer.ln_f(branches[:, -1])


def each_head_from(z, other):
    """Returns `[head, pos, embed]`: z `[1, pos, embed]` with each head, alone, from `other`, whose heads are apart."""
    n_head = other.shape[-2]
    chosen = torch.eye(n_head, dtype=torch.bool, device=z.device)[:, None, :, None]
    return torch.where(chosen, other, z.unflatten(-1, (n_head, -1))).flatten(2)


@torch.inference_mode()
def head_sweep(model, ids, answers, size=BRANCHES):
    """Returns the same as the notebook's, from two logits of each branch."""
    n_head = model.config.n_head
    nothing = torch.zeros(n_head, model.config.n_embd // n_head, device=ids.device)
    ends = branch_ends(model, ids, lambda layer, z: each_head_from(z, nothing), size)
    one, other = model.lm_head.weight[answers]
    return (ends @ (one - other)).view(-1, n_head)


class Done(Exception):
    """Raised in a hook to end a pass of which the rest is not needed."""


def _hooked(model, ids, mask, keep):
    """Returns `keep(output)` of each layer's projections, `[layer][module]`; the model is not run beyond the last."""
    if model.config.model_type == "gpt2":
        modules = [(block.attn.c_attn,) for block in model.h]
    else:
        modules = [(a.query, a.key, a.value) for a in (block.attention.self for block in model.encoder.layer)]
    kept = [[None] * len(parts) for parts in modules]

    def hook(layer, part):
        def run(module, inputs, output):
            kept[layer][part] = keep(output)
            if (layer, part) == (len(modules) - 1, len(modules[0]) - 1):
                raise Done

        return run

    handles = [
        module.register_forward_hook(hook(layer, part))
        for layer, parts in enumerate(modules)
        for part, module in enumerate(parts)
    ]
    try:
        model(ids, attention_mask=mask, use_cache=False)
    except Done:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return kept


@torch.inference_mode()
def qkv(model, ids, mask):
    """Returns Q, K and V of every layer, `[layer, 3, batch, pos, embed]`."""
    kept = _hooked(model, ids, mask, lambda output: output)
    if model.config.model_type == "gpt2":
        return torch.stack([wide.unflatten(-1, (3, -1)).movedim(-2, 0) for (wide,) in kept])
    return torch.stack([torch.stack(parts) for parts in kept])


@torch.inference_mode()
def qkv_norms(model, ids, mask):
    """Returns norms of each token's Q, K and V over all heads of BERT, `[layer, 3, batch, pos]`, in microbatches."""

    def norm(output):
        return torch.linalg.vector_norm(output, dim=-1)

    size = PIECE if ids.device.type == "cpu" else len(ids)
    pieces = zip(ids.split(size), mask.split(size), strict=True)
    kept = [_hooked(model, piece, piece_mask, norm) for piece, piece_mask in pieces]
    return torch.cat([torch.stack([torch.stack(parts) for parts in piece]) for piece in kept], dim=2)


def densities(samples, edges):
    """Returns densities `[sample, bin]` on equally spaced edges; `torch.histogram` works only on a CPU."""
    bins, low, high = len(edges) - 1, float(edges[0]), float(edges[-1])
    results = []
    for sample in samples:
        if sample.device.type == "cpu":
            results.append(torch.histogram(sample.flatten(), bins, range=(low, high), density=True).hist)
            continue
        inside = sample[(sample >= low) & (sample <= high)]
        index = ((inside - low) * (bins / (high - low))).long().clamp(0, bins - 1)
        counts = torch.bincount(index, minlength=bins).float()
        results.append(counts / counts.sum() / ((high - low) / bins))
    return torch.stack(results)


@torch.inference_mode()
def last_token_scores(q, k):
    """Returns scores within and across heads, by one einsum over all pairs of heads."""
    scores = torch.einsum("hd,gpd->hgp", q[:, -1], k)[:, :, 1:-1] / q.shape[-1] ** 0.5
    same = torch.eye(len(q), dtype=torch.bool, device=q.device)
    return scores[same], scores[~same]


@torch.inference_mode()
def last_token_densities(q, k, edges):
    return densities(last_token_scores(q, k), edges)


@torch.inference_mode()
def causal_samples(q, k):
    """Returns samples of a causal pattern, by one batched product and softmax."""
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
    pattern = torch.softmax(scores, dim=-1)
    diagonal = torch.diagonal(pattern, dim1=1, dim2=2)
    return pattern[:, -1, :-1], diagonal[:, 1:], diagonal[:, 0]


@torch.inference_mode()
def causal_densities(q, k, edges):
    return densities(causal_samples(q, k), edges)


@torch.inference_mode()
def head_pair_cosines(w, n_head):
    """Returns cosines within and across heads, by one product of all columns and two masks."""
    unit = w / torch.linalg.norm(w, dim=0, keepdim=True)
    cosine = unit.T @ unit
    head = torch.arange(w.shape[1], device=w.device) // (w.shape[1] // n_head)
    same = head[:, None] == head[None, :]
    return cosine[same.triu(1)], cosine[head[:, None] < head[None, :]]


@torch.inference_mode()
def head_pair_densities(w, n_head, edges):
    return densities(head_pair_cosines(w, n_head), edges)


@torch.inference_mode()
def group_densities(samples, edges):
    """Returns densities of correlations of dimensions, from the blocks of one product."""
    x = samples - samples.mean(dim=0, keepdim=True)
    x = x / torch.linalg.norm(x, dim=0, keepdim=True)
    width = x.shape[1] // 3
    blocks = (x.T @ x).view(3, width, 3, width)
    upper = torch.ones(width, width, dtype=torch.bool, device=x.device).triu(1)
    pairs = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
    return densities([blocks[a, :, b][upper] if a == b else blocks[a, :, b] for a, b in pairs], edges)


@torch.inference_mode()
def column_cosine_moments(w):
    """Returns mean and sample standard deviation of cosines above the diagonal, without indexing the product."""
    unit = w / torch.linalg.norm(w, dim=0, keepdim=True)
    n = w.shape[1]
    pairs = n * (n - 1) / 2
    cosine = unit.T @ unit
    cosine.fill_diagonal_(0)
    mean = cosine.sum(dtype=torch.float64) / 2 / pairs
    squares = torch.linalg.vector_norm(cosine, dtype=torch.float64) ** 2 / 2
    return torch.stack([mean, ((squares - pairs * mean**2) / (pairs - 1)).sqrt()])


@torch.inference_mode()
def binned_moments(sums, scores, edges):
    """Returns moments in bins: bins are found once, sums of all layers are one product with the one-hot bins."""
    edges = torch.as_tensor(edges, dtype=sums.dtype, device=sums.device)
    index = (torch.searchsorted(edges, sums.flatten(), right=True) - 1).clamp(max=len(edges) - 2)
    bins = torch.nn.functional.one_hot(index, len(edges) - 1).float()
    values = scores.flatten(1)
    centre = values.mean(dim=1, keepdim=True)
    values = values - centre
    count = bins.sum(dim=0)
    mean, square = values @ bins / count, values**2 @ bins / count
    return torch.stack([mean + centre, (square - mean**2).clamp(min=0).sqrt()], dim=1)


@torch.inference_mode()
def component_shares_and_scores(w):
    """Returns principal components from the smaller Gram matrix; largest loadings are positive, as in scikit-learn."""
    z = (w - w.mean(dim=0)) / w.std(dim=0, correction=0)
    squares, left = torch.linalg.eigh(z @ z.T)
    squares, left = squares.flip(0).clamp(min=0), left.flip(1)[:, :2]
    loadings = z.T @ left
    sign = loadings.gather(0, loadings.abs().argmax(dim=0)[None]).sign()
    return squares / squares.sum(), left * squares[:2].sqrt() * sign


@torch.inference_mode()
def principal_components(w):
    shares, scores = component_shares_and_scores(w)
    return torch.cat([shares, scores.flatten() / scores.abs().max()])


@torch.inference_mode()
def ks_normal(w):
    """Returns the Kolmogorov–Smirnov distance from a normal distribution, by one sort."""
    values = w.flatten().sort().values
    normal = torch.special.ndtr((values - w.mean()) / w.std(correction=0))
    step = torch.arange(len(values), dtype=torch.float32, device=w.device)
    return torch.maximum(((step + 1) / len(values) - normal).max(), (normal - step / len(values)).max())[None]


@torch.inference_mode()
def neighbour_correlations(x):
    """Returns correlations of neighbouring rows, by products of rows at unit length."""
    x = x - x.mean(dim=1, keepdim=True)
    x = x / torch.linalg.norm(x, dim=1, keepdim=True)
    return (x[1:] * x[:-1]).sum(dim=1)


@torch.inference_mode()
def spectrum(w):
    values = torch.linalg.svdvals(w)
    p = values / values.sum()
    return torch.stack([(-(p * p.log()).sum()).exp(), values[0]])


@torch.inference_mode()
def permuted_divergences(flags, values, bins):
    """Returns divergences; the histograms of all permutations are one product with the one-hot bins."""
    low, high = (end[:, None].double() for end in values.aminmax(dim=1))
    edges = low + (high - low) * torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=values.device)
    index = torch.searchsorted(edges[:, 1:-1].contiguous(), values.double(), right=True)
    hot = torch.nn.functional.one_hot(index, bins).to(flags.dtype)
    one = torch.einsum("np,lpb->nlb", flags, hot)
    other = hot.sum(dim=1) - one
    one, other = (each / each.sum(dim=-1, keepdim=True) for each in (one, other))
    middle = ((one + other) / 2).clamp(min=torch.finfo(one.dtype).tiny)
    return sum(torch.xlogy(each, each / middle).sum(dim=-1) for each in (one, other)) / 2


@torch.inference_mode()
def attention_statistics(q, k):
    """Returns statistics of causal attention, all heads at once and in place where possible."""
    place = torch.arange(q.shape[1], device=q.device)
    scores = torch.baddbmm(q.new_zeros(()), q, k.transpose(1, 2), beta=0, alpha=q.shape[2] ** -0.5)
    scores.masked_fill_(place > place[:, None], -torch.inf)
    whole = scores.logsumexp(dim=-1)
    pattern = (scores - whole[..., None]).exp_()
    entropy = whole - scores.masked_fill_(scores == -torch.inf, 0).mul_(pattern).sum(dim=-1)
    mean = place - pattern @ place.to(q.dtype)  # no later key has a weight
    return torch.stack([whole, entropy, pattern.amax(dim=-1), mean, pattern[..., 0]])


@torch.inference_mode()
def composition(left, right, other_left, other_right):
    """Returns composition scores through traces of `[head_dim, head_dim]` products."""
    grams = [each.transpose(1, 2) @ each for each in (left, right, other_left, other_right)]
    one, other = ((a * b).sum(dim=(1, 2)).sqrt() for a, b in (grams[:2], grams[2:]))
    middle = torch.einsum("aei,bej->abij", right, other_left)
    squared = torch.einsum("aik,abkj,bjl,abil->ab", grams[0], middle, grams[3], middle)
    return squared.clamp(min=0).sqrt() / (one[:, None] * other)
