"""Study 3: a corpus counted, and BERT's scores and adjustments of a batch."""

import contextlib
import json
from pathlib import Path

import numpy as np
import torch

from baselines import load_tokenizer
from baselines import tuned as fast
from baselines.parts import host
from baselines.tuned import Done


def notebook(job):
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
        # A loop, because `binned_statistic` refuses edges that repeat.
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


@torch.inference_mode()
def tuned(job):
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
    # Bins between edges that repeat are empty, and left out of averages and correlations.
    centres = torch.where(sizes > 0, (edges[:, 1:] + edges[:, :-1]) / 2, torch.nan)

    def moments(scores, bins, sizes):
        """Returns mean and standard deviation in each bin, `[sequence, bin]`, about the sequence's mean."""
        values = scores.flatten(1)
        centre = values.mean(dim=1, keepdim=True)
        values = values - centre
        mean = torch.zeros_like(sizes).scatter_add_(1, bins, values) / sizes
        squares = torch.zeros_like(sizes).scatter_add_(1, bins, (values - mean.gather(1, bins)) ** 2)
        return mean + centre, (squares / sizes).sqrt()

    def run(ids, bins, sizes):
        """Returns moments and adjustments by layer, and every 500th score of layer 5, of some sequences."""
        queries, kept = {}, {}
        binned, adjustments = [], []

        def query(module, inputs, output):
            queries["q"] = output

        def key(layer):
            def reduce(module, inputs, output):
                # The mean over heads is one product of the whole width.
                scores = queries["q"] @ output.transpose(1, 2) / (head_dim**0.5 * n_head)
                if layer == 5:
                    kept["score"] = scores.flatten(1)[:, ::500]
                binned.append(moments(scores, bins, sizes))

            return reduce

        def adjust(layer):
            def reduce(module, inputs, output):
                adjustments.append(torch.linalg.vector_norm(output, dim=-1).log())
                if layer == layers - 1:
                    raise Done

            return reduce

        handles = []
        for layer, block in enumerate(model.encoder.layer):
            handles.append(block.attention.self.query.register_forward_hook(query))
            handles.append(block.attention.self.key.register_forward_hook(key(layer)))
            handles.append(block.attention.output.dense.register_forward_hook(adjust(layer)))
        with contextlib.suppress(Done):
            model(ids)
        for handle in handles:
            handle.remove()
        mean, std = (torch.stack(each) for each in zip(*binned, strict=True))
        return mean.cpu(), std.cpu(), torch.stack(adjustments).cpu(), kept["score"].cpu()

    piece = fast.PIECE if job["device"] == "cpu" else len(batch)
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
    return host(
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
