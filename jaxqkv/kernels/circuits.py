"""QK and OV circuits of heads, from weights alone: their size, what they copy, and how they go together.

A circuit is an [embed, embed] matrix of rank head_dim, which is kept as its two factors and never made.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxqkv.errors import KernelError
from jaxqkv.kernels.calling import kernel
from jaxqkv.kernels.factors import (
    basis,
    block_inner,
    block_norms,
    block_overlaps,
    joined,
    one_sides,
    root_of_gram,
    rotated,
    scaled,
    unit_factors,
    wide,
)
from jaxqkv.kernels.scales import root
from jaxqkv.runtime.arrays import is_concrete
from jaxqkv.runtime.devices import jit
from jaxqkv.typing import AnyArray


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
        if gamma is not None:
            raise KernelError("gamma is the scale of a norm that is folded in; with folded=False leave it out")
        return tuple(jnp.asarray(each, jnp.float32) for each in weights)
    if gamma is None:
        raise KernelError(
            "folded weights take gamma, the scale of the norm before attention; folded=False leaves them as they are"
        )
    return tuple(fold(each, gamma) for each in weights)


@kernel()
def qk_circuit(
    w_q: Float[AnyArray, "head embed head_dim"],
    w_k: Float[AnyArray, "head embed head_dim"],
    gamma: Float[AnyArray, "embed"] | None = None,
    scale: jax.typing.ArrayLike | None = None,
    *,
    folded: bool = True,
) -> Circuit:
    """Returns the factors of W_QK = Ŵ_Q Ŵ_Kᵀ / √head_dim of every head of a layer.

        Ŵ = C diag(γ) W,    C = I − 11ᵀ/embed;    W itself if not folded

    x W_QK yᵀ / (σ_x σ_y) is the score of a query at x for a key at y, up to what no key or every key has: biases are
    no part of it. b_K moves all scores of a query alike; b_Q and βW_Q prefer keys whatever the query. Adding γ⁻¹1vᵀ
    to W_Q changes no pattern, and no folded weight.

    Args:
      w_q, w_k: x @ w gives a head's queries and keys.
      gamma: scale γ of the norm before attention; only if folded.
      scale: in the place of 1/√head_dim.
      folded: with the norm; False for the weights as they are.

    Returns:
      A float32 `Circuit`.
    """
    left, right = _readers((w_q, w_k), gamma, folded)
    return Circuit(left, right * jnp.asarray(left.shape[-1] ** -0.5 if scale is None else scale, jnp.float32))


@kernel()
def ov_circuit(
    w_v: Float[AnyArray, "head embed head_dim"],
    w_o: Float[AnyArray, "head head_dim embed"],
    gamma: Float[AnyArray, "embed"] | None = None,
    *,
    folded: bool = True,
) -> Circuit:
    """Returns the factors of W_OV = Ŵ_V Ŵ_O of every head of a layer.

        Ŵ_V = C diag(γ) W_V,    Ŵ_O = W_O C,    C = I − 11ᵀ/embed;    W_V and W_O themselves if not folded

    x W_OV / σ_x is what a head writes to the residual stream where it attends to x alone; without its bias
    (b_V + βW_V) W_O + b_O, and without its mean, which every later norm takes away.

    Args:
      w_v, w_o: x @ w_v gives a head's values, z @ w_o what it writes.
      gamma: scale γ of the norm before attention; only if folded.
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
    """Returns the singular values of left · rightᵀ that may differ from 0, falling, of every head.

    Those of S_left S_rightᵀ, [head_dim, head_dim], where factors are Q S with orthonormal Q, from two rounds of `eigh`.
    The SVD of the small matrices took some milliseconds a layer on the CPU that this was measured on.

    Args:
      left, right: of a `Circuit`.

    Returns:
      float32, to some 1e-6 of the largest, at any scale of the factors. Derivatives are right where the values are
      distinct and not 0.
    """
    x, sizes = scaled(joined(left, right))
    q, s = rotated(x)
    one, two = jnp.split(root_of_gram(q) @ s, 2)
    values = jnp.linalg.svd(one @ two.swapaxes(1, 2), compute_uv=False)
    small, large = jnp.sort(jnp.stack(jnp.split(sizes[:, :, 0], 2)), axis=0)
    return values * small * large


@kernel()
def composition(
    left: Float[AnyArray, "head embed head_dim"],
    right: Float[AnyArray, "head embed head_dim"],
    other_left: Float[AnyArray, "other_head embed head_dim"],
    other_right: Float[AnyArray, "other_head embed head_dim"],
) -> Float[Array, "head other_head"]:
    """Returns the composition of every head's W_a = left · rightᵀ with every other head's W_b, in 0…1.

        ‖W_a W_b‖ / (‖W_a‖ ‖W_b‖),  Frobenius,  = √tr(W_aᵀW_a W_bW_bᵀ) / …

    With W_OV of an earlier layer as W_a: Q-composition with W_QK of a later one; K-composition with W_QKᵀ, which is its
    factors exchanged; V-composition with W_OV. Random directions have a root mean square of 1/√embed, or of
    1/√(embed − 1) where both are folded.
    Nothing larger than the product of all heads' factors, [head · head_dim, other_head · head_dim], is made: W_bW_bᵀ is
    Z Zᵀ with Z of the shape of a factor, from two rounds of `eigh` of a [head_dim, head_dim] Gram matrix. The scale
    of a factor has no effect, nor has the basis inside a head, left R and right R⁻ᵀ, but for what the rounding of such
    factors has lost: some 1e-7 times the condition of R.

    Args:
      left, right: of a `Circuit` of the earlier layer.
      other_left, other_right: of a `Circuit` of the later one.

    Returns:
      float32; NaN where a matrix is 0.
    """
    one, other = one_sides((right, left), (other_left, other_right))
    return root(block_norms(wide(one), wide(other), n_head=len(one), n_other=len(other)))


@jit
def _through(
    left: Float[AnyArray, "head embed head_dim"],
    right: Float[AnyArray, "head embed head_dim"],
    readout: Float[AnyArray, "embed embed"],
) -> Float[Array, "head head_dim head_dim"]:
    """Returns rightᵀ · readout · left of every head in an orthonormal basis, times a positive number; NaN for W = 0."""
    ((left, right),) = unit_factors((left, right))
    return jnp.einsum("hed,ef,hfg->hdg", right, scaled(jnp.asarray(readout)[None])[0][0], left)


@kernel(compiled=False)
def copying_score(
    left: Float[AnyArray, "head embed head_dim"],
    right: Float[AnyArray, "head embed head_dim"],
    readout: Float[AnyArray, "embed embed"],
) -> Float[np.ndarray, "head"]:
    """Returns how much more probable a head makes what it attends to; in −1…1, 1 where all eigenvalues are positive.

        Σ Re λ / Σ |λ|,  λ the eigenvalues of W_E W_OV diag(γ_f) W_U,  [vocab, vocab]

    which has the same non-zero eigenvalues as the [head_dim, head_dim] matrix rightᵀ · diag(γ_f) W_U W_E · left. That
    is float32 and the device's; its eigenvalues are NumPy's in float64, on the host, for JAX does not have
    those of matrices that are not symmetric on every device. So it is not for the inside of `jit`, `vmap` or `grad`.

    Args:
      left, right: of a `Circuit` of W_OV; right may be W_Oᵀ as it is.
      readout: diag(γ_f) W_U W_E, from output and token embedding and the scale γ_f of the final norm, if there is one.

    Returns:
      float32 on the host; NaN where all eigenvalues are 0, and where a value is NaN or infinite.

    Raises:
      KernelError: for arrays that JAX traces.
    """
    if not all(map(is_concrete, (left, right, readout))):
        raise KernelError("copying_score runs on the host: call it outside of jit, vmap and grad")
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
    """Returns the cosine of every head's W_a = left · rightᵀ with every other head's W_b; in −1…1.

        tr(W_aᵀ W_b) / (‖W_a‖ ‖W_b‖),    tr(W_aᵀ W_b) = Σ (left_aᵀ left_b) ⊙ (right_aᵀ right_b)

    of the matrices as vectors of embed² numbers, through the [head_dim, head_dim] products of the factors, the left
    ones made orthonormal. It does not depend on scales, nor on the basis inside a head: left R and right R⁻ᵀ give the
    same, but for what the rounding of such factors has lost, some 1e-7 times the condition of R. The cosines of
    `column_cosine` do.

    Args:
      left, right: of a `Circuit`.
      other_left, other_right: of another, or the same.

    Returns:
      float32; NaN where a matrix is 0.
    """
    one, other = unit_factors((left, right), (other_left, other_right))
    return block_inner(*map(wide, one), *map(wide, other), n_head=len(left), n_other=len(other_left))


@kernel()
def subspace_overlap(
    weights: Float[AnyArray, "head embed head_dim"], other: Float[AnyArray, "other_head embed head_dim"]
) -> Float[Array, "head other_head"]:
    """Returns how much of what one head reads another reads too, of all pairs of heads; in 0…1.

        ‖Q_aᵀ Q_b‖² / head_dim,  Frobenius,  Q an orthonormal basis of the head's columns

    The mean of the squared cosines of the angles between the two subspaces: 1 for the same subspace, head_dim/embed
    for random ones. Where the columns are not independent, Q is a basis of what they span, and head_dim becomes
    √(rank_a · rank_b): still 1 for the same subspace alone. Directions smaller than some 1e-6 of a head's largest are
    rounding and count as none; so folded W_Q of as many columns as rows have one less.

    Args:
      weights, other: such as folded W_Q, at any scale.

    Returns:
      float32; NaN for weights of 0.
    """
    one, two = basis(weights, other)
    return block_overlaps(wide(one), wide(two), n_head=len(one), n_other=len(two))
