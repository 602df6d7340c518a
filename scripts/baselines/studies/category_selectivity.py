"""Study 9: similarities of words within and across categories, one pass of a sentence a word."""

import numpy as np
import torch

from baselines import load_tokenizer
from baselines.parts import histogram, host, qkv_by_layer, run_layers, shown_layer

CONTEXT = "The next word is "
PAIRS = ((0, 1), (0, 2), (1, 2))


def _words(job):
    """Returns ids and mask of the texts, padded on the right, the place of each word's last token, and its category."""
    tokenizer = load_tokenizer(job["models"][0])
    names = [line.split()[0] for line in job["texts"]]
    words = [line.split()[1] for line in job["texts"]]
    encoded = [torch.tensor(tokenizer.encode(CONTEXT + word, add_special_tokens=False).ids) for word in words]
    mask = [torch.ones(len(each), dtype=torch.long) for each in encoded]
    ids, mask = (torch.nn.utils.rnn.pad_sequence(each, batch_first=True) for each in (encoded, mask))
    return ids, mask, mask.sum(dim=1) - 1, np.array([sorted(set(names), key=names.index).index(name) for name in names])


def _masks(category):
    same = category[:, None] == category[None]
    upper = np.triu(np.ones_like(same), 1)
    return {"same": same, "upper": upper, "within": same & upper, "across": ~same & upper}


def notebook(job):
    from scipy.stats import false_discovery_control, ttest_ind
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["models"][0], dtype=torch.float32).eval().to(job["device"])
    ids, mask, places, category = _words(job)
    kept = qkv_by_layer(model, ids, mask)
    layers, count = len(kept), len(ids)
    shown, masks = shown_layer(6, layers), _masks(category)
    above = np.triu_indices(count, 1)
    activations = np.zeros((layers, 3, count, model.config.n_embd), np.float32)
    similarity = np.zeros((layers, 3, count, count), np.float32)
    r, rsa = np.zeros((layers, 3)), np.zeros((layers, 3))
    results = {name: np.zeros((layers, 3)) for name in ("difference", "t", "average", "p")}
    low, high = np.zeros((layers, 3)), np.zeros((layers, 3))
    generator = np.random.default_rng(0)

    for layer in range(layers):
        for part, x in enumerate(kept[layer].chunk(3, dim=-1)):
            for word in range(count):
                activations[layer, part, word] = x[word, places[word]]
            unit = activations[layer, part] / np.linalg.norm(activations[layer, part], axis=1, keepdims=True)
            similarity[layer, part] = unit @ unit.T
            within, across = (similarity[layer, part][masks[kind]] for kind in ("within", "across"))
            results["difference"][layer, part] = within.mean() - across.mean()
            results["average"][layer, part] = (within.mean() + across.mean()) / 2
            results["t"][layer, part] = ttest_ind(within, across).statistic
            null = np.zeros(job["permutations"])
            for row in range(job["permutations"]):
                permuted = _masks(generator.permutation(category))
                x = similarity[layer, part]
                null[row] = x[permuted["within"]].mean() - x[permuted["across"]].mean()
            results["p"][layer, part] = (1 + (null >= results["difference"][layer, part]).sum()) / (1 + len(null))
        for pair, (a, b) in enumerate(PAIRS):
            r[layer, pair] = np.corrcoef(activations[layer, a].ravel(), activations[layer, b].ravel())[0, 1]
            one, other = similarity[layer, a], similarity[layer, b]
            rsa[layer, pair] = np.corrcoef(one[above], other[above])[0, 1]
            resampled = np.zeros(job["permutations"])
            for row in range(job["permutations"]):
                taken = generator.integers(0, count, count)
                pairs = [(i, j) for i, j in zip(taken[above[0]], taken[above[1]], strict=True) if i != j]
                first, second = np.array(pairs).T
                resampled[row] = np.corrcoef(one[first, second], other[first, second])[0, 1]
            low[layer, pair], high[layer, pair] = np.percentile(resampled, (2.5, 97.5))
    fifth = {"t": results["t"][shown]}
    for part, name in enumerate("qkv"):
        for kind in ("within", "across"):
            sample = similarity[shown, part][masks[kind]]
            fifth[f"density_{kind}_{name}"], fifth[f"edges_{kind}_{name}"] = histogram(sample, "fd")
    results["q_value"] = false_discovery_control(results["p"].ravel()).reshape(layers, 3)
    return {
        "1": masks,
        "2a": {"activations": activations[shown], "r": r[shown]},
        "2b": {"r": r},
        "3a": {"similarity": similarity[shown]},
        "3b": {"values": similarity[shown][:, *above], "r": rsa[shown]},
        "4": {"rsa": rsa, "low": low, "high": high},
        "5": fifth,
        "6a": results,
    }


def _correlation(x, y, weights):
    """Returns weighted correlations `[sample, row]` of `x` and `y` `[row, pair]`, with weights `[sample, pair]`."""
    weights = weights / weights.sum(dim=1, keepdim=True)
    x, y = x - x.mean(dim=1, keepdim=True), y - y.mean(dim=1, keepdim=True)
    mean_x, mean_y = weights @ x.T, weights @ y.T
    covariance = weights @ (x * y).T - mean_x * mean_y
    return covariance / ((weights @ (x**2).T - mean_x**2) * (weights @ (y**2).T - mean_y**2)).sqrt()


def _selectivity(values, within):
    """Returns difference, t and average of values `[layer, qkv, pair]`."""
    one, other = (values[..., chosen].double() for chosen in (within, ~within))
    means = one.mean(dim=-1), other.mean(dim=-1)
    squares = (one.var(dim=-1) * (one.shape[-1] - 1)) + (other.var(dim=-1) * (other.shape[-1] - 1))
    scale = squares / (values.shape[-1] - 2) * (1 / one.shape[-1] + 1 / other.shape[-1])
    difference = means[0] - means[1]
    return {"difference": difference, "t": difference / scale.sqrt(), "average": (means[0] + means[1]) / 2}


@torch.inference_mode()
def tuned(job):
    from scipy.stats import false_discovery_control
    from transformers import GPT2Model

    model = GPT2Model.from_pretrained(job["models"][0], dtype=torch.float32).eval().to(job["device"])
    ids, mask, places, category = _words(job)
    count, shown = len(ids), shown_layer(6, model.config.n_layer)
    words, kept = torch.arange(count), {}

    def reduce(layer, output):
        x = output[words, places].unflatten(1, (3, -1)).transpose(0, 1)
        if layer == shown:
            kept["activations"] = x
        unit = x / torch.linalg.norm(x, dim=-1, keepdim=True)
        r = torch.corrcoef(x.flatten(1))
        return unit @ unit.transpose(1, 2), torch.stack([r[a, b] for a, b in PAIRS])

    modules = [block.attn.c_attn for block in model.h]
    results = run_layers(model, modules, ids.to(job["device"]), mask.to(job["device"]), reduce)
    similarity, r = map(torch.stack, zip(*results, strict=True))
    device, layers, n = similarity.device, len(similarity), job["permutations"]
    first, second = torch.triu_indices(count, count, 1, device=device)
    values = similarity[:, :, first, second]
    label = torch.tensor(category, device=device)
    within = label[first] == label[second]
    found = _selectivity(values, within)
    permuted = label[torch.rand(n, count, device=device).argsort(dim=1)]
    inside = (permuted[:, first] == permuted[:, second]).float()
    flat = (values - values.mean(dim=-1, keepdim=True)).flatten(0, 1)
    sums, size = inside @ flat.T, inside.sum(dim=1, keepdim=True)
    null = (sums / size - (flat.sum(dim=1) - sums) / (flat.shape[1] - size)).view(n, layers, 3)
    p = (1 + (null >= found["difference"]).sum(dim=0)) / (1 + n)
    taken = torch.nn.functional.one_hot(torch.randint(count, (n, count), device=device), count).sum(dim=1).float()
    weights = taken[:, first] * taken[:, second]
    every = torch.ones(1, len(first), device=device)
    rsa = torch.stack([_correlation(values[:, a], values[:, b], every)[0] for a, b in PAIRS], dim=1)
    resampled = torch.stack([_correlation(values[:, a], values[:, b], weights) for a, b in PAIRS], dim=2)
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], device=device), dim=0)
    fifth = {"t": found["t"][shown]}
    for part, name in enumerate("qkv"):
        for kind, chosen in (("within", within), ("across", ~within)):
            sample = values[shown, part, chosen].cpu().numpy()
            fifth[f"density_{kind}_{name}"], fifth[f"edges_{kind}_{name}"] = np.histogram(sample, "fd", density=True)
    q = false_discovery_control(p.cpu().numpy().ravel()).reshape(layers, 3)
    return host(
        {
            "1": _masks(category),
            "2a": {"activations": kept["activations"], "r": r[shown]},
            "2b": {"r": r},
            "3a": {"similarity": similarity[shown]},
            "3b": {"values": values[shown], "r": rsa[shown]},
            "4": {"rsa": rsa, "low": low, "high": high},
            "5": fifth,
            "6a": found | {"p": p, "q_value": q},
        }
    )
