"""The Flax modules that GPT-2 and BERT share: layer norm, self-attention, MLP.

Parameters are in `flax.linen`'s own layout (`kernel` is `[in, out]`), whatever the file's is.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxqkv.architectures.activations import Attention
from jaxqkv.architectures.attention import attend, merge_heads, score_dtype, split_heads
from jaxqkv.checkpoints.config import ACTIVATIONS, Config
from jaxqkv.runtime.devices import Execution, rounded_product

ACTIVATION_FUNCTIONS = {
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_erf": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "silu": jax.nn.silu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "mish": jax.nn.mish,
    "linear": lambda x: x,
}


def layer_norm(config: Config, name: str) -> nn.LayerNorm:
    """Layer norm with the checkpoint's epsilon and the two-pass variance that PyTorch computes."""
    return nn.LayerNorm(epsilon=config.layer_norm_epsilon, use_fast_variance=False, name=name)


def dense(width: int, name: str, execution: Execution) -> nn.Dense:
    """x · kernel + bias."""
    return nn.Dense(width, dot_general=rounded_product if execution.rounded else None, name=name)


class SelfAttention(nn.Module):
    """Multi-head self-attention; every intermediate is returned, and XLA drops those nobody uses."""

    config: Config
    execution: Execution = Execution()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch pos embed"],
        visible: Bool[Array, "batch query key"],
        layer: Int[Array, ""],
    ) -> Attention:
        config = self.config
        q, k, v = (split_heads(dense(config.n_embd, name, self.execution)(x), config.n_head) for name in "qkv")
        upcast = getattr(config, "reorder_and_upcast_attn", False)
        scale = self.scale(layer, score_dtype(q.dtype, upcast))
        scores, pattern, z = attend(q, k, v, visible, scale, self.execution.sharded, upcast)
        attn_out = dense(config.n_embd, "o", self.execution)(merge_heads(z))
        return Attention(q=q, k=k, v=v, scores=scores, pattern=pattern, z=z, attn_out=attn_out)

    def scale(self, layer: Int[Array, ""], dtype: jnp.dtype) -> float | Float[Array, ""]:
        """What QKᵀ is multiplied by: 1/√head_dim and, in a GPT-2 that says so, 1/(layer + 1), or neither."""
        scale = self.config.head_dim**-0.5 if getattr(self.config, "scale_attn_weights", True) else 1.0
        if getattr(self.config, "scale_attn_by_inverse_layer_idx", False):
            return scale / (layer + 1).astype(dtype)
        return scale


class MLP(nn.Module):
    """Dense, activation, Dense."""

    config: Config
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x: Float[Array, "batch pos embed"]) -> Float[Array, "batch pos embed"]:
        activation = ACTIVATION_FUNCTIONS[ACTIVATIONS[self.config.activation]]
        hidden = activation(dense(self.config.n_inner, "up", self.execution)(x))
        return dense(self.config.n_embd, "down", self.execution)(hidden)
