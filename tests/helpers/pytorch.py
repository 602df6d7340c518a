"""GPT-2 run by PyTorch in float64, one text at a time: what the studies' arrays are compared with."""

import numpy as np
import pytest


def load(folder):
    """The checkpoint as transformers reads it, in float64."""
    pytest.importorskip("torch", exc_type=ImportError)
    pytest.importorskip("transformers", exc_type=ImportError)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval().double()


def activations(model, ids):
    """Of one text without pads: q, k, v and attn_out `[layer, pos, embed]`, and logits `[pos, vocab]`."""
    import torch

    found = {"qkv": [], "attn_out": []}
    hooks = []
    for block in model.transformer.h:
        hooks.append(block.attn.c_attn.register_forward_hook(lambda m, a, out: found["qkv"].append(out[0])))
        hooks.append(block.attn.register_forward_hook(lambda m, a, out: found["attn_out"].append(out[0][0])))
    with torch.no_grad():
        logits = model(torch.tensor([list(ids)])).logits[0]
    for hook in hooks:
        hook.remove()
    wide, attn_out = (torch.stack(found[name]).numpy() for name in ("qkv", "attn_out"))
    q, k, v = np.split(wide, 3, axis=-1)
    return {"q": q, "k": k, "v": v, "attn_out": attn_out, "logits": logits.numpy()}
