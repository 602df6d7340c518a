"""Study 2: one pass of a text, Q and K of every layer."""

import numpy as np
import torch

from baselines import PATTERN_EDGES, SCORE_EDGES, load_tokenizer
from baselines import notebook as loops
from baselines import tuned as fast
from baselines.parts import freedman_diaconis, histogram, host, qkv_by_layer, run_layers, shown_layer


def notebook(job):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["models"][0], dtype=torch.float32).eval().to(job["device"])
    layers, n_head, width = model.config.n_layer, model.config.n_head, model.config.n_embd
    head_dim, layer = width // n_head, shown_layer(6, layers)
    ids = torch.tensor([load_tokenizer(job["models"][0]).encode(job["texts"][0], add_special_tokens=False).ids])
    pos = ids.shape[1]
    kept = qkv_by_layer(model, ids)

    def heads(each):
        """Returns Q and K, `[head, pos, head_dim]`."""
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
        for group, sample in enumerate(loops.last_token_scores(q, k)):
            last[each, group] = histogram(sample, SCORE_EDGES)[0]
        scores = q @ k.transpose(-2, -1) / head_dim**0.5
        mean[each], std[each] = scores.mean(), scores.std()
        score_density[each] = histogram(scores.flatten().numpy(), score_edges)[0]
        softmax = torch.softmax(scores, dim=-1).flatten().numpy()
        softmax_density[each], softmax_edges[each] = histogram(softmax, 201)
        for group, sample in enumerate(loops.causal_samples(q, k)):
            pattern_density[each, group] = histogram(sample, PATTERN_EDGES)[0]
    q, k = heads(layer)
    within, across = loops.last_token_scores(q, k)
    final, others, first = loops.causal_samples(q, k)
    figures["3"] = {"q": q.numpy()}
    figures["4"] = {"within": within, "across": across}
    for name, sample in (("within", within), ("across", across)):
        figures["4"][f"density_{name}"], figures["4"][f"edges_{name}"] = histogram(sample, "fd")
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


@torch.inference_mode()
def tuned(job):
    from transformers import GPT2Model

    model = GPT2Model.from_pretrained(job["models"][0], dtype=torch.float32).eval().to(job["device"])
    layers, n_head, width = model.config.n_layer, model.config.n_head, model.config.n_embd
    head_dim, drawn = width // n_head, shown_layer(6, layers)
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
        last, causal = fast.last_token_scores(q, k), fast.causal_samples(q, k)
        if layer == drawn:
            wide = (output[0, :, :width] @ output[0, :, width : 2 * width].T) / (head_dim**0.5 * n_head)
            kept.update(q=q, last=last, causal=causal, wide=wide, mean=scores.mean(dim=0))
        return (
            fast.densities(last, SCORE_EDGES),
            mean,
            std,
            fast.densities((scores,), score_edges)[0],
            softmax_edges,
            fast.densities((softmax,), softmax_edges)[0],
            fast.densities(causal, PATTERN_EDGES),
        )

    results = run_layers(model, [block.attn.c_attn for block in model.h], ids.to(job["device"]), None, reduce)
    last, mean, std, density, softmax_edges, softmax_density, causal = map(torch.stack, zip(*results, strict=True))
    sizes = np.arange(5, 101)
    products = [torch.randn(int(n), int(n)) @ torch.randn(int(n), int(n)) for n in sizes]
    raw = torch.stack([product.std(correction=0) for product in products])
    within, across = map(torch.flatten, kept["last"])
    fourth = {"within": within, "across": across}
    for name, sample in (("within", within), ("across", across)):
        fourth[f"density_{name}"], fourth[f"edges_{name}"] = freedman_diaconis(sample)
    visible = torch.ones(5, 5).tril()
    return host(
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
