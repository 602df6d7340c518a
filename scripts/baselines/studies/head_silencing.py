"""Study 10: every head of a text silenced alone."""

import numpy as np
import torch

from baselines import load_tokenizer
from baselines.notebook import each_head_edited, silence
from baselines.parts import host, shown_layer
from baselines.tuned import BRANCHES, branch_ends, each_head_from

HEAD, EDGES = 1, np.linspace(0.6, 1, 32)


def _ids(job):
    tokenizer = load_tokenizer(job["models"][0])
    return torch.tensor([tokenizer.encode(job["text"], add_special_tokens=False).ids], device=job["device"])


def _figures(cosine, silenced_cosine, clean, silenced, found):
    """Returns figures from cosines `[layer, pair]`, log probabilities `[vocab]`, and those of a sweep by name."""
    head = min(HEAD, found["token"].shape[1] - 1)
    ends = np.array([clean.max(), clean.max()])  # the target is the most probable token
    target, largest = (found[name] - end for name, end in zip(("target", "largest"), ends, strict=True))
    both = np.stack([target, largest], axis=-1)
    counts = np.array([np.histogram(row, EDGES)[0] for row in cosine])
    return {
        "2": {"cosine": cosine, "counts": counts, "edges": EDGES},
        "3": {"difference": cosine - silenced_cosine},
        "4a": {"clean": clean, "silenced": silenced},
        "4b": {"token": found["token"][:, head], "log_probability": found["largest"][:, head], "clean": clean.max()},
        "5a": {"target": target, "largest": largest, "clean": ends},
        "5b": {"mean": both.mean(axis=1), "std": both.std(axis=1)},
    }


def notebook(job):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["models"][0], dtype=torch.float32).eval().to(job["device"])
    ids, layers, n_head = _ids(job), model.config.n_layer, model.config.n_head
    head_dim = model.config.n_embd // n_head
    layer, head = shown_layer(4, layers), min(HEAD, n_head - 1)
    above = np.triu_indices(ids.shape[1] - 1, 1)
    kept = {}

    def cosines(edited):
        """Returns cosines of hidden states by layer, and the last token's log probabilities, clean or head silenced."""

        def change(module, inputs):
            z = inputs[0].clone()
            silence(head_dim)(layer, head, z)
            return (z, *inputs[1:])

        handles = [
            block.register_forward_hook(lambda module, inputs, output, each=each: kept.__setitem__(each, output))
            for each, block in enumerate(model.transformer.h)
        ]
        if edited:
            handles.append(model.transformer.h[layer].attn.c_proj.register_forward_pre_hook(change))
        with torch.no_grad():
            logits = model(ids).logits
        for handle in handles:
            handle.remove()
        result = []
        for each in range(layers):
            hidden = kept[each][0] if isinstance(kept[each], tuple) else kept[each]
            hidden = hidden.reshape(-1, hidden.shape[-1])[1:].cpu().numpy()
            hidden = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
            result.append((hidden @ hidden.T)[above])
        return np.array(result), torch.log_softmax(logits[0, -1], dim=-1).cpu().numpy()

    (cosine, clean), (silenced_cosine, silenced) = cosines(False), cosines(True)
    found = {name: np.zeros((layers, n_head)) for name in ("target", "largest", "token")}
    for each, number, logits in each_head_edited(model, ids, silence(head_dim)):
        log_p = torch.log_softmax(logits, dim=-1).cpu().numpy()
        found["target"][each, number] = log_p[clean.argmax()]
        found["largest"][each, number], found["token"][each, number] = log_p.max(), log_p.argmax()
    return _figures(cosine, silenced_cosine, clean, silenced, found)


@torch.inference_mode()
def tuned(job):
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(job["models"][0], dtype=torch.float32).eval().to(job["device"])
    ids, layers, n_head = _ids(job), model.config.n_layer, model.config.n_head
    layer, head = shown_layer(4, layers), min(HEAD, n_head - 1)
    nothing = torch.zeros(n_head, model.config.n_embd // n_head, device=ids.device)
    above = torch.triu_indices(ids.shape[1] - 1, ids.shape[1] - 1, 1, device=ids.device)
    cosines = []

    def change(module, inputs):
        """Silences the head in the second of two texts, which is the edited one."""
        z = inputs[0].clone()
        z[1].unflatten(-1, (n_head, -1))[:, head] = 0
        return (z, *inputs[1:])

    def reduce(module, inputs, output):
        hidden = (output[0] if isinstance(output, tuple) else output)[:, 1:]
        hidden = hidden / torch.linalg.norm(hidden, dim=-1, keepdim=True)
        cosines.append((hidden @ hidden.transpose(1, 2))[:, *above])

    handles = [block.register_forward_hook(reduce) for block in model.transformer.h]
    handles.append(model.transformer.h[layer].attn.c_proj.register_forward_pre_hook(change))
    ends = model(ids.expand(2, -1), use_cache=False, logits_to_keep=1).logits[:, 0].log_softmax(dim=-1)
    for handle in handles:
        handle.remove()
    branches = branch_ends(model, ids, lambda layer, z: each_head_from(z, nothing), BRANCHES)
    log_p = model.lm_head(branches).log_softmax(dim=-1).view(layers, n_head, -1)
    largest, token = log_p.max(dim=-1)
    found = {"target": log_p[..., ends[0].argmax()], "largest": largest, "token": token}
    cosine, silenced_cosine = torch.stack(cosines, dim=1)
    return _figures(*host((cosine, silenced_cosine, *ends)), host(found))
