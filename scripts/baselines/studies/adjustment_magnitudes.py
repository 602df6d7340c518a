"""Study 7: how much attention adds, by layer and position, one pass of padded texts."""

import numpy as np
import torch

from baselines import load_tokenizer
from baselines.parts import histogram, host, run_layers


def _padded(job):
    """Returns ids and mask of the texts, padded on the right, `[batch, pos]`."""
    tokenizer = load_tokenizer(job["models"][0])
    encoded = [torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids) for text in job["texts"]]
    mask = [torch.ones(len(each), dtype=torch.long) for each in encoded]
    return (torch.nn.utils.rnn.pad_sequence(each, batch_first=True) for each in (encoded, mask))


def notebook(job):
    from sklearn.linear_model import LinearRegression
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["models"][0], dtype=torch.float32).eval().to(job["device"])
    ids, mask = _padded(job)
    kept = {}
    for layer, block in enumerate(model.transformer.h):
        block.attn.c_proj.register_forward_hook(
            lambda module, inputs, output, layer=layer: kept.__setitem__(layer, output.detach().cpu())
        )
    with torch.no_grad():
        model(ids.to(job["device"]), attention_mask=mask.to(job["device"]))
    lengths, layers = mask.sum(dim=1).numpy(), len(kept)
    logs = [
        [np.log(np.linalg.norm(kept[layer][text, :length].numpy(), axis=-1)) for text, length in enumerate(lengths)]
        for layer in range(layers)
    ]
    counts, edges = histogram(lengths, "fd", density=False)
    second, count = {"mean": np.zeros(layers), "std": np.zeros(layers)}, (mask.numpy()).sum(axis=0)
    log_norm = np.zeros((layers, ids.shape[1]))
    last = min(job["positions"], ids.shape[1] - 1)
    lines, beta = np.zeros((layers, 2)), np.zeros((layers, 3))
    for layer in range(layers):
        sample = np.concatenate([each[1:] for each in logs[layer]])
        second["mean"][layer], second["std"][layer] = sample.mean(), sample.std()
        second[f"density_{layer}"], second[f"edges_{layer}"] = histogram(sample, "fd")
        for pos in range(ids.shape[1]):
            log_norm[layer, pos] = np.log(np.mean([np.exp(each[pos]) for each in logs[layer] if pos < len(each)]))
        fit = LinearRegression().fit(np.arange(last)[:, None], log_norm[layer, 1 : last + 1])
        lines[layer] = fit.intercept_, fit.coef_[0]
        before = np.concatenate([np.stack([each[1:-2], each[2:-1]], axis=1) for each in logs[layer] if len(each) > 3])
        fit = LinearRegression().fit(before, np.concatenate([each[3:] for each in logs[layer] if len(each) > 3]))
        beta[layer] = fit.intercept_, *fit.coef_
    return {
        "1": {"mask": mask.numpy() == 1, "lengths": lengths, "counts": counts, "edges": edges},
        "2": second,
        "3": {"log_norm": log_norm, "count": count},
        "4": {"intercept": lines[:, 0], "slope": lines[:, 1]},
        "5": {"beta": beta},
    }


@torch.inference_mode()
def tuned(job):
    from transformers import GPT2Model

    model = GPT2Model.from_pretrained(job["models"][0], dtype=torch.float32).eval().to(job["device"])
    ids, mask = (each.to(job["device"]) for each in _padded(job))

    def reduce(layer, output):
        return torch.linalg.vector_norm(output, dim=-1)

    norms = torch.stack(run_layers(model, [block.attn.c_proj for block in model.h], ids, mask, reduce))
    real, count = mask.bool(), mask.sum(dim=0)
    logs = norms.log()
    samples = logs[:, :, 1:][:, real[:, 1:]]
    std, mean = torch.std_mean(samples, dim=1, correction=0)
    second = {"mean": mean, "std": std}
    for layer, sample in enumerate(samples.cpu().numpy()):
        second[f"density_{layer}"], second[f"edges_{layer}"] = np.histogram(sample, "fd", density=True)
    log_norm = ((norms * mask).sum(dim=1) / count).log()
    last = min(job["positions"], ids.shape[1] - 1)

    def fitted(x, y):
        """Returns coefficients `[layer, 1 + variable]` of `y` `[layer, n]` by `x` `[…, n, variable]`, in float64."""
        x = torch.cat([torch.ones_like(x[..., :1]), x], dim=-1).double()
        return torch.linalg.lstsq(x, y.double()[..., None]).solution[..., 0]

    steps = torch.arange(last, device=ids.device).float()[:, None].expand(len(norms), -1, 1)
    lines = fitted(steps, log_norm[:, 1 : last + 1])
    now = real[:, 3:]
    before = torch.stack([logs[:, :, 1:-2][:, now], logs[:, :, 2:-1][:, now]], dim=-1)
    lengths = mask.sum(dim=1)
    counts, edges = np.histogram(lengths.cpu().numpy(), "fd")
    return host(
        {
            "1": {"mask": real, "lengths": lengths, "counts": counts, "edges": edges},
            "2": second,
            "3": {"log_norm": log_norm, "count": count},
            "4": {"intercept": lines[:, 0], "slope": lines[:, 1]},
            "5": {"beta": fitted(before, logs[:, :, 3:][:, now])},
        }
    )
