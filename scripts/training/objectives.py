"""Losses of the package's own forward pass, and BERT's masked-token head and initial positions."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxqkv.architectures.bert import BertConfig
from jaxqkv.architectures.gpt2 import GPT2Config
from jaxqkv.checkpoints.config import Config
from training.forward import hidden, norm
from training.sizes import blocks


def fresh_head(config: Config) -> dict[str, np.ndarray]:
    """Returns BERT's masked-token head: dense, GELU, norm, and a bias for the tied output embedding."""
    width = config.n_embd
    dense = np.random.default_rng(0).normal(0, config.initializer_range, (width, width)).astype(np.float32)
    vectors = {
        "dense_bias": np.zeros(width),
        "scale": np.ones(width),
        "shift": np.zeros(width),
        "bias": np.zeros(config.vocab_size),
    }
    return {"dense": dense} | {name: vector.astype(np.float32) for name, vector in vectors.items()}


def sinusoids(config: Config) -> np.ndarray:
    """Returns BERT's initial position embeddings `[pos, embed]`, as in Vaswani et al. 2017, scaled like words'.

    From random ones, 256 positions need more steps to find their neighbours than this training has.
    """
    angles = np.arange(config.n_positions)[:, None] / 10_000 ** (np.arange(0, config.n_embd, 2) / config.n_embd)
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return (config.initializer_range * 2**0.5 * waves).astype(np.float32)


@jax.custom_vjp
def next_token_loss(hidden: jax.Array, embedding: jax.Array, truth: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns Σ weight · cross-entropy in nats of the product with the output embedding.

    Logits of a block of tokens are computed at a time, with their gradient, so that on a CPU they stay in the cache.

    Args:
      hidden: `[token, embed]`.
      embedding: `[vocab, embed]`.
      truth: ids `[token]`.
      weights: of the tokens, `[token]`.
    """
    return _loss_and_gradient(hidden, embedding, truth, weights)[0]


def _loss_and_gradient(hidden: Any, embedding: Any, truth: Any, weights: Any) -> tuple[jax.Array, Any]:
    chunk = math.gcd(blocks().tokens, len(hidden))
    vocab = jnp.arange(len(embedding))[None]

    def one(gradient: jax.Array, piece: Any) -> tuple[jax.Array, Any]:
        x, true, weight = piece
        logits = x @ embedding.T
        here = vocab == true[:, None]
        largest = logits.max(-1, keepdims=True)
        exponentials = jnp.exp(logits - largest)
        total = exponentials.sum(-1, keepdims=True)
        loss = jnp.log(total) + largest - jnp.where(here, logits, 0).sum(-1, keepdims=True)
        slope = (exponentials / total - here.astype(x.dtype)) * weight[:, None]
        return gradient + slope.T @ x, ((loss[:, 0] * weight).sum(), slope @ embedding)

    pieces = tuple(array.reshape(-1, chunk, *array.shape[1:]) for array in (hidden, truth, weights))
    by_embedding, (losses, by_hidden) = jax.lax.scan(one, jnp.zeros_like(embedding), pieces)
    return losses.sum(), (by_hidden.reshape(hidden.shape), by_embedding)


next_token_loss.defvjp(_loss_and_gradient, lambda gradients, by_loss: (*(by_loss * g for g in gradients), None, None))


def bert_losses(params: Any, ids: jax.Array, chosen: jax.Array, truth: jax.Array, config: BertConfig) -> jax.Array:
    """Returns the cross-entropy `[batch, chosen]` of the masked tokens, in nats."""
    head, row = params["head"], (1, 1, -1)
    x = jnp.take_along_axis(hidden(params["model"], ids, config), chosen[..., None], 1)
    x = jax.nn.gelu(x @ head["dense"] + head["dense_bias"].reshape(row), approximate=False)
    x = norm({"scale": head["scale"], "bias": head["shift"]}, x, config)
    embedding = params["model"]["embed"]["word"]["embedding"]
    logits = x @ embedding.T + head["bias"].reshape(row)
    return optax.softmax_cross_entropy_with_integer_labels(logits, truth)


def mean_loss(params: Any, task: tuple[jax.Array, ...], config: Config) -> jax.Array:
    """Returns the mean loss of a task: GPT-2's (ids, weights), BERT's (corrupted ids, chosen positions, true ids)."""
    if isinstance(config, GPT2Config):
        ids, weights = task
        x = hidden(params["model"], ids, config).reshape(-1, config.n_embd)
        weights = jnp.asarray(weights).at[:, 0].set(0)  # nothing comes before the first
        truth, weights = (jnp.roll(array, -1, 1).reshape(-1) for array in (ids, weights))
        embedding = params["model"]["embed"]["wte"]["embedding"]
        return next_token_loss(x, embedding, truth, weights) / (ids.size - len(ids))
    assert isinstance(config, BertConfig)
    return bert_losses(params, *task, config).mean()


def head_tensors(head: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the masked-token head under the names of `BertForMaskedLM`."""
    at = "cls.predictions"
    return {
        f"{at}.transform.dense.weight": head["dense"].T,
        f"{at}.transform.dense.bias": head["dense_bias"],
        f"{at}.transform.LayerNorm.weight": head["scale"],
        f"{at}.transform.LayerNorm.bias": head["shift"],
        f"{at}.bias": head["bias"],
    }
