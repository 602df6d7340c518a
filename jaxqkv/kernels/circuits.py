"""What a head computes from weights alone: its QK and OV circuits, what they copy, and how they go together.

A circuit is an [embed, embed] matrix of rank head_dim, which is kept as its two factors and never made.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxqkv.errors import KernelError
from jaxqkv.kernels.calling import kernel
from jaxqkv.runtime.devices import jit
from jaxqkv.typing import AnyArray

# Of eigenvalues, relative to the largest, what is known of them in float32.
EPSILON = 2.0**-23


class Circuit(NamedTuple):
    """Matrices left · rightᵀ, one a head, by their factors; a row vector of the residual stream goes in on the left."""

    left: Float[Array, "head embed head_dim"]
    right: Float[Array, "head embed head_dim"]


def fold(
    weights: Float[AnyArray, "head embed head_dim"], gamma: Float[AnyArray, "embed"]
) -> Float[Array, "head embed head_dim"]:
    """Returns C diag(γ) W, with C = I − 11ᵀ/embed: weights that read the residual stream before the norm's 1/σ."""
    scaled = jnp.asarray(weights, jnp.float32) * jnp.asarray(gamma, jnp.float32)[None, :, None]
    return scaled - scaled.mean(axis=1, keepdims=True)


def _readers(
    weights: tuple[Float[AnyArray, "head embed head_dim"], ...], gamma: Float[AnyArray, "embed"] | None, folded: bool
) -> tuple[Float[Array, "head embed head_dim"], ...]:
    if not folded:
        return tuple(jnp.asarray(each, jnp.float32) for each in weights)
    if gamma is None:
        raise KernelError(
            "folded weights take gamma, the scale of the norm before attention; folded=False leaves them as they are"
        )
    return tuple(fold(each, gamma) for each in weights)


@kernel(static_argnames="folded")
def qk_circuit(
    w_q: Float[AnyArray, "head embed head_dim"],
    w_k: Float[AnyArray, "head embed head_dim"],
    gamma: Float[AnyArray, "embed"] | None = None,
    scale: jax.typing.ArrayLike | None = None,
    *,
    folded: bool = True,
) -> Circuit:
    """Factors of W_QK = Ŵ_Q Ŵ_Kᵀ / √head_dim of every head of a layer.

        Ŵ = C diag(γ) W,    C = I − 11ᵀ/embed;    W itself if not folded

    x W_QK yᵀ / (σ_x σ_y) is the score of a query at x for a key at y, up to what no key or every key has: biases are
    no part of it. b_K moves all scores of a query alike; b_Q and βW_Q prefer keys whatever the query. Adding γ⁻¹1vᵀ
    to W_Q changes no pattern, and no folded weight.

    Args:
      w_q, w_k: x @ w gives a head's queries and keys.
      gamma: scale γ of the norm before attention.
      scale: in the place of 1/√head_dim.
      folded: with the norm; False for the weights as they are.

    Returns:
      A float32 `Circuit`.
    """
    left, right = _readers((w_q, w_k), gamma, folded)
    return Circuit(left, right * jnp.asarray(left.shape[-1] ** -0.5 if scale is None else scale, jnp.float32))


@kernel(static_argnames="folded")
def ov_circuit(
    w_v: Float[AnyArray, "head embed head_dim"],
    w_o: Float[AnyArray, "head head_dim embed"],
    gamma: Float[AnyArray, "embed"] | None = None,
    *,
    folded: bool = True,
) -> Circuit:
    """Factors of W_OV = Ŵ_V Ŵ_O of every head of a layer.

        Ŵ_V = C diag(γ) W_V,    Ŵ_O = W_O C,    C = I − 11ᵀ/embed;    W_V and W_O themselves if not folded

    x W_OV / σ_x is what a head writes to the residual stream where it attends to x alone; without its bias
    (b_V + βW_V) W_O + b_O, and without its mean, which every later norm takes away.

    Args:
      w_v, w_o: x @ w_v gives a head's values, z @ w_o what it writes.
      gamma: scale γ of the norm before attention.
      folded: with the norms; False for the weights as they are.

    Returns:
      A float32 `Circuit`.
    """
    (left,) = _readers((w_v,), gamma, folded)
    right = jnp.asarray(w_o, jnp.float32).swapaxes(1, 2)
    return Circuit(left, right - right.mean(axis=1, keepdims=True) if folded else right)


@kernel()
def circuit_singular_values(
    left: Float[AnyArray, "head embed head_dim"], right: Float[AnyArray, "head embed head_dim"]
) -> Float[Array, "head head_dim"]:
    """Singular values of left · rightᵀ that may differ from 0, falling, of every head.

    Those of S_left S_rightᵀ, [head_dim, head_dim], where SᵀS is a factor's Gram matrix. S comes from two rounds of
    `eigh` of [head_dim, head_dim], the second of columns that the first has made nearly orthonormal, so that small
    values are not lost in the rounding of squares. QR of the tall factors took 2 to 80 times as long on the CPU that
    this was measured on, the most on busy cores; the SVD of the small matrices took some milliseconds a layer.

    Args:
      left, right: of a `Circuit`.

    Returns:
      float32, to some 1e-6 of the largest.
    """
    one, two = jnp.split(_rotated(_joined(left, right))[1], 2)
    return jnp.linalg.svd(one @ two.swapaxes(1, 2), compute_uv=False)


def _joined(*factors: Float[AnyArray, "_ embed head_dim"]) -> Float[Array, "all_heads embed head_dim"]:
    """Returns the heads of several factors as one array.

    What needs eigenvectors is given all of it at once: on a CPU, two batched `eigh` that may run at the same time in
    one program wait for each other's threads, on a machine with two for ever.
    """
    return jnp.concatenate([jnp.asarray(each, jnp.float32) for each in factors])


def _root(
    x: Float[Array, "head embed head_dim"],
) -> tuple[Float[Array, "head embed head_dim"], Float[Array, "head a b"]]:
    """Returns factors of x = U S with UᵀU near the identity, by the eigenvectors of xᵀx."""
    values, vectors = jnp.linalg.eigh(x.swapaxes(1, 2) @ x)
    # What is smaller is rounding.
    roots = jnp.sqrt(jnp.maximum(values, EPSILON * values[:, -1:]))
    return x @ (vectors / jnp.where(roots > 0, roots, 1)[:, None, :]), roots[:, :, None] * vectors.swapaxes(1, 2)


def _rotated(
    x: Float[Array, "head embed head_dim"],
) -> tuple[Float[Array, "head embed head_dim"], Float[Array, "head a b"]]:
    """Returns Q with orthonormal columns and a square S, x = Q S, of every head."""
    near, first = _root(x)
    directions, second = _root(near)
    return directions, second @ first


def one_sides(*circuits: tuple[Any, Any]) -> list[Float[Array, "_ embed head_dim"]]:
    """Returns Z with Z Zᵀ = W Wᵀ / ‖W‖², W = left · rightᵀ, of every head: all that the norm of a product Vᵀ W needs.

    Z = left Sᵀ / ‖left Sᵀ‖, with SᵀS = rightᵀ right by its eigenvectors; NaN for W = 0.

    Args:
      circuits: left and right factors of each, all of the same embed and head_dim.
    """
    left, right = (_joined(*factors) for factors in zip(*circuits, strict=True))
    values, vectors = jnp.linalg.eigh(right.swapaxes(1, 2) @ right)
    sides = left @ (vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None, :])
    sides /= jnp.sqrt((sides**2).sum(axis=(1, 2), keepdims=True))
    return jnp.split(sides, np.cumsum([len(one) for one, _ in circuits])[:-1])


def wide(factors: Float[Array, "head embed head_dim"]) -> Float[Array, "inner embed"]:
    """Returns the columns of all heads, one after another, as rows."""
    return factors.swapaxes(1, 2).reshape(-1, factors.shape[1])


def _sums_by_head(
    blocks: Float[Array, "inner other_inner"], n_head: int, n_other: int
) -> Float[Array, "head other_head"]:
    """Returns the sum of each pair of heads' block."""
    rows = blocks.reshape(blocks.shape[0], n_other, -1).sum(axis=2)
    return rows.reshape(n_head, -1, n_other).sum(axis=1)


def block_norms(
    one: Float[Array, "inner embed"], other: Float[Array, "other_inner embed"], *, n_head: int, n_other: int
) -> Float[Array, "head other_head"]:
    """Returns ‖Z_aᵀ Z_b‖² (Frobenius) of all pairs of heads, from their `wide` columns: one matrix product."""
    return _sums_by_head((one @ other.T) ** 2, n_head, n_other)


@kernel()
def composition(
    left: Float[AnyArray, "head embed head_dim"],
    right: Float[AnyArray, "head embed head_dim"],
    other_left: Float[AnyArray, "other_head embed head_dim"],
    other_right: Float[AnyArray, "other_head embed head_dim"],
) -> Float[Array, "head other_head"]:
    """Composition of every head's W_a = left · rightᵀ with every other head's W_b, in 0…1.

        ‖W_a W_b‖ / (‖W_a‖ ‖W_b‖),  Frobenius,  = √tr(W_aᵀW_a W_bW_bᵀ) / …

    With W_OV of an earlier layer as W_a: Q-composition with W_QK of a later one; K-composition with W_QKᵀ, which is its
    factors exchanged; V-composition with W_OV. Random directions have a root mean square of 1/√embed, or of
    1/√(embed − 1) where both are folded.
    Nothing larger than the product of all heads' factors, [head · head_dim, other_head · head_dim], is made: W_bW_bᵀ is
    Z Zᵀ with Z of the shape of a factor, from the `eigh` of a [head_dim, head_dim] Gram matrix.

    Args:
      left, right: of a `Circuit` of the earlier layer.
      other_left, other_right: of a `Circuit` of the later one.

    Returns:
      float32; NaN where a matrix is 0.
    """
    one, other = one_sides((right, left), (other_left, other_right))
    return jnp.sqrt(block_norms(wide(one), wide(other), n_head=len(one), n_other=len(other)))


@jit
def _through(
    left: Float[AnyArray, "head embed head_dim"],
    right: Float[AnyArray, "head embed head_dim"],
    readout: Float[AnyArray, "embed embed"],
) -> Float[Array, "head head_dim head_dim"]:
    """Returns rightᵀ · readout · left of every head."""
    left, right, readout = (jnp.asarray(each, jnp.float32) for each in (left, right, readout))
    return jnp.einsum("hed,ef,hfg->hdg", right, readout, left)


@kernel(compiled=False)
def copying_score(
    left: Float[AnyArray, "head embed head_dim"],
    right: Float[AnyArray, "head embed head_dim"],
    readout: Float[AnyArray, "embed embed"],
) -> Float[np.ndarray, "head"]:
    """How much more probable a head makes the tokens that it attends to; in −1…1, 1 where all eigenvalues are positive.

        Σ Re λ / Σ |λ|,  λ the eigenvalues of W_E W_OV diag(γ_f) W_U,  [vocab, vocab]

    which has the same non-zero eigenvalues as the [head_dim, head_dim] matrix rightᵀ · diag(γ_f) W_U W_E · left. That
    is float32 and the device's; its eigenvalues are NumPy's in float64, on the host, for accelerators have none of
    matrices that are not symmetric.

    Args:
      left, right: of a `Circuit` of W_OV; right may be W_Oᵀ as it is.
      readout: diag(γ_f) W_U W_E, from output and token embedding and the scale γ_f of the final norm, if there is one.

    Returns:
      float32 on the host; NaN where all eigenvalues are 0, and where a value is NaN or infinite.
    """
    matrices = np.asarray(_through(left, right, readout), np.float64)
    scores = np.full(len(matrices), np.nan, np.float32)
    for head, matrix in enumerate(matrices):
        if np.isfinite(matrix).all() and matrix.any():
            values = np.linalg.eigvals(matrix)
            if total := np.abs(values).sum():
                scores[head] = values.real.sum() / total
    return scores


@kernel()
def head_similarity(
    left: Float[AnyArray, "head embed head_dim"],
    right: Float[AnyArray, "head embed head_dim"],
    other_left: Float[AnyArray, "other_head embed head_dim"],
    other_right: Float[AnyArray, "other_head embed head_dim"],
) -> Float[Array, "head other_head"]:
    """Cosine of every head's W_a = left · rightᵀ with every other head's W_b, as vectors of embed² numbers; in −1…1.

        tr(W_aᵀ W_b) / (‖W_a‖ ‖W_b‖),    tr(W_aᵀ W_b) = Σ (left_aᵀ left_b) ⊙ (right_aᵀ right_b)

    through the [head_dim, head_dim] products of the factors. It does not depend on the basis inside a head: left R and
    right R⁻ᵀ give the same. The cosines of `column_cosine` do.

    Args:
      left, right: of a `Circuit`.
      other_left, other_right: of another, or the same.

    Returns:
      float32; NaN where a matrix is 0.
    """
    one, other = unit_circuit(left, right), unit_circuit(other_left, other_right)
    return block_inner(*map(wide, one), *map(wide, other), n_head=len(left), n_other=len(other_left))


def block_inner(
    left: Float[Array, "inner embed"],
    right: Float[Array, "inner embed"],
    other_left: Float[Array, "other_inner embed"],
    other_right: Float[Array, "other_inner embed"],
    *,
    n_head: int,
    n_other: int,
) -> Float[Array, "head other_head"]:
    """Returns the inner products of all pairs of `unit_circuit`s, from their `wide` factors."""
    products = (left @ other_left.T) * (right @ other_right.T)
    return jnp.clip(_sums_by_head(products, n_head, n_other), -1, 1)


def unit_circuit(
    left: Float[AnyArray, "head embed head_dim"], right: Float[AnyArray, "head embed head_dim"]
) -> Circuit:
    """Returns factors of left · rightᵀ divided by its Frobenius norm; NaN for 0."""
    left, right = (jnp.asarray(each, jnp.float32) for each in (left, right))
    one, two = (each.swapaxes(1, 2) @ each for each in (left, right))
    norms = jnp.sqrt(jnp.maximum((one * two).sum(axis=(1, 2)), 0))
    return Circuit(left / norms[:, None, None], right)


def basis(weights: Float[AnyArray, "head embed head_dim"]) -> Float[Array, "head embed head_dim"]:
    """Returns an orthonormal basis of the columns of every head's weights; NaN for weights of 0."""
    weights = jnp.asarray(weights, jnp.float32)
    return jnp.where((weights != 0).any(axis=(1, 2), keepdims=True), _rotated(weights)[0], jnp.nan)


@kernel()
def subspace_overlap(
    weights: Float[AnyArray, "head embed head_dim"], other: Float[AnyArray, "other_head embed head_dim"]
) -> Float[Array, "head other_head"]:
    """How much of what one head reads another reads too, of all pairs of heads; in 0…1.

        ‖Q_aᵀ Q_b‖² / head_dim,  Frobenius,  Q an orthonormal basis of the head's columns

    The mean of the squared cosines of the angles between the two subspaces: 1 for the same subspace, head_dim/embed
    for random ones.

    Args:
      weights, other: of independent columns, such as folded W_Q.

    Returns:
      float32; NaN for weights of 0.
    """
    one, two = jnp.split(basis(_joined(weights, other)), [len(weights)])
    overlap = block_norms(wide(one), wide(two), n_head=len(one), n_other=len(two)) / one.shape[-1]
    return jnp.minimum(overlap, 1)
