"""The five studies as their notebooks take them: whole models of transformers, hooks, loops, lists of arrays.

Each function computes a study from a job (see `__main__.py`) and returns `{figure: {array: values}}`
with the names of the package's own `.npz` files, so that the numbers can be compared.
"""

import itertools
import json
from pathlib import Path

import numpy as np
import torch

from baselines import CORRELATION_EDGES, PATTERN_EDGES, SCORE_EDGES, load_tokenizer
from baselines.notebook import causal_samples, head_pair_cosines, last_token_scores


def _histogram(sample, bins, density=True):
    """Heights and edges; of an empty sample zeros."""
    heights, edges = np.histogram(sample, bins=bins, density=False)
    return (heights / max(heights.sum(), 1) / np.diff(edges) if density else heights), edges


def _nearest(index, size, seed_size):
    return index if index < size else index * size // seed_size


def _hooked(model, ids, mask=None):
    """The outputs of every layer's `c_attn` in one pass over the whole model, logits and all."""
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


def qkv_weights(job):
    from transformers import AutoModelForCausalLM

    models = {
        Path(folder).name: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in job["models"]
    }

    def matrices(model, layer):
        return torch.split(model.transformer.h[layer].attn.c_attn.weight.detach(), model.config.n_embd, dim=1)

    configs = [model.config for model in models.values()]
    figures = {
        "1": {
            "n_embd": np.array([config.n_embd for config in configs]),
            "n_layer": np.array([config.n_layer for config in configs]),
            "n_head": np.array([config.n_head for config in configs]),
            "head_dim": np.array([config.n_embd // config.n_head for config in configs]),
            "attention_parameters": np.array(
                [sum(p.numel() for b in m.transformer.h for p in b.attn.parameters()) / 1e6 for m in models.values()]
            ),
        }
    }
    for name, model in models.items():
        layers, width = model.config.n_layer, model.config.n_embd
        mean, std = np.zeros((layers, 3)), np.zeros((layers, 3))
        cosine_mean, cosine_std = np.zeros((layers, 3)), np.zeros((layers, 3))
        above = torch.triu(torch.ones(width, width), diagonal=1) == 1
        for layer in range(layers):
            for part, w in enumerate(matrices(model, layer)):
                mean[layer, part], std[layer, part] = w.mean(), w.std()
                unit = w / torch.norm(w, dim=0, keepdim=True)
                cosine = (unit.T @ unit)[above]
                cosine_mean[layer, part], cosine_std[layer, part] = cosine.mean(), cosine.std()
        figures.setdefault("3", {}).update({f"mean_{name}": mean, f"std_{name}": std})
        figures.setdefault("6", {}).update({f"mean_{name}": cosine_mean, f"std_{name}": cosine_std})

    name, model = next(iter(models.items()))
    layers, n_head, width = model.config.n_layer, model.config.n_head, model.config.n_embd
    layer, head_dim = min(6, layers - 1), width // n_head
    figures["2a"] = {"weights": model.transformer.h[layer].attn.c_attn.weight.detach().numpy()}
    figures["2b"] = {}
    for letter, w in zip("qkv", matrices(model, layer), strict=True):
        figures["2b"][f"counts_{letter}"], figures["2b"][f"edges_{letter}"] = _histogram(w.numpy(), "fd", density=False)
    edges = np.linspace(-0.8, 0.8, 81)
    density = np.zeros((layers, 3, 80))
    for each in range(layers):
        for part, w in enumerate(matrices(model, each)):
            density[each, part] = _histogram(w.numpy(), edges)[0]
    figures["2c"] = {"edges": edges, "density": density}
    figures["2d"] = {"mean": figures["3"][f"mean_{name}"], "std": figures["3"][f"std_{name}"]}

    heads = torch.split(matrices(model, layer)[0], head_dim, dim=1)
    figures["4a"] = {"heads": np.stack([head.numpy() for head in heads])}
    unit = heads[0] / torch.norm(heads[0], dim=0, keepdim=True)
    similarity = (unit.T @ unit).numpy()
    figures["4b"] = {"similarity": similarity, "values": similarity[np.triu_indices(head_dim, 1)]}
    figures["5a"] = {}
    edges = np.linspace(-0.4, 0.4, 101)
    density, mean, std = np.zeros((layers, 2, 2, 100)), np.zeros((layers, 2, 2)), np.zeros((layers, 2, 2))
    for each in range(layers):
        for part in range(2):
            for group, sample in enumerate(head_pair_cosines(matrices(model, each)[part], n_head)):
                density[each, part, group] = _histogram(sample, edges)[0]
                mean[each, part, group], std[each, part, group] = sample.mean(), sample.std()
                if each == layer:
                    ends = f"{'qk'[part]}_{('within', 'across')[group]}"
                    figures["5a"][f"density_{ends}"], figures["5a"][f"edges_{ends}"] = _histogram(sample, "fd")
    figures["5b"], figures["5c"] = {"edges": edges, "density": density}, {"mean": mean, "std": std}
    return figures


def attention_scores(job):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["models"][0], dtype=torch.float32).eval().to(job["device"])
    layers, n_head, width = model.config.n_layer, model.config.n_head, model.config.n_embd
    head_dim, layer = width // n_head, min(6, layers - 1)
    ids = torch.tensor([load_tokenizer(job["models"][0]).encode(job["texts"][0], add_special_tokens=False).ids])
    pos = ids.shape[1]
    kept = _hooked(model, ids)

    def heads(each):
        """Q and K, `[head, pos, head_dim]`."""
        q, k, _ = torch.split(kept[each][0], width, dim=-1)
        return q.view(pos, n_head, head_dim).transpose(0, 1), k.view(pos, n_head, head_dim).transpose(0, 1)

    sizes = np.arange(5, 101)
    generator = np.random.default_rng(0)
    products = [generator.normal(size=(n, n)) @ generator.normal(size=(n, n)) for n in sizes]
    figures = {
        "1": {
            "n": sizes,
            "raw": np.array([product.std() for product in products]),
            "scaled": np.array([(product / np.sqrt(len(product))).std() for product in products]),
        }
    }
    last = np.zeros((layers, 2, 100))
    score_edges, score_density = np.linspace(-15, 15, 201), np.zeros((layers, 200))
    mean, std = np.zeros(layers), np.zeros(layers)
    softmax_edges, softmax_density = np.zeros((layers, 202)), np.zeros((layers, 201))
    pattern_density = np.zeros((layers, 3, 90))
    for each in range(layers):
        q, k = heads(each)
        for group, sample in enumerate(last_token_scores(q, k)):
            last[each, group] = _histogram(sample, SCORE_EDGES)[0]
        scores = q @ k.transpose(-2, -1) / head_dim**0.5
        mean[each], std[each] = scores.mean(), scores.std()
        score_density[each] = _histogram(scores.flatten().numpy(), score_edges)[0]
        softmax = torch.softmax(scores, dim=-1).flatten().numpy()
        softmax_density[each], softmax_edges[each] = _histogram(softmax, 201)
        for group, sample in enumerate(causal_samples(q, k)):
            pattern_density[each, group] = _histogram(sample, PATTERN_EDGES)[0]
    q, k = heads(layer)
    within, across = last_token_scores(q, k)
    final, others, first = causal_samples(q, k)
    figures["3"] = {"q": q.numpy()}
    figures["4"] = {"within": within, "across": across}
    for name, sample in (("within", within), ("across", across)):
        figures["4"][f"density_{name}"], figures["4"][f"edges_{name}"] = _histogram(sample, "fd")
    figures["5a"] = {"edges": SCORE_EDGES, "density": last}
    figures["5b"] = {"edges": SCORE_EDGES, "mean": last.mean(axis=0), "std": last.std(axis=0)}
    figures["6"] = {
        "mean": mean,
        "std": std,
        "edges": score_edges,
        "density": score_density,
        "softmax_edges": softmax_edges,
        "softmax_density": softmax_density,
    }
    mask = torch.triu(torch.ones(5, 5), diagonal=1)
    softmax = torch.softmax(torch.zeros(5, 5).masked_fill(mask == 1, -torch.inf), dim=-1)
    figures["7a"] = {"mask": mask.numpy(), "softmax": softmax.numpy()}
    figures["7b"] = {"final_to_previous": final, "self_other": others, "self_first": first}
    figures["8"] = {"edges": PATTERN_EDGES, "density": pattern_density}
    wide_q, wide_k, _ = torch.split(kept[layer][0], width, dim=-1)
    by_head = torch.zeros(n_head, pos, pos)
    for head in range(n_head):
        by_head[head] = q[head] @ k[head].T / head_dim**0.5
    figures["9"] = {
        "all_heads": (wide_q @ wide_k.T / (head_dim**0.5 * n_head)).numpy(),
        "mean_of_heads": by_head.mean(dim=0).numpy(),
    }
    return figures


def token_frequency(job):
    from transformers import BertModel

    tokenizer = load_tokenizer(job["models"][0])
    model = BertModel.from_pretrained(job["models"][0], dtype=torch.float32).eval().to(job["device"])
    layers, n_head = model.config.num_hidden_layers, model.config.num_attention_heads
    head_dim, pos = model.config.hidden_size // n_head, model.config.max_position_embeddings

    documents = [json.loads(line)["text"] for line in Path(job["corpus"]).read_text().splitlines()]
    counts, counted = torch.zeros(model.config.vocab_size), 0
    for document in documents:
        tokens = tokenizer.encode(document, add_special_tokens=False).ids
        for token in tokens:
            counts[token] += 1
        counted += len(tokens)
        if counted >= job["tokens"]:
            break
    frequency = (counts.double() / counts.sum()).numpy()
    batch = []
    for document in documents:
        tokens = tokenizer.encode(document, add_special_tokens=False).ids
        if len(tokens) >= pos:
            batch.append(tokens[:pos])
        if len(batch) == job["batch"]:
            break
    batch = torch.tensor(batch)

    scores, adjustments = {}, {}

    def keep_scores(layer):
        def hook(module, inputs, output):
            q = module.query(inputs[0]).view(*batch.shape, n_head, head_dim).transpose(1, 2)
            k = module.key(inputs[0]).view(*batch.shape, n_head, head_dim).transpose(1, 2)
            scores[layer] = (q @ k.transpose(-2, -1) / head_dim**0.5).mean(dim=1).cpu().numpy()

        return hook

    def keep_adjustments(layer):
        return lambda module, inputs, output: adjustments.__setitem__(
            layer, torch.log(torch.linalg.norm(output, dim=-1)).cpu().numpy()
        )

    for layer, block in enumerate(model.encoder.layer):
        block.attention.self.register_forward_hook(keep_scores(layer))
        block.attention.output.dense.register_forward_hook(keep_adjustments(layer))
    with torch.no_grad():
        model(batch.to(job["device"]))

    with np.errstate(divide="ignore"):
        log_frequency = np.log(frequency)
    logs = log_frequency[batch.numpy()]
    r = np.array([np.corrcoef(logs[:, 1:].ravel(), adjustments[layer][:, 1:].ravel())[0, 1] for layer in range(layers)])
    shown = [0, layers // 2, layers - 1]

    def binned(sequence, layer, sums):
        edges = np.percentile(sums, np.linspace(0, 100, 41))
        values = scores[layer][sequence].ravel()
        # In a loop: `binned_statistic` refuses edges that repeat.
        index = np.clip(np.digitize(sums, edges) - 1, 0, 39)
        results = np.full((3, 40), np.nan)
        for place in range(40):
            inside = values[index == place]
            if len(inside):
                results[:, place] = (edges[place] + edges[place + 1]) / 2, inside.mean(), inside.std()
        return results

    by_layer, filled = np.zeros((3, layers, 40)), np.zeros((3, layers, 40))
    sequences = {"centres": [], "mean": [], "std": []}
    pairs = {"pair_log_frequency": [], "score": []}
    for sequence in range(len(batch)):
        sums = (logs[sequence][:, None] + logs[sequence][None, :]).ravel()
        pairs["pair_log_frequency"].append(sums[::500])
        pairs["score"].append(scores[5][sequence].ravel()[::500])
        for layer in range(layers):
            result = binned(sequence, layer, sums)
            by_layer[:, layer] += np.nan_to_num(result)
            filled[:, layer] += ~np.isnan(result)
            if layer == 7:
                edges = np.percentile(sums, np.linspace(0, 100, 41))
                for name, values in zip(sequences, ((edges[:-1] + edges[1:]) / 2, *result[1:]), strict=True):
                    sequences[name].append(values)
    by_layer /= filled
    sequences = {name: np.array(values) for name, values in sequences.items()}

    def correlation(x, y):
        there = ~np.isnan(y)
        return np.corrcoef(x[there], y[there])[0, 1]

    def correlations(centres, mean, std):
        return {
            "r_mean": np.array([correlation(x, y) for x, y in zip(centres, mean, strict=True)]),
            "r_std": np.array([correlation(x, y) for x, y in zip(centres, std, strict=True)]),
        }

    return {
        "1": {"counts": counts.numpy(), "log_frequency": np.where(counts > 0, log_frequency, np.nan)},
        "2": {"ids": batch.numpy()},
        "4a": {"log_frequency": logs, "adjustment": np.stack([adjustments[layer] for layer in shown]), "r": r[shown]},
        "4b": {"r": r},
        "5a": {"pair_log_frequency": logs[0][:, None] + logs[0][None, :]},
        "5b": {name: np.concatenate(values) for name, values in pairs.items()},
        "5-edges": {
            "percentile_edges": np.percentile(sums, np.linspace(0, 100, 41)),
            "linear_edges": np.linspace(sums.min(), sums.max(), 41),
        },
        "5c": sequences,
        "5d": correlations(**sequences),
        "6": dict(zip(("centres", "mean", "std"), by_layer, strict=True)) | correlations(*by_layer),
    }


def weight_tour(job):
    from scipy import stats
    from scipy.cluster.hierarchy import linkage
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(job["models"][0], dtype=torch.float32)
    state = model.state_dict()
    layers, width, n_head = model.config.n_layer, model.config.n_embd, model.config.n_head

    def attention(layer):
        return state[f"transformer.h.{layer}.attn.c_attn.weight"].numpy()

    positions = state["transformer.wpe.weight"].numpy()
    variance = np.var(positions, axis=0, dtype=np.float64)
    order = np.argsort(variance, kind="stable")
    chosen = [_nearest(dimension, width, 768) for dimension in (400, 600, 700)]
    varied = [order[0], order[len(order) // 2], order[-1]]
    figures = {
        "architecture": {"total_with_tied": np.array(sum(np.prod(tensor.shape) for tensor in state.values()))},
        "positions": {"positions": positions},
        "position-dimension": {"values": positions[:, _nearest(500, width, 768)]},
        "position-dimensions": {"dimensions": np.array(chosen), "values": positions[:, chosen].T},
        "position-variance": {"dimensions": np.array(varied), "values": positions[:, varied].T, "variance": variance},
        "position-correlation": {
            "r": np.array([stats.pearsonr(one, two)[0] for one, two in itertools.pairwise(positions)])
        },
    }
    weights = attention(0)
    flat = weights.flatten()
    mean, std = np.mean(flat, dtype=np.float64), np.std(flat, dtype=np.float64)
    density, edges = _histogram(flat, 50)
    test = stats.kstest(flat, "norm", args=(mean, std))
    figures["weight-histogram"] = {
        "density": density,
        "edges": edges,
        "mean": np.array(mean),
        "std": np.array(std),
        "skewness": np.array(stats.skew(flat.astype(np.float64))),
        "kurtosis": np.array(stats.kurtosis(flat.astype(np.float64))),
        "ks": np.array(test.statistic),
        "p": np.array(test.pvalue),
    }
    figures["weights"] = {"weights": weights}

    def window(top, bottom, left, right):
        top, bottom, left, right = (x if width >= 768 else x * width // 768 for x in (top, bottom, left, right))
        return weights[top:bottom, left:right]

    figures["weights-zoom"] = {"window_1": window(0, 300, 100, 300), "window_2": window(300, 600, 200, 400)}
    shown = [*range(3), *range(layers - 3, layers)]
    explained, rows, share = [], [], []
    for layer in shown:
        analysis = PCA()
        scores = analysis.fit_transform(StandardScaler().fit_transform(attention(layer)))
        explained.append(np.cumsum(analysis.explained_variance_ratio_))
        rows.append(scores[:, :2])
        share.append(analysis.explained_variance_ratio_[0])
    figures["pca-variance"] = {"layers": np.array(shown), "explained": np.array(explained)}
    figures["pca-scatter"] = {"layers": np.array(shown), "scores": np.array(rows), "explained": np.array(share)}
    all_layers = [attention(layer) for layer in range(layers)]
    figures["layer-statistics"] = {
        name: np.array([getattr(w, name)() for w in all_layers]) for name in ("mean", "std", "max", "min")
    }
    figures["row-variance"] = {"variance": np.array([np.var(w, axis=1) for w in all_layers])}

    def heads(layer):
        """W_Q of each head, `[head, embed, head_dim]`."""
        return attention(layer)[:, :width].reshape(width, n_head, -1).transpose(1, 0, 2)

    figures["query-heads"] = {"heads": heads(0).reshape(n_head, -1)}
    figures["head-clusters"] = {
        "layers": np.array(shown),
        "linkage": np.array([linkage([head.mean(axis=1) for head in heads(layer)], "ward") for layer in shown]),
    }
    signature = {name: np.zeros((layers, 3)) for name in ("ks", "kurtosis", "effective_rank", "largest_singular_value")}
    for layer in range(layers):
        for part, w in enumerate(np.split(attention(layer), 3, axis=1)):
            flat = w.ravel()
            signature["ks"][layer, part] = stats.kstest(flat, "norm", args=(flat.mean(), flat.std())).statistic
            signature["kurtosis"][layer, part] = stats.kurtosis(flat)
            values = np.linalg.svd(w, compute_uv=False)
            p = values / values.sum()
            signature["effective_rank"][layer, part] = np.exp(-(p * np.log(p)).sum())
            signature["largest_singular_value"][layer, part] = values[0]
    figures["training-signature"] = signature
    return figures


def token_similarity(job):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["models"][0], dtype=torch.float32).eval().to(job["device"])
    layers, width = model.config.n_layer, model.config.n_embd
    layer = min(6, layers - 1)
    tokenizer = load_tokenizer(job["models"][0])
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in job["texts"]]
    (token,) = tokenizer.encode(job["target"], add_special_tokens=False).ids
    pos = max(len(ids) for ids in encoded)
    ids = torch.tensor([[*each, *[0] * (pos - len(each))] for each in encoded])
    mask = torch.tensor([[1] * len(each) + [0] * (pos - len(each)) for each in encoded])
    kept = _hooked(model, ids, mask)

    group = np.repeat([1, 2, 3], width)
    matrix = np.triu(np.outer(group, group), 1)
    pairs = (1, 4, 9, 2, 3, 6)

    def samples(each):
        target, other = np.zeros((len(ids), 3 * width)), np.zeros((len(ids), 3 * width))
        for sentence, tokens in enumerate(encoded):
            place = tokens.index(token)
            target[sentence], other[sentence] = kept[each][sentence, place], kept[each][sentence, place - 1]
        return target, other

    def cosines(x):
        x = x / np.linalg.norm(x, axis=0, keepdims=True)
        return x.T @ x

    def correlations(x):
        return cosines(x - x.mean(axis=0, keepdims=True))

    def densities(similarity):
        return np.array([_histogram(similarity[matrix == product], CORRELATION_EDGES)[0] for product in pairs])

    target, other = samples(layer)
    above = np.triu_indices(3 * width, 1)
    figures = {"pairs": {"target": target}, "mask": {"vector": group, "matrix": matrix}}
    for name, measure in (("cosine", cosines), ("correlation", correlations)):
        similarity = measure(target)
        counts, edges = np.histogram(similarity[above], bins=100)
        figures[name] = {"similarity": similarity, "values": similarity[above], "counts": counts, "edges": edges}
    permuted = np.random.default_rng(0).permutation(target.ravel()).reshape(target.shape)
    similarity = figures["correlation"]["similarity"]
    figures["distributions"] = {
        "edges": CORRELATION_EDGES,
        "target": densities(similarity),
        "non_target": densities(correlations(other)),
        "random": _histogram(cosines(permuted)[above], CORRELATION_EDGES)[0],
    }
    figures["means"] = {"mean": target.mean(axis=0)}
    figures["pair-order"] = {"values": similarity[:width, :width][np.triu_indices(width, 1)][:20_000]}
    laminar = {"target": [], "non_target": [], "mean": [], "variance": []}
    for each in range(layers):
        target, other = samples(each)
        laminar["target"].append(densities(correlations(target)))
        laminar["non_target"].append(densities(correlations(other)))
        parts = target.reshape(len(target), 3, width)
        laminar["mean"].append(parts.mean(axis=(0, 2)))
        laminar["variance"].append(parts.var(axis=(0, 2)))
    figures["laminar"] = {"edges": CORRELATION_EDGES} | {name: np.array(each) for name, each in laminar.items()}
    return figures
