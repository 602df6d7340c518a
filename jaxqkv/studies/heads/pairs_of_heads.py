"""All pairs of heads, a pair of layers at a time: composition, similarity, divergence of patterns."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxqkv.kernels import Circuit, pattern_divergence
from jaxqkv.kernels.factors import block_inner, block_norms, block_overlaps, one_sides, unit_factors, wide
from jaxqkv.model.model import Model
from jaxqkv.runtime import console
from jaxqkv.runtime.devices import jit
from jaxqkv.studies.heads.layers import KEEP_BYTES, Heads, Layers, number_of_pairs, pairs_of_layers
from jaxqkv.text.batches import Batch

Rows = Float[Array, "inner embed"]
ThreeRows = Float[Array, "three_inner embed"]


class Composition(NamedTuple):
    """Q-, K- and V-composition of all pairs of heads, NaN where the first is not of an earlier layer."""

    q: Float[np.ndarray, "layer head layer head"]
    k: Float[np.ndarray, "layer head layer head"]
    v: Float[np.ndarray, "layer head layer head"]


@jit
def _two_sides(one: Circuit, other: Circuit) -> tuple[Rows, Rows]:
    first, second = one_sides(one, other)
    return wide(first), wide(second)


def _sides(heads: Heads) -> tuple[Rows, ThreeRows]:
    """Returns what later layers need of a layer's heads; and what the three compositions with earlier ones need.

    Computed two and two, one after another, for less memory.
    """
    qk, ov = heads.qk, heads.ov
    writers, values = jax.block_until_ready(_two_sides(Circuit(*ov[::-1]), ov))
    queries, keys = jax.block_until_ready(_two_sides(qk, Circuit(*qk[::-1])))
    return writers, jnp.concatenate([queries, keys, values])


@jit(static_argnames="n_head")
def _compositions(writers: Rows, readers: ThreeRows, *, n_head: int) -> Float[Array, "head three_heads"]:
    return jnp.sqrt(block_norms(writers, readers, n_head=n_head, n_other=3 * n_head))


def compositions(layers: Layers, limit: int = KEEP_BYTES // 2) -> Composition:
    """Returns the composition of all pairs of heads: one matrix product a pair of layers.

    Args:
      layers: of a checkpoint.
      limit: bytes of earlier layers in memory.
    """
    n_layer, n_head = layers.config.n_layer, layers.config.n_head
    found = np.full((3, n_layer, n_head, n_layer, n_head), np.nan, np.float32)
    with console.bar(total=number_of_pairs(n_layer), desc="composition", unit="pair of layers") as progress:
        for a, b, writers, readers in pairs_of_layers(n_layer, lambda layer: _sides(layers(layer)), progress, limit):
            if a < b:
                block = np.asarray(_compositions(writers, readers, n_head=n_head))
                found[:, a, :, b] = block.reshape(n_head, 3, n_head).swapaxes(0, 1)
    return Composition(*found)


class Similarity(NamedTuple):
    """Cosines of W_QK and of W_OV, and overlap of what W_Q reads, of all pairs of heads."""

    qk: Float[np.ndarray, "all_heads all_heads"]
    ov: Float[np.ndarray, "all_heads all_heads"]
    overlap: Float[np.ndarray, "all_heads all_heads"]


@jit
def _units(heads: Heads) -> tuple[Rows, ...]:
    """Returns the `wide` unit factors of W_QK and of W_OV; the first are a basis of what W_Q reads."""
    (queries, keys), (values, outputs) = unit_factors(heads.qk, heads.ov)
    return tuple(map(wide, (queries, keys, values, outputs)))


@jit(static_argnames="n_head")
def _similarities(one: tuple[Rows, ...], other: tuple[Rows, ...], *, n_head: int) -> Float[Array, "three head head"]:
    how = {"n_head": n_head, "n_other": n_head}
    qk = block_inner(one[0], one[1], other[0], other[1], **how)
    ov = block_inner(one[2], one[3], other[2], other[3], **how)
    return jnp.stack([qk, ov, block_overlaps(one[0], other[0], **how)])


def similarities(layers: Layers, limit: int = KEEP_BYTES) -> Similarity:
    """Returns the similarity of all pairs of heads; arguments as for `compositions`."""
    n_layer, n_head = layers.config.n_layer, layers.config.n_head
    found = np.full((3, n_layer, n_head, n_layer, n_head), np.nan, np.float32)

    def make(layer: int) -> tuple[tuple[Rows, ...], tuple[Rows, ...]]:
        units = _units(layers(layer))
        return units, units

    with console.bar(total=number_of_pairs(n_layer), desc="similarity", unit="pair of layers") as progress:
        for a, b, one, other in pairs_of_layers(n_layer, make, progress, limit):
            found[:, a, :, b] = np.asarray(_similarities(one, other, n_head=n_head))
    return Similarity(*(mirrored(each) for each in found))


def mirrored(values: Float[np.ndarray, "layer head layer head"]) -> Float[np.ndarray, "all_heads all_heads"]:
    """Returns a symmetric matrix of all heads from its part on and above the diagonal."""
    together = values.reshape(values.shape[0] * values.shape[1], -1)
    above = np.triu(np.ones(together.shape, bool))
    return np.where(above, together, together.T)


def divergences(model: Model, batch: Batch, limit: int = KEEP_BYTES) -> Float[np.ndarray, "all_heads all_heads"]:
    """Returns the Jensen–Shannon divergence of all pairs of heads' patterns on a text, mean over queries from 1 on.

    Args:
      model: that runs the text, once if `limit` holds all patterns, else once for each part of the queries.
      batch: one text, of two tokens or more.
      limit: bytes of patterns in memory.
    """
    n_layer, n_head, pos = model.config.n_layer, model.config.n_head, batch.ids.shape[1]
    total = np.zeros((n_layer, n_head, n_layer, n_head))
    together = min(max(limit // (n_layer * n_head * pos * 4), 1), pos - 1)
    parts = [slice(start, min(start + together, pos)) for start in range(1, pos, together)]
    with console.bar(total=number_of_pairs(n_layer) * len(parts), desc="divergence", unit="pair of layers") as progress:
        for part in parts:
            patterns = _patterns(model, batch, part)
            for a in range(n_layer):
                for b in range(a, n_layer):
                    block = np.asarray(pattern_divergence(patterns[a], patterns[b]), np.float64)
                    total[a, :, b] += block * patterns[a].shape[1]
                    progress.update()
    return mirrored((total / (pos - 1)).astype(np.float32))


def _patterns(model: Model, batch: Batch, queries: slice) -> Sequence[Float[np.ndarray, "head query key"]]:
    """Returns every layer's pattern of some queries, in float32."""
    captured: Any = (each.pattern for _, each in model.layerwise(batch, capture={"pattern"}))
    return [np.array(pattern[0, :, queries], np.float32) for pattern in captured]
