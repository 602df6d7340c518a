"""The hidden states of `jaxqkv.hidden`, arranged so that gradients on a CPU take half the time.

Attention takes queries block by block, on an accelerator all at once. It leaves out the keys that a causal block does
not see, and has a gradient of its own without transposed copies of scores. Every token is visible: training windows
have no padding.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxqkv.architectures.attention import merge_heads, split_heads
from jaxqkv.architectures.bert import BertConfig
from jaxqkv.architectures.layers import ACTIVATION_FUNCTIONS
from jaxqkv.checkpoints.config import ACTIVATIONS, Config
from training.sizes import blocks


def _pattern(q: jax.Array, k: jax.Array, causal: bool) -> jax.Array:
    """Returns the pattern `[…, key, query]` of the last queries of a text, keys first."""
    scores = k @ (q * q.shape[-1] ** -0.5).mT
    if causal:
        keys, queries = scores.shape[-2:]
        earlier = jnp.arange(keys)[:, None] <= jnp.arange(keys - queries, keys)[None]
        scores = jnp.where(earlier, scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(-2, keepdims=True))
    return weights / weights.sum(-2, keepdims=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    """Returns z `[…, query, head_dim]` of the last queries of a text; `causal` hides later keys."""
    return _attention(q, k, v, causal)[0]


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> tuple[jax.Array, Any]:
    pattern = _pattern(q, k, causal)
    z = (v.mT @ pattern).mT
    return z, (q, k, v, pattern, z)


def _attention_gradient(causal: bool, saved: Any, by_z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients by q, k and v; with P the pattern and S the scores, dS = P ∘ (dP − Σ z ∘ dz)."""
    q, k, v, pattern, z = saved
    by_pattern = v @ by_z.mT
    by_scores = pattern * (by_pattern - (z * by_z).sum(-1)[..., None, :]) * q.shape[-1] ** -0.5
    return (k.mT @ by_scores).mT, by_scores @ q, pattern @ by_z


attention.defvjp(_attention, _attention_gradient)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
    """Returns z `[…, pos, head_dim]`, computed in blocks of queries."""
    length, block = q.shape[-2], blocks().queries
    ends = [*range(block, length, block), length]
    parts = []
    for start, end in zip([0, *ends], ends, strict=False):
        seen = end if causal else length
        parts.append(attention(q[..., start:end, :], k[..., :seen, :], v[..., :seen, :], causal))
    return jnp.concatenate(parts, -2)


def dense(params: Any, x: jax.Array) -> jax.Array:
    """Returns x · kernel + bias, of `[batch, pos, embed]`."""
    return x @ params["kernel"] + params["bias"].reshape(1, 1, -1)


def norm(params: Any, x: jax.Array, config: Config) -> jax.Array:
    """Returns the layer norm of `[batch, pos, embed]`."""
    scale, bias = (params[name].reshape(1, 1, -1) for name in ("scale", "bias"))
    return jax.nn.standardize(x, epsilon=config.layer_norm_epsilon) * scale + bias


def self_attention(params: Any, x: jax.Array, config: Config) -> jax.Array:
    """Returns attn_out; Q, K and V come from one product."""
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts, -1), *(params[name] for name in "qkv"))
    q, k, v = (split_heads(part, config.n_head) for part in jnp.split(dense(joined, x), 3, -1))
    return dense(params["o"], merge_heads(attend(q, k, v, config.causal)))


def mlp(params: Any, x: jax.Array, config: Config) -> jax.Array:
    """Returns mlp_out."""
    return dense(params["down"], ACTIVATION_FUNCTIONS[ACTIVATIONS[config.activation]](dense(params["up"], x)))


def hidden(params: Any, ids: jax.Array, config: Config) -> jax.Array:
    """Returns what `jaxqkv.hidden` does for texts without padding: `[batch, pos, embed]`."""
    embed, length = params["embed"], ids.shape[1]
    if isinstance(config, BertConfig):
        x = embed["word"]["embedding"][ids] + embed["position"]["embedding"][None, :length]
        x = norm(embed["norm"], x + embed["token_type"]["embedding"][None, :1], config)
        for layer in params["layers"]:
            middle = norm(layer["ln_1"], x + self_attention(layer["attn"], x, config), config)
            x = norm(layer["ln_2"], middle + mlp(layer["mlp"], middle, config), config)
        return x
    x = embed["wte"]["embedding"][ids] + embed["wpe"]["embedding"][None, :length]
    for layer in params["layers"]:
        x = x + self_attention(layer["attn"], norm(layer["ln_1"], x, config), config)
        x = x + mlp(layer["mlp"], norm(layer["ln_2"], x, config), config)
    return norm(params["final"]["ln_f"], x, config)
