"""Similarities within and across categories, with permutation tests and bootstrap intervals."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxqkv.kernels import bootstrap_interval, permutation_null, permutation_p, representational_similarity, student_t
from jaxqkv.runtime.devices import jit
from jaxqkv.studies.category_selectivity.run import PAIRS
from jaxqkv.studies.category_selectivity.words import Words
from jaxqkv.studies.significance import q_values
from jaxqkv.typing import AnyArray

Similarity = Float[AnyArray, "layer qkv word word"]


class Selectivity(NamedTuple):
    """Category selectivity of the similarities in each layer, `[layer, qkv]`.

    Attributes:
      difference: mean similarity within categories − mean across.
      t: Student's t of the two samples.
      average: ½ (mean within + mean across).
    """

    difference: Float[AnyArray, "layer qkv"]
    t: Float[AnyArray, "layer qkv"]
    average: Float[AnyArray, "layer qkv"]


@jit
def _selectivity(
    similarity: Float[AnyArray, "qkv word word"],
    within: Bool[AnyArray, "word word"],
    across: Bool[AnyArray, "word word"],
) -> Selectivity:
    """Returns difference, t and average of one layer, `[qkv]`; one program serves any number of layers."""

    def one(x: Float[Array, "word word"]) -> Selectivity:
        means = [jnp.where(mask, x, 0).sum() / mask.sum().astype(x.dtype) for mask in (within, across)]
        return Selectivity(means[0] - means[1], student_t(x, x, within, across)[0], (means[0] + means[1]) / 2)

    return jax.vmap(one)(jnp.asarray(similarity))


def selectivity(similarity: Similarity, words: Words) -> Selectivity:
    """Returns difference, t and average of each layer, for Q, K and V."""
    masks = words.masks()
    layers = [_selectivity(layer, masks["within"], masks["across"]) for layer in similarity]
    return Selectivity(*map(np.stack, zip(*layers, strict=True)))


def _difference(label: Int[AnyArray, "word"], pairs: Float[AnyArray, "layer qkv pair"]) -> Float[Array, "layer qkv"]:
    """Returns mean within − mean across categories, from sums over pairs of words.

    The sum within is a product of flags and similarities, so that all permutations are one matrix product.
    """
    label, pairs = jnp.asarray(label), jnp.asarray(pairs)
    one, other = np.triu_indices(label.shape[0], 1)
    within = (label[one] == label[other]).astype(jnp.float32)
    n, flat = within.sum(), pairs.reshape(-1, pairs.shape[-1])
    inside = flat @ within
    return (inside / n - (flat.sum(axis=1) - inside) / (within.size - n)).reshape(pairs.shape[:2])


_observed = jit(_difference)


def difference_tests(
    similarity: Similarity, words: Words, seed: int, permutations: int
) -> tuple[Float[np.ndarray, "layer qkv"], Float[np.ndarray, "layer qkv"]]:
    """Returns one-sided p and q-values of the differences, by permuting the words' categories.

    Words are permuted rather than pairs, because many pairs share a word.
    """
    pairs = similarity[..., *np.triu_indices(len(words.label), 1)]
    pairs = pairs - pairs.mean(axis=-1, keepdims=True)  # so that sums keep their digits
    null = permutation_null(words.label, pairs, jax.random.key(seed), statistic=_difference, permutations=permutations)
    p = np.asarray(permutation_p(null, _observed(words.label, pairs), two_sided=False))
    return p, q_values(p)[0]


def _rsa(weights: Float[Array, "word"] | None, similarity: Similarity) -> Float[Array, "layer pair"]:
    def pair(a: int, b: int) -> Float[Array, "layer"]:
        return jax.vmap(representational_similarity, in_axes=(0, 0, None))(similarity[:, a], similarity[:, b], weights)

    return jnp.stack([pair(a, b) for a, b in PAIRS.values()], axis=1)


@jit
def _rsa_of_layer(similarity: Float[Array, "qkv word word"]) -> Float[Array, "pair"]:
    """Returns the correlations of one layer; one program serves any number of layers."""
    return _rsa(None, similarity[None])[0]


def rsa(similarity: Similarity) -> Float[np.ndarray, "layer pair"]:
    """Returns the correlations of the upper triangles of Q's, K's and V's similarities."""
    return np.stack([_rsa_of_layer(layer) for layer in similarity])


def rsa_intervals(
    similarity: Similarity, seed: int, samples: int
) -> tuple[Float[np.ndarray, "layer pair"], Float[np.ndarray, "layer pair"]]:
    """Returns the ends of bootstrap intervals over words of the correlations in `rsa`."""
    n_word = similarity.shape[-1]
    ends = bootstrap_interval(similarity, jax.random.key(seed), n_unit=n_word, statistic=_rsa, samples=samples)
    low, high = (np.asarray(each) for each in ends)
    return low, high
