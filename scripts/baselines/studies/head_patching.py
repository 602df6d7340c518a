"""Study 11: every head of a text shuffled, and taken from another text, alone."""

import numpy as np
import torch

from baselines import load_tokenizer
from baselines.notebook import each_head_edited
from baselines.parts import host, shown_layer
from baselines.tuned import BRANCHES, branch_ends, each_head_from


def _texts(job):
    """Returns ids of the clean text and of the donor, `[1, pos]`, and of the answers."""
    encode = load_tokenizer(job["models"][0]).encode
    texts = [encode(job[name], add_special_tokens=False).ids for name in ("clean", "donor")]
    answers = [encode(word, add_special_tokens=False).ids[0] for word in job["answers"]]
    return *(torch.tensor([ids], device=job["device"]) for ids in texts), answers


def _figures(log_p, scores, shuffled, norm, z, places, patched):
    """Returns figures from log probabilities and scores of both texts, scores of sweeps `[layer, head]`, and donor's z.

    `z` is `[layer, pos, head, head_dim]`, and `norm` that of the clean text's.
    """
    first, second = places
    difference = z[:, first] - z[:, second]
    sizes = np.sort(np.abs(difference).mean(axis=-1), axis=1)
    few = min(2, sizes.shape[1])
    delta = patched - scores[0]
    return {
        "1": {"clean": log_p[0], "donor": log_p[1], "score_clean": scores[0], "score_donor": scores[1]},
        "2": {"delta": shuffled - scores[0], "norm": norm},
        "3a": {"z": z[shown_layer(4, len(z))]},
        "3b": {"norm": np.linalg.norm(z, axis=-1).mean(axis=-1)},
        "4": {
            "difference": difference,
            "ratio": sizes[:, -few:].mean(axis=1) / sizes[:, :few].mean(axis=1),
        },
        "5": {"delta": delta, "recovered": delta / (scores[1] - scores[0])},
    }


def notebook(job):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["models"][0], dtype=torch.float32).eval().to(job["device"])
    clean, donor, answers = _texts(job)
    layers, n_head = model.config.n_layer, model.config.n_head
    head_dim = model.config.n_embd // n_head
    generator = torch.Generator().manual_seed(0)

    def run(ids):
        """Returns log probabilities and score of the last token, and z of every layer."""
        kept = {}
        handles = [
            block.attn.c_proj.register_forward_pre_hook(
                lambda module, inputs, layer=layer: kept.__setitem__(layer, inputs[0].detach())
            )
            for layer, block in enumerate(model.transformer.h)
        ]
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        for handle in handles:
            handle.remove()
        return torch.log_softmax(logits, dim=-1).cpu().numpy(), (logits[answers[0]] - logits[answers[1]]).item(), kept

    (clean_p, clean_score, clean_z), (donor_p, donor_score, donor_z) = run(clean), run(donor)

    def shuffle(layer, head, z):
        part = z[:, :, head * head_dim : (head + 1) * head_dim]
        order = torch.randperm(part.numel(), generator=generator).to(z.device)
        part[:] = part.flatten()[order].view(part.shape)

    def patch(layer, head, z):
        columns = slice(head * head_dim, (head + 1) * head_dim)
        z[:, :, columns] = donor_z[layer][:, :, columns]

    def sweep(edit):
        scores = np.zeros((layers, n_head))
        for layer, head, logits in each_head_edited(model, clean, edit):
            scores[layer, head] = logits[answers[0]] - logits[answers[1]]
        return scores

    norm = np.zeros((layers, n_head))
    for layer in range(layers):
        for head in range(n_head):
            values = clean_z[layer][0, :, head * head_dim : (head + 1) * head_dim]
            norm[layer, head] = np.linalg.norm(values.cpu().numpy())
    z = np.array([donor_z[layer][0].cpu().numpy().reshape(-1, n_head, head_dim) for layer in range(layers)])
    places = np.flatnonzero(donor[0].cpu().numpy() == answers[0])[:2]
    return _figures(
        (clean_p, donor_p), np.array([clean_score, donor_score]), sweep(shuffle), norm, z, places, sweep(patch)
    )


@torch.inference_mode()
def tuned(job):
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(job["models"][0], dtype=torch.float32).eval().to(job["device"])
    clean, donor, answers = _texts(job)
    n_head, z = model.config.n_head, []
    handles = [
        block.attn.c_proj.register_forward_pre_hook(
            lambda module, inputs: z.append(inputs[0].unflatten(-1, (n_head, -1)))
        )
        for block in model.transformer.h
    ]
    logits = model(torch.cat([clean, donor]), use_cache=False, logits_to_keep=1).logits[:, 0]
    for handle in handles:
        handle.remove()
    direction = model.lm_head.weight[answers[0]] - model.lm_head.weight[answers[1]]
    own, theirs = torch.stack(z, dim=1)

    def sweep(edit):
        return (branch_ends(model, clean, edit, BRANCHES) @ direction).view(-1, n_head)

    def shuffle(layer, z):
        heads = z[0].unflatten(-1, (n_head, -1)).transpose(0, 1)
        order = torch.rand(n_head, heads[0].numel(), device=z.device).argsort(dim=1)
        return each_head_from(z, heads.flatten(1).gather(1, order).view(heads.shape).transpose(0, 1))

    shuffled, patched = sweep(shuffle), sweep(lambda layer, z: each_head_from(z, theirs[layer]))
    places = torch.nonzero(donor[0] == answers[0])[:2, 0].tolist()
    scores = logits[:, answers[0]] - logits[:, answers[1]]
    norm = torch.linalg.vector_norm(own, dim=(1, 3))
    return _figures(*host((logits.log_softmax(dim=-1), scores, shuffled, norm, theirs)), places, host(patched))
