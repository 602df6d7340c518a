"""A two-layer GPT-2 made by hand: a previous-token head, and an induction head that reads what it wrote.

The residual stream holds three vectors of `SIZE` numbers, each beside its negative so that their mean is 0: the token,
the position, and the previous token, which head `PREVIOUS` of layer 0 writes there. Head `INDUCTION` of layer 1 looks
for its own token among the previous ones, and writes the token that it finds in the place of its own. The norms have
uneven scales and biases, and the weights of these two heads undo both. All other heads are random, and write almost
nothing.
"""

import numpy as np
from conftest import GPT2, changed, write_folder, write_word_tokenizer

SIZE = 59
PREVIOUS, INDUCTION = (0, 2), (1, 4)
CONFIG = changed(
    GPT2, vocab_size=SIZE, n_positions=SIZE, n_embd=6 * SIZE, n_layer=2, n_head=6, n_inner=7, layer_norm_epsilon=1e-9
)
WORDS = [f" w{index}" for index in range(SIZE)]
# The score of the key that a head looks for, all others having one of about 0; the length of what it writes.
SCORE, WRITTEN = 20.0, {PREVIOUS: 1.0, INDUCTION: 3.0}
# Texts in which types of heads are as clear as in the 32 that studies have.
FEW_TEXTS = 8
# The standard deviation of the weights of all other heads.
BACKGROUND = 0.005
TOKEN, POSITION, BEFORE = range(3)


def _place(place, matrix=None):
    """Rows [embed, SIZE] of a map that reads, or transposed writes, one of the three vectors and its negative."""
    rows = np.zeros((3, 2, SIZE, SIZE))
    rows[place] = np.stack([1, -1])[:, None, None] * (np.eye(SIZE) if matrix is None else matrix)
    return rows.reshape(6 * SIZE, SIZE)


def induction_tensors(seed=0):
    """Returns the checkpoint's tensors by their names."""
    generator = np.random.default_rng(seed)
    width = CONFIG.n_embd
    next_position = np.eye(SIZE, k=1)
    reads = {PREVIOUS: (_place(POSITION), _place(POSITION, next_position)), INDUCTION: (_place(TOKEN), _place(BEFORE))}
    writes = {PREVIOUS: _place(BEFORE), INDUCTION: _place(TOKEN)}
    tensors = {
        "wte.weight": _place(TOKEN).T,
        "wpe.weight": _place(POSITION).T,
        "ln_f.weight": generator.uniform(0.5, 1.5, width),
        "ln_f.bias": np.zeros(width),
    }
    for layer, head in (PREVIOUS, INDUCTION):
        # A token, a position and, from layer 1 on, a previous token are in the stream, each of length √2.
        unit = 2 * np.sqrt(width / (2 * (2 + layer)))  # what reading any of them gives, after the norm
        scale, shift = generator.uniform(0.5, 1.5, width), generator.normal(0, 0.3, width)
        q, k, v, o = generator.normal(0, BACKGROUND, (4, 6, width, SIZE))
        gain = np.sqrt(SCORE * np.sqrt(SIZE)) / unit
        q[head], k[head] = (gain * each / scale[:, None] for each in reads[layer, head])
        v[head] = _place(TOKEN) / unit / scale[:, None]
        o[head] = WRITTEN[layer, head] * writes[layer, head]
        wide = np.concatenate([each.swapaxes(0, 1).reshape(width, width) for each in (q, k, v)], axis=1)
        name = f"h.{layer}."
        tensors |= {
            f"{name}ln_1.weight": scale,
            f"{name}ln_1.bias": shift,
            f"{name}attn.c_attn.weight": wide,
            f"{name}attn.c_attn.bias": -shift @ wide,
            f"{name}attn.c_proj.weight": o.swapaxes(1, 2).reshape(width, width),
            f"{name}attn.c_proj.bias": np.zeros(width),
            f"{name}ln_2.weight": np.ones(width),
            f"{name}ln_2.bias": np.zeros(width),
            f"{name}mlp.c_fc.weight": np.zeros((width, CONFIG.n_inner)),
            f"{name}mlp.c_fc.bias": np.zeros(CONFIG.n_inner),
            f"{name}mlp.c_proj.weight": np.zeros((CONFIG.n_inner, width)),
            f"{name}mlp.c_proj.bias": np.zeros(width),
        }
    return {key: np.ascontiguousarray(tensor, np.float32) for key, tensor in tensors.items()}


def write_induction(folder):
    """Writes the checkpoint with a tokenizer whose words are w0, w1, …, and returns the folder."""
    return write_word_tokenizer(write_folder(folder, CONFIG, induction_tensors()), WORDS)
