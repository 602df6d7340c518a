"""Muon for the matrices of the blocks, AdamW for all else, and their learning rates.

Source of Muon: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxqkv.architectures.bert import BertConfig
from jaxqkv.checkpoints.config import Config

# Coefficients of a quintic whose iteration brings singular values in (0, 1] near 1.
QUINTIC, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
MOMENTUM = 0.95


class Rates(NamedTuple):
    """Largest steps: of the blocks' matrices in the spectral norm, of all other parameters by entry."""

    muon: float
    adam: float


# With 0.02 and 3e-3, BERT's held-out loss is 5.9 nats after 2,000 steps; with the rates below it is 4.3.
GPT2_RATES, BERT_RATES = Rates(0.01, 3e-3), Rates(0.005, 2e-3)
# Decay of matrices and embeddings, as a fraction of the rate.
WEIGHT_DECAY = 0.05
# Steps in which the rate rises, and percentage of all steps in which it falls to 0.
WARM_UP, DECAY_PERCENT = 200, 60


def orthogonalised(matrices: jax.Array) -> jax.Array:
    """Returns `[matrix, rows, columns]` with nearly the same singular vectors and singular values near 1."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else jnp.swapaxes(matrices, 1, 2)
    x = x / (jnp.sqrt((x * x).sum((1, 2), keepdims=True)) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        square = x @ jnp.swapaxes(x, 1, 2)
        x = a * x + (b * square + c * (square @ square)) @ x
    return x if wide else jnp.swapaxes(x, 1, 2)


def scale_by_muon() -> optax.GradientTransformation:
    """Returns orthogonalised momentum; matrices of one shape are stacked, which compiles and runs faster."""

    def update(gradients: Any, momentum: Any, params: Any = None) -> tuple[Any, Any]:
        momentum = jax.tree.map(lambda m, g: MOMENTUM * m + g, momentum, gradients)
        leaves, tree = jax.tree.flatten(jax.tree.map(lambda m, g: MOMENTUM * m + g, momentum, gradients))
        for shape in sorted({leaf.shape for leaf in leaves}):
            places = [index for index, leaf in enumerate(leaves) if leaf.shape == shape]
            stacked = orthogonalised(jnp.stack([leaves[index] for index in places]))
            stacked *= max(1.0, shape[1] / shape[0]) ** 0.5
            for index, leaf in zip(places, stacked, strict=True):
                leaves[index] = leaf
        return jax.tree.unflatten(tree, leaves), momentum

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def decay_start(steps: Any) -> Any:
    """Returns the step at which the rate begins to fall in a run of so many steps."""
    return steps - steps * DECAY_PERCENT // 100


def relative_rate(step: Any, steps: Any) -> jax.Array:
    """Returns the rate as a fraction of the largest: it rises, stays, and falls to 0.

    Before `decay_start` it does not depend on the number of steps, so that a saved state can be continued to more.
    """
    fall = jnp.maximum(1, steps - decay_start(steps))
    return jnp.minimum(1.0, jnp.minimum((step + 1) / WARM_UP, (steps - step) / fall))


def optimiser(steps: Any, config: Config) -> optax.GradientTransformation:
    """Returns the optimiser of a run of so many steps, for a tree of parameters of that architecture."""
    largest = BERT_RATES if isinstance(config, BertConfig) else GPT2_RATES

    def kinds(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: "muon" if leaf.ndim == 2 and path[-1].key == "kernel" else "adam", params
        )

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    def rate(largest: float) -> optax.Schedule:
        return lambda step: largest * relative_rate(step, steps)

    muon = optax.chain(
        scale_by_muon(), optax.add_decayed_weights(WEIGHT_DECAY), optax.scale_by_learning_rate(rate(largest.muon))
    )
    adam = optax.adamw(rate(largest.adam), b2=0.98, weight_decay=WEIGHT_DECAY, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform({"muon": muon, "adam": adam}, kinds))
