"""The same results in PyTorch to measure jaxqkv against: as in the notebooks, and as an expert would write them."""

from importlib import import_module
from pathlib import Path

import numpy as np

SCORE_EDGES, PATTERN_EDGES = np.linspace(-20, 20, 101), np.linspace(0, 1, 91)
CORRELATION_EDGES = np.linspace(-1, 1, 101)


def hook_everything(blocks, keep):
    """Hooks GPT-2's blocks to call `keep(name, tensor)` with all that a cache has but patterns, which are outputs."""

    def output_of(module, *names):
        def hook(module, inputs, output):
            whole = output[0] if isinstance(output, tuple) else output
            for name, part in zip(names, whole.chunk(len(names), dim=-1), strict=True):
                keep(name, part)

        return module.register_forward_hook(hook)

    handles = []
    for block in blocks:
        handles += [output_of(block.attn.c_attn, "q", "k", "v"), output_of(block.attn.c_proj, "attn_out")]
        handles.append(block.attn.c_proj.register_forward_pre_hook(lambda module, inputs: keep("z", inputs[0])))
        handles += [output_of(block.mlp, "mlp_out"), output_of(block, "resid_post")]
    return handles


def study(side, name):
    """Returns a study's function for the notebook or the tuned side, found by its name in `baselines/studies`."""
    return getattr(import_module(f"baselines.studies.{name.replace('-', '_')}"), side)


def load_tokenizer(folder):
    """Returns the tokenizer beside a checkpoint's weights."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
