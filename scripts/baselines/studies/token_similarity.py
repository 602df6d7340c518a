"""Study 5: one pass of sentences, correlations of dimensions of Q, K and V."""

import numpy as np
import torch

from baselines import CORRELATION_EDGES, load_tokenizer
from baselines import tuned as fast
from baselines.parts import histogram, host, qkv_by_layer, run_layers, shown_layer


def notebook(job):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["models"][0], dtype=torch.float32).eval().to(job["device"])
    layers, width = model.config.n_layer, model.config.n_embd
    layer = shown_layer(6, layers)
    tokenizer = load_tokenizer(job["models"][0])
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in job["texts"]]
    (token,) = tokenizer.encode(job["target"], add_special_tokens=False).ids
    pos = max(len(ids) for ids in encoded)
    ids = torch.tensor([[*each, *[0] * (pos - len(each))] for each in encoded])
    mask = torch.tensor([[1] * len(each) + [0] * (pos - len(each)) for each in encoded])
    kept = qkv_by_layer(model, ids, mask)

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
        return np.array([histogram(similarity[matrix == product], CORRELATION_EDGES)[0] for product in pairs])

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
        "random": histogram(cosines(permuted)[above], CORRELATION_EDGES)[0],
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


@torch.inference_mode()
def tuned(job):
    from transformers import GPT2Model

    model = GPT2Model.from_pretrained(job["models"][0], dtype=torch.float32).eval().to(job["device"])
    layers, width = model.config.n_layer, model.config.n_embd
    drawn = shown_layer(6, layers)
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
            fast.group_densities(target, CORRELATION_EDGES),
            fast.group_densities(other, CORRELATION_EDGES),
            thirds.mean(dim=(0, 2)),
            thirds.var(dim=(0, 2), correction=0),
        )

    modules = [block.attn.c_attn for block in model.h]
    results = run_layers(model, modules, ids.to(job["device"]), mask.to(job["device"]), reduce)
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
        counts = fast.densities((values,), edges)[0].cpu().numpy() * np.diff(edges) * len(values)
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
            "random": fast.densities((cosines(permuted)[above],), CORRELATION_EDGES)[0],
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
    return host(figures)
