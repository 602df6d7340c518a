"""Study 6: Q, K and V at a word and before it, one pass of many rows of tokens."""

import numpy as np
import torch

from baselines import load_tokenizer
from baselines import tuned as fast
from baselines.parts import histogram, host, qkv_by_layer, run_layers, shown_layer

SHOWN_EDGES, EDGES = np.linspace(-7, 7, 234), np.linspace(-4, 4, 101)
NAMES = ("mean", "l1", "variance")


def _rows(job):
    """Returns the tokens before each occurrence of the target, and the target, `[row, context + 1]`."""
    tokenizer, context = load_tokenizer(job["models"][0]), job["context"]
    (token,) = tokenizer.encode(job["target"], add_special_tokens=False).ids
    ids = tokenizer.encode(job["texts"][0], add_special_tokens=False).ids
    rows = [ids[place - context : place + 1] for place in range(context, len(ids)) if ids[place] == token]
    return torch.tensor(rows[: job["rows"]])


def notebook(job):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["models"][0], dtype=torch.float32).eval().to(job["device"])
    layers, n_head = model.config.n_layer, model.config.n_head
    shown = shown_layer(6, layers)
    kept = qkv_by_layer(model, _rows(job))
    count = len(kept[0])
    measures = np.zeros((3, layers, count, 3, 2))
    density, std = np.zeros((layers, 3, 2, 100)), np.zeros((layers, 3))
    shown_density = np.zeros((3, 2, 233))
    for layer in range(layers):
        for part, x in enumerate(kept[layer].chunk(3, dim=-1)):
            values = x.numpy()
            std[layer, part] = values.std(axis=1, ddof=1).mean()
            for side in range(2):
                vectors = values[:, -1 - side]
                density[layer, part, side] = histogram(vectors.ravel(), EDGES)[0]
                if layer == shown:
                    shown_density[part, side] = histogram(vectors.ravel(), SHOWN_EDGES)[0]
                for row in range(count):
                    vector = vectors[row]
                    found = vector.mean(), np.abs(vector).mean(), vector.var(ddof=1)
                    measures[:, layer, row, part, side] = found
    averages = measures.mean(axis=2)
    rows = np.moveaxis(measures[..., 0] - measures[..., 1], 0, -1)
    generator, means = np.random.default_rng(0), []
    for _ in range(job["permutations"]):
        means.append(rows[:, generator.integers(0, count, count)].mean(axis=1))
    low, high = np.percentile(means, (2.5, 97.5), axis=0)
    q = kept[shown][0].chunk(3, dim=-1)[0]
    return {
        "1": {"activations": kept[shown][:, -1].numpy()},
        "2a": dict(zip(NAMES, averages[:, shown], strict=True)),
        "2b": {"edges": SHOWN_EDGES, "density": shown_density},
        "3a": dict(zip(NAMES, averages, strict=True)),
        "3b": {"difference": rows.mean(axis=1), "low": low, "high": high},
        "4": {"edges": EDGES, "density": density},
        "5a": {"q": q.unflatten(1, (n_head, -1)).transpose(0, 1).numpy()},
        "5b": {"std": std},
    }


@torch.inference_mode()
def tuned(job):
    from transformers import GPT2Model

    model = GPT2Model.from_pretrained(job["models"][0], dtype=torch.float32).eval().to(job["device"])
    layers, n_head = model.config.n_layer, model.config.n_head
    shown, kept = shown_layer(6, layers), {}

    def reduce(layer, output):
        x = output.unflatten(-1, (3, -1))
        sides = x[:, -2:].flip(1).transpose(1, 2)  # [row, qkv, target and the one before, embed]
        samples = [sides[:, part, side] for part in range(3) for side in range(2)]
        if layer == shown:
            kept.update(last=output[:, -1], q=x[0, :, 0], density=fast.densities(samples, SHOWN_EDGES))
        measures = torch.stack([sides.mean(dim=-1), sides.abs().mean(dim=-1), sides.var(dim=-1)], dim=-1)
        return measures, fast.densities(samples, EDGES).view(3, 2, -1), x.std(dim=1).mean(dim=(0, 2))

    ids = _rows(job).to(job["device"])
    results = run_layers(model, [block.attn.c_attn for block in model.h], ids, None, reduce)
    measures, density, std = map(torch.stack, zip(*results, strict=True))
    averages = measures.mean(dim=1)
    rows = measures[:, :, :, 0] - measures[:, :, :, 1]
    taken = torch.randint(len(ids), (job["permutations"], len(ids)), device=ids.device)
    weights = torch.nn.functional.one_hot(taken, len(ids)).float().mean(dim=1)
    means = torch.einsum("sr,lrqm->slqm", weights, rows)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], device=ids.device), dim=0)
    return host(
        {
            "1": {"activations": kept["last"]},
            "2a": dict(zip(NAMES, averages[shown].unbind(-1), strict=True)),
            "2b": {"edges": SHOWN_EDGES, "density": kept["density"].view(3, 2, -1)},
            "3a": dict(zip(NAMES, averages.unbind(-1), strict=True)),
            "3b": {"difference": rows.mean(dim=1), "low": low, "high": high},
            "4": {"edges": EDGES, "density": density},
            "5a": {"q": kept["q"].unflatten(1, (n_head, -1)).transpose(0, 1)},
            "5b": {"std": std},
        }
    )
