"""Values from the definitions, and the parts of a batch that have a meaning."""

import jax.numpy as jnp
import numpy as np

from jaxqkv.architectures.activations import FIELDS
from jaxqkv.text.batches import Batch

EVERYTHING = frozenset(FIELDS)


def masked_batch(ids, mask):
    ids = jnp.asarray(ids, jnp.int32)
    return Batch(ids=ids, mask=jnp.asarray(mask), token_types=jnp.zeros_like(ids))


def real(values, mask, field):
    """Values at real positions only; scores and patterns at real queries and keys."""
    values = np.asarray(values)
    if field in ("scores", "pattern"):
        return np.concatenate([values[:, b][:, :, m][..., m].ravel() for b, m in enumerate(mask)])
    if field in ("q", "k", "v", "z"):
        return np.concatenate([values[:, b][:, :, m].ravel() for b, m in enumerate(mask)])
    return np.concatenate([values[..., b, m, :].ravel() for b, m in enumerate(mask)])


def cosine(x):
    """Pair by pair, in float64."""
    x = np.asarray(x, np.float64)
    n = x.shape[1]
    norm = [np.linalg.norm(x[:, i]) for i in range(n)]
    return np.array([[x[:, i] @ x[:, j] / (norm[i] * norm[j]) for j in range(n)] for i in range(n)])


def attention_to(model, text):
    """Returns what the layers attend to in one text, captured as the page does, so that one program serves both."""
    return model.run(model.tokenize([text]), capture={"q", "k", "v", "scores", "pattern"})


def attention_of(model, text):
    """Scores and pattern in float64, [layer, head, query, key], and which pairs are seen."""
    q, k = vectors_of(model, text)
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    seen = np.ones(scores.shape[-2:], bool)
    if model.config.causal:
        seen = np.tril(seen)
    weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    return scores, weights / weights.sum(-1, keepdims=True), seen


def weighted_of(model, text):
    """‖α v W_O‖ in float64, [layer, head, query, key], vector by vector."""
    _, pattern, _ = attention_of(model, text)
    v = np.asarray(attention_to(model, text).v, np.float64)[:, 0]
    output = np.stack([model.weights.W_O(layer, by_head=True) for layer in range(len(v))]).astype(np.float64)
    moved = pattern[..., None] * (v @ output)[:, :, None]
    return np.sqrt((moved**2).sum(axis=-1))


def vectors_of(model, text):
    """q and k in float64, [layer, head, pos, head_dim]."""
    acts = attention_to(model, text)
    return tuple(np.asarray(x, np.float64)[:, 0] for x in (acts.q, acts.k))
