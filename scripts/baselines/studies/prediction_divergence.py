"""Study 8: what attention adds where the next token is predicted and where not, against permuted predictions."""

import numpy as np
import torch

from baselines import load_tokenizer
from baselines.parts import histogram, host, shown_layer
from baselines.tuned import permuted_divergences

BINS, WINDOW = 30, 50


def _tokens(job, positions):
    """Returns tokens from the middle of the text on, the next token of each, and the characters of these."""
    tokenizer = load_tokenizer(job["models"][0])
    ids = tokenizer.encode(job["texts"][0], add_special_tokens=False).ids
    start = len(ids) // 2
    length = min(job.get("length", positions), positions, len(ids) - start - 1)
    after = ids[start + 1 : start + length + 1]
    return torch.tensor([ids[start : start + length]]), after, [len(tokenizer.decode([token])) for token in after]


def _divergence(one, other):
    """Returns the Jensen–Shannon divergence of two histograms."""
    one, other = one / one.sum(), other / other.sum()
    middle = (one + other) / 2
    parts = [part[part > 0] * np.log(part[part > 0] / middle[part > 0]) for part in (one, other)]
    return (parts[0].sum() + parts[1].sum()) / 2


def _p(null, observed):
    return (1 + (null >= observed).sum(axis=0)) / (1 + len(null))


def _first(correct, lengths):
    """Returns figures 2a and 2b, which both sides compute alike."""
    share = [correct[max(0, place + 1 - WINDOW) : place + 1].mean() for place in range(len(correct))]
    lengths = np.array(lengths)
    second = {"length": lengths, "mean": np.array([lengths[correct].mean(), lengths[~correct].mean()])}
    for name, chosen in (("correct", correct), ("incorrect", ~correct)):
        second[f"density_{name}"], second[f"edges_{name}"] = histogram(lengths[chosen], "fd")
    return {"2a": {"correct": correct, "share": np.array(share)}, "2b": second}


def _shown(norms, correct):
    """Returns figures 3 and 4 of one layer: histograms, and divergences by the number of edges."""
    edges = np.linspace(norms.min(), norms.max(), BINS + 1)
    counts = np.arange(10, 51)
    pairs = [
        [np.histogram(norms[chosen], np.linspace(norms.min(), norms.max(), count))[0] for chosen in (correct, ~correct)]
        for count in counts
    ]
    shares = [np.histogram(norms[chosen], edges)[0] / chosen.sum() for chosen in (correct, ~correct)]
    return {
        "3": {"edges": edges, "correct_probability": shares[0], "incorrect_probability": shares[1]},
        "4": {"edges_count": counts, "divergence": np.array([_divergence(*pair) for pair in pairs])},
    }


def notebook(job):
    from scipy.stats import false_discovery_control
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["models"][0], dtype=torch.float32).eval().to(job["device"])
    ids, after, lengths = _tokens(job, model.config.n_positions)
    kept = {}
    for layer, block in enumerate(model.transformer.h):
        block.attn.c_proj.register_forward_hook(
            lambda module, inputs, output, layer=layer: kept.__setitem__(layer, output[0].detach().cpu().numpy())
        )
    with torch.no_grad():
        logits = model(ids.to(job["device"])).logits[0].cpu().numpy()
    correct = logits.argmax(axis=-1) == np.array(after)
    layers, shown = len(kept), shown_layer(4, len(kept))
    norms = np.array([np.log(np.linalg.norm(kept[layer], axis=-1)) for layer in range(layers)])
    generator = np.random.default_rng(0)
    shifts = generator.permutation(np.arange(1, len(correct)))[: job["permutations"]]
    mean = np.zeros((layers, 2))
    divergence, difference = np.zeros(layers), np.zeros(layers)
    null, null_difference = np.zeros((job["permutations"], layers)), np.zeros((job["permutations"], layers))
    shifted = np.zeros((len(shifts), layers))
    for layer in range(layers):
        values = norms[layer]
        edges = np.linspace(values.min(), values.max(), BINS + 1)

        def compare(flags, values=values, edges=edges):
            one, other = values[flags], values[~flags]
            histograms = (np.histogram(sample, edges)[0] for sample in (one, other))
            return _divergence(*histograms), one.mean() - other.mean()

        mean[layer] = values[correct].mean(), values[~correct].mean()
        divergence[layer], difference[layer] = compare(correct)
        for row in range(job["permutations"]):
            null[row, layer], null_difference[row, layer] = compare(generator.permutation(correct))
        for row, shift in enumerate(shifts):
            shifted[row, layer] = compare(np.roll(correct, shift))[0]
    p, difference_p = _p(null, divergence), _p(np.abs(null_difference), np.abs(difference))
    q = false_discovery_control(np.concatenate([p, difference_p]))
    counts, edges = histogram(null[:, shown], "fd", density=False)
    return {
        **_first(correct, lengths),
        **_shown(norms[shown], correct),
        "5": {
            "null": null[:, shown],
            "observed": divergence[shown],
            "p": p[shown],
            "counts": counts,
            "edges": edges,
        },
        "6": {
            "mean": mean,
            "divergence": divergence,
            "difference": difference,
            "p": p,
            "q_value": q[:layers],
            "difference_p": difference_p,
            "difference_q_value": q[layers:],
            "p_shift": _p(shifted, divergence),
            "null_mean": null.mean(axis=0),
            "null_low": null.min(axis=0),
            "null_high": null.max(axis=0),
        },
    }


@torch.inference_mode()
def tuned(job):
    from scipy.stats import false_discovery_control
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(job["models"][0], dtype=torch.float32).eval().to(job["device"])
    ids, after, lengths = _tokens(job, model.config.n_positions)
    norms = []
    for block in model.transformer.h:
        block.attn.c_proj.register_forward_hook(
            lambda module, inputs, output: norms.append(torch.linalg.vector_norm(output[0], dim=-1).log())
        )
    predicted = model(ids.to(job["device"]), use_cache=False).logits[0].argmax(dim=-1)
    norms = torch.stack(norms)
    flags = predicted == torch.tensor(after, device=predicted.device)
    layers, shown = len(norms), shown_layer(4, len(norms))
    count, n = job["permutations"], len(flags)
    permuted = flags[torch.rand(count, n, device=flags.device).argsort(dim=1)]
    shifts = torch.randperm(n - 1, device=flags.device)[:count] + 1
    shifted = flags[(torch.arange(n, device=flags.device)[None] - shifts[:, None]) % n]
    every = torch.cat([flags[None], permuted, shifted]).float()
    divergences = permuted_divergences(every, norms, BINS)
    centred = norms - norms.mean(dim=1, keepdim=True)
    differences = every @ centred.T / flags.sum() - (1 - every) @ centred.T / (~flags).sum()
    observed, null = divergences[0], divergences[1 : count + 1]
    difference, null_difference = differences[0], differences[1 : count + 1]
    rounded = 64 * torch.finfo(torch.float32).eps  # rounding of products does not count as less

    def p(null, observed):
        return (1 + (null >= observed * (1 - rounded)).sum(dim=0)) / (1 + len(null))

    by_divergence, by_difference = p(null, observed), p(null_difference.abs(), difference.abs())
    q = false_discovery_control(torch.cat([by_divergence, by_difference]).cpu().numpy())
    counts, edges = np.histogram(null[:, shown].cpu().numpy(), "fd")
    correct = flags.cpu().numpy()
    means = [(norms * chosen).sum(dim=1) / chosen.sum() for chosen in (flags, ~flags)]
    return host(
        {
            **_first(correct, lengths),
            **_shown(norms[shown].cpu().numpy(), correct),
            "5": {
                "null": null[:, shown],
                "observed": observed[shown],
                "p": by_divergence[shown],
                "counts": counts,
                "edges": edges,
            },
            "6": {
                "mean": torch.stack(means, dim=1),
                "divergence": observed,
                "difference": difference,
                "p": by_divergence,
                "q_value": q[:layers],
                "difference_p": by_difference,
                "difference_q_value": q[layers:],
                "p_shift": p(divergences[count + 1 :], observed),
                "null_mean": null.mean(dim=0),
                "null_low": null.amin(dim=0),
                "null_high": null.amax(dim=0),
            },
        }
    )
