"""The five studies as somebody who knows PyTorch well would compute them: the same results as `notebook_studies.py`.

Studies of weights read the tensors that they need and build no model; studies of activations run the
base model in inference mode and reduce each layer in its hook, so that nothing is kept for later.
"""

import contextlib
import json
from pathlib import Path

import numpy as np
import torch

from baselines import CORRELATION_EDGES, PATTERN_EDGES, SCORE_EDGES, load_tokenizer, tuned


class Weights:
    """Single tensors of a GPT-2 checkpoint, straight onto the device."""

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


def _host(tree):
    """Tensors as NumPy arrays, in nested dicts."""
    if isinstance(tree, dict):
        return {name: _host(each) for name, each in tree.items()}
    return tree.cpu().numpy() if isinstance(tree, torch.Tensor) else np.asarray(tree)


def _freedman_diaconis(sample, density=True):
    """NumPy's, which has no vectorised rival for one sample."""
    return np.histogram(sample.cpu().numpy().ravel(), bins="fd", density=density)


def _run_layers(model, modules, ids, mask, reduce):
    """One pass; `reduce(layer, output)` in a hook on one module of each layer, the last of which ends it; results."""
    results = [None] * len(modules)

    def hook(layer):
        def keep(module, inputs, output):
            results[layer] = reduce(layer, output)
            if layer == len(modules) - 1:
                raise tuned.Done

        return keep

    handles = [module.register_forward_hook(hook(layer)) for layer, module in enumerate(modules)]
    with contextlib.suppress(tuned.Done):
        model(ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return results


@torch.inference_mode()
def qkv_weights(job):
    files = {Path(folder).name: Weights(folder, job["device"]) for folder in job["models"]}
    every = list(files.values())
    figures = {
        "1": {
            "n_embd": [each.width for each in every],
            "n_layer": [each.layers for each in every],
            "n_head": [each.n_head for each in every],
            "head_dim": [each.width // each.n_head for each in every],
            "attention_parameters": [
                sum(each.size(name) for name in each.keys if ".attn.c_" in name) / 1e6 for each in every
            ],
        },
        "3": {},
        "6": {},
    }
    for name, each in files.items():
        moments, cosines = torch.zeros(2, each.layers, 3), torch.zeros(2, each.layers, 3)
        for layer in range(each.layers):
            for part, w in enumerate(each.attention(layer).split(each.width, dim=1)):
                std, mean = torch.std_mean(w)
                moments[:, layer, part] = torch.stack([mean, std])
                cosines[:, layer, part] = tuned.column_cosine_moments(w)
        figures["3"] |= {f"mean_{name}": moments[0], f"std_{name}": moments[1]}
        figures["6"] |= {f"mean_{name}": cosines[0], f"std_{name}": cosines[1]}

    name, first = next(iter(files.items()))
    layers, width, head_dim = first.layers, first.width, first.width // first.n_head
    drawn = min(6, layers - 1)
    wide_edges, pair_edges = np.linspace(-0.8, 0.8, 81), np.linspace(-0.4, 0.4, 101)
    wide_density = torch.zeros(layers, 3, 80)
    density, pair_mean, pair_std = torch.zeros(layers, 2, 2, 100), torch.zeros(layers, 2, 2), torch.zeros(layers, 2, 2)
    for layer in range(layers):
        parts = first.attention(layer).split(width, dim=1)
        wide_density[layer] = tuned.densities(parts, wide_edges)
        for part in range(2):
            samples = tuned.head_pair_cosines(parts[part], first.n_head)
            density[layer, part] = tuned.densities(samples, pair_edges)
            for group, sample in enumerate(samples):
                pair_std[layer, part, group], pair_mean[layer, part, group] = torch.std_mean(sample, correction=0)
    matrices = first.attention(drawn)
    parts = matrices.split(width, dim=1)
    figures["2a"] = {"weights": matrices}
    figures["2b"], figures["5a"] = {}, {}
    for letter, w in zip("qkv", parts, strict=True):
        figures["2b"][f"counts_{letter}"], figures["2b"][f"edges_{letter}"] = _freedman_diaconis(w, density=False)
    figures["2c"] = {"edges": wide_edges, "density": wide_density}
    figures["2d"] = {"mean": figures["3"][f"mean_{name}"], "std": figures["3"][f"std_{name}"]}
    heads = parts[0].view(width, first.n_head, head_dim).transpose(0, 1)
    unit = heads[0] / torch.linalg.norm(heads[0], dim=0, keepdim=True)
    similarity = unit.T @ unit
    above = torch.ones(head_dim, head_dim, dtype=torch.bool, device=w.device).triu(1)
    figures["4a"] = {"heads": heads}
    figures["4b"] = {"similarity": similarity, "values": similarity[above]}
    for part in range(2):
        for group, sample in enumerate(tuned.head_pair_cosines(parts[part], first.n_head)):
            ends = f"{'qk'[part]}_{('within', 'across')[group]}"
            figures["5a"][f"density_{ends}"], figures["5a"][f"edges_{ends}"] = _freedman_diaconis(sample)
    figures["5b"], figures["5c"] = {"edges": pair_edges, "density": density}, {"mean": pair_mean, "std": pair_std}
    return _host(figures)


@torch.inference_mode()
def attention_scores(job):
    from transformers import GPT2Model

    model = GPT2Model.from_pretrained(job["models"][0], dtype=torch.float32).eval().to(job["device"])
    layers, n_head, width = model.config.n_layer, model.config.n_head, model.config.n_embd
    head_dim, drawn = width // n_head, min(6, layers - 1)
    ids = torch.tensor([load_tokenizer(job["models"][0]).encode(job["texts"][0], add_special_tokens=False).ids])
    score_edges = np.linspace(-15, 15, 201)
    kept = {}

    def reduce(layer, output):
        q, k = (x[0].unflatten(-1, (n_head, head_dim)).transpose(0, 1) for x in output.split(width, dim=-1)[:2])
        scores = q @ k.transpose(1, 2) / head_dim**0.5
        std, mean = torch.std_mean(scores)
        softmax = torch.softmax(scores, dim=-1)
        low, high = softmax.aminmax()
        softmax_edges = torch.linspace(low.item(), high.item(), 202)
        last, causal = tuned.last_token_scores(q, k), tuned.causal_samples(q, k)
        if layer == drawn:
            wide = (output[0, :, :width] @ output[0, :, width : 2 * width].T) / (head_dim**0.5 * n_head)
            kept.update(q=q, last=last, causal=causal, wide=wide, mean=scores.mean(dim=0))
        return (
            tuned.densities(last, SCORE_EDGES),
            mean,
            std,
            tuned.densities((scores,), score_edges)[0],
            softmax_edges,
            tuned.densities((softmax,), softmax_edges)[0],
            tuned.densities(causal, PATTERN_EDGES),
        )

    results = _run_layers(model, [block.attn.c_attn for block in model.h], ids.to(job["device"]), None, reduce)
    last, mean, std, density, softmax_edges, softmax_density, causal = map(torch.stack, zip(*results, strict=True))
    sizes = np.arange(5, 101)
    products = [torch.randn(int(n), int(n)) @ torch.randn(int(n), int(n)) for n in sizes]
    raw = torch.stack([product.std(correction=0) for product in products])
    within, across = map(torch.flatten, kept["last"])
    fourth = {"within": within, "across": across}
    for name, sample in (("within", within), ("across", across)):
        fourth[f"density_{name}"], fourth[f"edges_{name}"] = _freedman_diaconis(sample)
    visible = torch.ones(5, 5).tril()
    return _host(
        {
            "1": {"n": sizes, "raw": raw, "scaled": raw / torch.tensor(sizes).sqrt()},
            "3": {"q": kept["q"]},
            "4": fourth,
            "5a": {"edges": SCORE_EDGES, "density": last},
            "5b": {"edges": SCORE_EDGES, "mean": last.mean(dim=0), "std": last.std(dim=0, correction=0)},
            "6": {
                "mean": mean,
                "std": std,
                "edges": score_edges,
                "density": density,
                "softmax_edges": softmax_edges,
                "softmax_density": softmax_density,
            },
            "7a": {"mask": 1 - visible, "softmax": visible / visible.sum(dim=1, keepdim=True)},
            "7b": dict(
                zip(("final_to_previous", "self_other", "self_first"), map(torch.flatten, kept["causal"]), strict=True)
            ),
            "8": {"edges": PATTERN_EDGES, "density": causal},
            "9": {"all_heads": kept["wide"], "mean_of_heads": kept["mean"]},
        }
    )


@torch.inference_mode()
def token_frequency(job):
    from transformers import BertModel

    tokenizer = load_tokenizer(job["models"][0])
    model = (
        BertModel.from_pretrained(job["models"][0], dtype=torch.float32, add_pooling_layer=False)
        .eval()
        .to(job["device"])
    )
    layers, n_head = model.config.num_hidden_layers, model.config.num_attention_heads
    head_dim, pos = model.config.hidden_size // n_head, model.config.max_position_embeddings

    counts, counted, batch = np.zeros(model.config.vocab_size, np.int64), 0, []
    documents = [json.loads(line)["text"] for line in Path(job["corpus"]).read_text().splitlines()]
    for start in range(0, len(documents), 64):
        for encoding in tokenizer.encode_batch_fast(documents[start : start + 64], add_special_tokens=False):
            ids = np.array(encoding.ids)
            if counted < job["tokens"]:
                counts += np.bincount(ids, minlength=len(counts))
                counted += len(ids)
            if len(ids) >= pos and len(batch) < job["batch"]:
                batch.append(ids[:pos])
        if counted >= job["tokens"] and len(batch) == job["batch"]:
            break
    batch = torch.tensor(np.array(batch))
    with np.errstate(divide="ignore"):
        log_frequency = np.log(counts / counts.sum())
    logs = torch.tensor(log_frequency)[batch]
    sums = (logs[:, :, None] + logs[:, None, :]).flatten(1)
    steps = torch.linspace(0, 1, 41, dtype=torch.float64)
    edges = torch.stack([torch.tensor(np.percentile(each.numpy(), 100 * steps.numpy())) for each in sums])
    bins = (torch.searchsorted(edges, sums, right=True) - 1).clamp(max=39)
    sizes = torch.stack([torch.bincount(each, minlength=40) for each in bins]).float()
    # Between edges that repeat a bin is empty, and left out of averages and correlations.
    centres = torch.where(sizes > 0, (edges[:, 1:] + edges[:, :-1]) / 2, torch.nan)

    def moments(scores, bins, sizes):
        """Mean and standard deviation in each bin, `[sequence, bin]`, about the sequence's mean."""
        values = scores.flatten(1)
        centre = values.mean(dim=1, keepdim=True)
        values = values - centre
        mean = torch.zeros_like(sizes).scatter_add_(1, bins, values) / sizes
        squares = torch.zeros_like(sizes).scatter_add_(1, bins, (values - mean.gather(1, bins)) ** 2)
        return mean + centre, (squares / sizes).sqrt()

    def run(ids, bins, sizes):
        """`[layer]` of moments and adjustments, and every 500th score of layer 5, of some sequences."""
        queries, kept = {}, {}
        binned, adjustments = [], []

        def query(module, inputs, output):
            queries["q"] = output

        def key(layer):
            def reduce(module, inputs, output):
                # Of the mean over heads, one product of the whole width.
                scores = queries["q"] @ output.transpose(1, 2) / (head_dim**0.5 * n_head)
                if layer == 5:
                    kept["score"] = scores.flatten(1)[:, ::500]
                binned.append(moments(scores, bins, sizes))

            return reduce

        def adjust(layer):
            def reduce(module, inputs, output):
                adjustments.append(torch.linalg.vector_norm(output, dim=-1).log())
                if layer == layers - 1:
                    raise tuned.Done

            return reduce

        handles = []
        for layer, block in enumerate(model.encoder.layer):
            handles.append(block.attention.self.query.register_forward_hook(query))
            handles.append(block.attention.self.key.register_forward_hook(key(layer)))
            handles.append(block.attention.output.dense.register_forward_hook(adjust(layer)))
        with contextlib.suppress(tuned.Done):
            model(ids)
        for handle in handles:
            handle.remove()
        mean, std = (torch.stack(each) for each in zip(*binned, strict=True))
        return mean.cpu(), std.cpu(), torch.stack(adjustments).cpu(), kept["score"].cpu()

    piece = tuned.PIECE if job["device"] == "cpu" else len(batch)
    parts = zip(*(each.split(piece) for each in (batch, bins, sizes)), strict=True)
    pieces = [run(*(each.to(job["device"]) for each in part)) for part in parts]
    mean, std, adjustment = (torch.cat(each, dim=1) for each in list(zip(*pieces, strict=True))[:3])
    score = torch.cat([each[3] for each in pieces])

    def correlation(x, y):
        x, y = ((each - each.nanmean(dim=-1, keepdim=True)).nan_to_num() for each in (x, y))
        return (x * y).sum(dim=-1) / (x.norm(dim=-1) * y.norm(dim=-1))

    r = correlation(logs[:, 1:].flatten(), adjustment[:, :, 1:].flatten(1).double())
    shown = [0, layers // 2, layers - 1]
    layer_centres, layer_mean, layer_std = (
        centres.nanmean(dim=0),
        mean.double().nanmean(dim=1),
        std.double().nanmean(dim=1),
    )
    return _host(
        {
            "1": {"counts": counts, "log_frequency": np.where(counts > 0, log_frequency, np.nan)},
            "2": {"ids": batch},
            "4a": {"log_frequency": logs, "adjustment": adjustment[shown], "r": r[shown]},
            "4b": {"r": r},
            "5a": {"pair_log_frequency": sums[0].view(pos, pos)},
            "5b": {"pair_log_frequency": sums[:, ::500].flatten(), "score": score.flatten()},
            "5-edges": {
                "percentile_edges": edges[-1],
                "linear_edges": np.linspace(sums[-1].min().item(), sums[-1].max().item(), 41),
            },
            "5c": {"centres": (edges[:, 1:] + edges[:, :-1]) / 2, "mean": mean[7], "std": std[7]},
            "5d": {"r_mean": correlation(centres, mean[7].double()), "r_std": correlation(centres, std[7].double())},
            "6": {
                "centres": layer_centres.expand(layers, -1),
                "mean": layer_mean,
                "std": layer_std,
                "r_mean": correlation(layer_centres, layer_mean),
                "r_std": correlation(layer_centres, layer_std),
            },
        }
    )


@torch.inference_mode()
def weight_tour(job):
    from scipy.cluster.hierarchy import linkage
    from scipy.special import kolmogorov

    file = Weights(job["models"][0], job["device"])
    layers, width, n_head = file.layers, file.width, file.n_head
    positions = file["wpe.weight"].cpu().numpy()
    variance = np.var(positions, axis=0, dtype=np.float64)
    order = np.argsort(variance, kind="stable")
    scaled = [x if width >= 768 else x * width // 768 for x in (0, 100, 200, 300, 400, 500, 600, 700)]
    zero, one, two, three, four, five, six, seven = scaled
    chosen, varied = [four, six, seven], order[[0, len(order) // 2, -1]]
    centred = positions - positions.mean(axis=1, keepdims=True)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)

    first = file.attention(0)
    std, mean = torch.std_mean(first.double(), correction=0)
    units = ((first - mean) / std).double()
    ks = tuned.ks_normal(first)[0]
    density, edges = np.histogram(first.cpu().numpy(), bins=50, density=True)
    shown = [*range(3), *range(layers - 3, layers)]
    components, rows, linkages = [], [], []
    statistics, row_variance = [], []
    names = ("ks", "kurtosis", "effective_rank", "largest_singular_value")
    signature = {name: torch.zeros(layers, 3) for name in names}
    for layer in range(layers):
        w = file.attention(layer)
        low, high = w.aminmax()
        statistics.append(torch.stack([w.mean(), w.std(correction=0), high, low]))
        row_variance.append(w.var(dim=1, correction=0))
        if layer in shown:
            shares, scores = tuned.component_shares_and_scores(w)
            components.append(shares)
            rows.append(scores)
            heads = w[:, :width].view(width, n_head, -1).mean(dim=2).T
            linkages.append(linkage(heads.cpu().numpy(), "ward"))
        for part, matrix in enumerate(w.split(width, dim=1)):
            signature["ks"][layer, part] = tuned.ks_normal(matrix)[0]
            std_, mean_ = torch.std_mean(matrix, correction=0)
            signature["kurtosis"][layer, part] = (((matrix - mean_) / std_) ** 4).mean() - 3
            values = torch.linalg.svdvals(matrix)
            p = values / values.sum()
            signature["effective_rank"][layer, part] = (-(p * p.log()).sum()).exp()
            signature["largest_singular_value"][layer, part] = values[0]
    explained = torch.stack(components)
    mean_, std_, high, low = torch.stack(statistics).T
    tied = file.config["vocab_size"] * width
    return _host(
        {
            "architecture": {"total_with_tied": sum(map(file.size, file.keys)) + tied},
            "positions": {"positions": positions},
            "position-dimension": {"values": positions[:, five]},
            "position-dimensions": {"dimensions": chosen, "values": positions[:, chosen].T},
            "position-variance": {"dimensions": varied, "values": positions[:, varied].T, "variance": variance},
            "position-correlation": {"r": (centred[1:] * centred[:-1]).sum(axis=1)},
            "weight-histogram": {
                "density": density,
                "edges": edges,
                "mean": mean,
                "std": std,
                "skewness": (units**3).mean(),
                "kurtosis": (units**4).mean() - 3,
                "ks": ks,
                "p": kolmogorov(ks.item() * first.numel() ** 0.5),
            },
            "weights": {"weights": first},
            "weights-zoom": {"window_1": first[zero:three, one:three], "window_2": first[three:six, two:four]},
            "pca-variance": {"layers": shown, "explained": explained.cumsum(dim=1)},
            "pca-scatter": {"layers": shown, "scores": torch.stack(rows), "explained": explained[:, 0]},
            "layer-statistics": {"mean": mean_, "std": std_, "max": high, "min": low},
            "row-variance": {"variance": torch.stack(row_variance)},
            "query-heads": {"heads": first[:, :width].unflatten(1, (n_head, -1)).transpose(0, 1).flatten(1)},
            "head-clusters": {"layers": shown, "linkage": np.array(linkages)},
            "training-signature": signature,
        }
    )


@torch.inference_mode()
def token_similarity(job):
    from transformers import GPT2Model

    model = GPT2Model.from_pretrained(job["models"][0], dtype=torch.float32).eval().to(job["device"])
    layers, width = model.config.n_layer, model.config.n_embd
    drawn = min(6, layers - 1)
    tokenizer = load_tokenizer(job["models"][0])
    encoded = [each.ids for each in tokenizer.encode_batch_fast(job["texts"], add_special_tokens=False)]
    (token,) = tokenizer.encode(job["target"], add_special_tokens=False).ids
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(each) for each in encoded], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(each)) for each in encoded], batch_first=True).long()
    places = torch.tensor([each.index(token) for each in encoded])
    sentences = torch.arange(len(encoded))
    kept = {}

    def reduce(layer, output):
        target, other = output[sentences, places], output[sentences, places - 1]
        if layer == drawn:
            kept.update(target=target, other=other)
        thirds = target.unflatten(1, (3, width))
        return (
            tuned.group_densities(target, CORRELATION_EDGES),
            tuned.group_densities(other, CORRELATION_EDGES),
            thirds.mean(dim=(0, 2)),
            thirds.var(dim=(0, 2), correction=0),
        )

    modules = [block.attn.c_attn for block in model.h]
    results = _run_layers(model, modules, ids.to(job["device"]), mask.to(job["device"]), reduce)
    target_density, other_density, mean, variance = map(torch.stack, zip(*results, strict=True))
    target = kept["target"]
    above = torch.ones(3 * width, 3 * width, dtype=torch.bool, device=target.device).triu(1)

    def cosines(x):
        x = x / torch.linalg.norm(x, dim=0, keepdim=True)
        return x.T @ x

    similarities = {"cosine": cosines(target), "correlation": cosines(target - target.mean(dim=0, keepdim=True))}
    figures = {"pairs": {"target": target}}
    for name, similarity in similarities.items():
        values = similarity[above]
        low, high = values.aminmax()
        edges = np.linspace(low.item(), high.item(), 101)
        counts = tuned.densities((values,), edges)[0].cpu().numpy() * np.diff(edges) * len(values)
        figures[name] = {"similarity": similarity, "values": values, "counts": np.rint(counts), "edges": edges}
    group = torch.arange(1, 4).repeat_interleave(width)
    permuted = target.flatten()[torch.randperm(target.numel())].view(target.shape)
    within_q = torch.ones(width, width, dtype=torch.bool, device=target.device).triu(1)
    figures |= {
        "mask": {"vector": group, "matrix": torch.outer(group, group).triu(1)},
        "distributions": {
            "edges": CORRELATION_EDGES,
            "target": target_density[drawn],
            "non_target": other_density[drawn],
            "random": tuned.densities((cosines(permuted)[above],), CORRELATION_EDGES)[0],
        },
        "means": {"mean": target.mean(dim=0)},
        "pair-order": {"values": similarities["correlation"][:width, :width][within_q][:20_000]},
        "laminar": {
            "edges": CORRELATION_EDGES,
            "target": target_density,
            "non_target": other_density,
            "mean": mean,
            "variance": variance,
        },
    }
    return _host(figures)
