"""Study 1: weights alone."""

from pathlib import Path

import numpy as np
import torch

from baselines import notebook as loops
from baselines import tuned as fast
from baselines.parts import Weights, freedman_diaconis, histogram, host, shown_layer


def notebook(job):
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
    layer, head_dim = shown_layer(6, layers), width // n_head
    figures["2a"] = {"weights": model.transformer.h[layer].attn.c_attn.weight.detach().numpy()}
    figures["2b"] = {}
    for letter, w in zip("qkv", matrices(model, layer), strict=True):
        figures["2b"][f"counts_{letter}"], figures["2b"][f"edges_{letter}"] = histogram(w.numpy(), "fd", density=False)
    edges = np.linspace(-0.8, 0.8, 81)
    density = np.zeros((layers, 3, 80))
    for each in range(layers):
        for part, w in enumerate(matrices(model, each)):
            density[each, part] = histogram(w.numpy(), edges)[0]
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
            for group, sample in enumerate(loops.head_pair_cosines(matrices(model, each)[part], n_head)):
                density[each, part, group] = histogram(sample, edges)[0]
                mean[each, part, group], std[each, part, group] = sample.mean(), sample.std()
                if each == layer:
                    ends = f"{'qk'[part]}_{('within', 'across')[group]}"
                    figures["5a"][f"density_{ends}"], figures["5a"][f"edges_{ends}"] = histogram(sample, "fd")
    figures["5b"], figures["5c"] = {"edges": edges, "density": density}, {"mean": mean, "std": std}
    return figures


@torch.inference_mode()
def tuned(job):
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
                cosines[:, layer, part] = fast.column_cosine_moments(w)
        figures["3"] |= {f"mean_{name}": moments[0], f"std_{name}": moments[1]}
        figures["6"] |= {f"mean_{name}": cosines[0], f"std_{name}": cosines[1]}

    name, first = next(iter(files.items()))
    layers, width, head_dim = first.layers, first.width, first.width // first.n_head
    drawn = shown_layer(6, layers)
    wide_edges, pair_edges = np.linspace(-0.8, 0.8, 81), np.linspace(-0.4, 0.4, 101)
    wide_density = torch.zeros(layers, 3, 80)
    density, pair_mean, pair_std = torch.zeros(layers, 2, 2, 100), torch.zeros(layers, 2, 2), torch.zeros(layers, 2, 2)
    for layer in range(layers):
        parts = first.attention(layer).split(width, dim=1)
        wide_density[layer] = fast.densities(parts, wide_edges)
        for part in range(2):
            samples = fast.head_pair_cosines(parts[part], first.n_head)
            density[layer, part] = fast.densities(samples, pair_edges)
            for group, sample in enumerate(samples):
                pair_std[layer, part, group], pair_mean[layer, part, group] = torch.std_mean(sample, correction=0)
    matrices = first.attention(drawn)
    parts = matrices.split(width, dim=1)
    figures["2a"] = {"weights": matrices}
    figures["2b"], figures["5a"] = {}, {}
    for letter, w in zip("qkv", parts, strict=True):
        figures["2b"][f"counts_{letter}"], figures["2b"][f"edges_{letter}"] = freedman_diaconis(w, density=False)
    figures["2c"] = {"edges": wide_edges, "density": wide_density}
    figures["2d"] = {"mean": figures["3"][f"mean_{name}"], "std": figures["3"][f"std_{name}"]}
    heads = parts[0].view(width, first.n_head, head_dim).transpose(0, 1)
    unit = heads[0] / torch.linalg.norm(heads[0], dim=0, keepdim=True)
    similarity = unit.T @ unit
    above = torch.ones(head_dim, head_dim, dtype=torch.bool, device=w.device).triu(1)
    figures["4a"] = {"heads": heads}
    figures["4b"] = {"similarity": similarity, "values": similarity[above]}
    for part in range(2):
        for group, sample in enumerate(fast.head_pair_cosines(parts[part], first.n_head)):
            ends = f"{'qk'[part]}_{('within', 'across')[group]}"
            figures["5a"][f"density_{ends}"], figures["5a"][f"edges_{ends}"] = freedman_diaconis(sample)
    figures["5b"], figures["5c"] = {"edges": pair_edges, "density": density}, {"mean": pair_mean, "std": pair_std}
    return host(figures)
