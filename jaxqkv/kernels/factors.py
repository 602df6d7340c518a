"""Arithmetic with the factors of heads' circuits: without their scale and basis, and sums over pairs of heads.

W = left · rightᵀ is the same for left R and right R⁻ᵀ, whatever R. With an R of condition κ, the rounding of factors
loses κ roundings of W, and products of their Gram matrices would lose κ². So one factor is made orthonormal first, and
the other is given all of W's size.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxqkv.kernels.scales import over_root, power_of_two
from jaxqkv.typing import AnyArray

# Of eigenvalues, relative to the largest, what is known of them in float32.
EPSILON = 2.0**-23
# Singular value of a factor, relative to its largest, below which a direction is rounding, relative to √EPSILON.
ROUNDING = 8 * EPSILON**0.5

Factors = Float[Array, "head embed head_dim"]


def scaled(x: Float[AnyArray, "head embed head_dim"]) -> tuple[Factors, Float[Array, "head one one"]]:
    """Returns every head's x divided by a power of two, of magnitudes below 2 then, and that power; of 0, 0 and 1.

    The power counts as a constant: it is for what does not depend on it.
    """
    x = jnp.asarray(x, jnp.float32)
    sizes = power_of_two(x, axis=(1, 2))
    return x / sizes, sizes


def joined(*factors: Float[AnyArray, "_ embed head_dim"]) -> Float[Array, "all_heads embed head_dim"]:
    """Returns the heads of several factors as one array.

    What needs eigenvectors is given all of it at once: on a CPU, two batched `eigh` that may run at the same time in
    one program wait for each other's threads, on a machine with two for ever.
    """
    return jnp.concatenate([jnp.asarray(each, jnp.float32) for each in factors])


def _parted(x: Factors, factors: Sequence[Any]) -> list[Float[Array, "_ embed head_dim"]]:
    """Returns the heads of each of the factors that were `joined`."""
    return jnp.split(x, np.cumsum([len(each) for each in factors])[:-1])


def _root(x: Factors) -> tuple[Float[Array, "head a b"], Float[Array, "head a b"], Float[Array, "head b"]]:
    """Returns A and its inverse S, with x A nearly orthonormal, and the sizes of S's rows: constants of derivatives."""
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(x.swapaxes(1, 2) @ x))
    # What is smaller is rounding.
    roots = jnp.sqrt(jnp.maximum(values, EPSILON * values[:, -1:]))
    return vectors / jnp.where(roots > 0, roots, 1)[:, None, :], roots[:, :, None] * vectors.swapaxes(1, 2), roots


def rotated(x: Factors) -> tuple[Factors, Float[Array, "head a b"]]:
    """Returns Q with orthonormal columns and a square S, x = Q S, of every head.

    Two rounds of `eigh` of [head_dim, head_dim], the second of columns that the first has made nearly orthonormal, so
    that small directions are not lost in the rounding of squares. Directions smaller than some 1e-6 of the largest are
    rounding: columns of 0. QR of the tall factors took 2 to 80 times as long on the CPU that this was measured on, the
    most on busy cores.

    For derivatives S is a constant, and Q = x S⁻¹: those of functions of Q S are right, and with `gram` taken as it is
    instead of as the identity, so are those of functions that take a root of it to first order.
    """
    away, first, _ = _root(x)
    near = x @ away
    turn, second, roots = _root(near)
    kept = roots > ROUNDING * roots[:, -1:]
    return near @ jnp.where(kept[:, None, :], turn, 0), jnp.where(kept[:, :, None], second, 0) @ first


def gram(x: Factors) -> Float[Array, "head a b"]:
    """Returns xᵀx of every head."""
    return x.swapaxes(1, 2) @ x


def root_of_gram(q: Factors) -> Float[Array, "head a b"]:
    """Returns √(qᵀq) of nearly orthonormal columns, right to first order: (1 + qᵀq) / 2."""
    return (jnp.eye(q.shape[-1], dtype=q.dtype)[None] + gram(q)) / 2


def one_sides(*circuits: tuple[Any, Any]) -> list[Float[Array, "_ embed head_dim"]]:
    """Returns Z with Z Zᵀ = W Wᵀ / ‖W‖², W = left · rightᵀ, of every head: all that the norm of a product Vᵀ W needs.

    Z = left Sᵀ / ‖left Sᵀ‖, with right = Q S; NaN for W = 0.

    Args:
      circuits: left and right factors of each, all of the same embed and head_dim.
    """
    left, right = (scaled(joined(*factors))[0] for factors in zip(*circuits, strict=True))
    q, s = rotated(right)
    sides, _ = scaled(left @ s.swapaxes(1, 2))
    sides = sides @ root_of_gram(q)
    sides = over_root(sides, (sides**2).sum(axis=(1, 2), keepdims=True))
    return _parted(sides, [one for one, _ in circuits])


def unit_factors(*circuits: tuple[Any, Any]) -> list[tuple[Factors, Factors]]:
    """Returns Q and right Sᵀ / ‖W‖ of every head, W = left · rightᵀ and left = Q S; NaN in the second for W = 0.

    Args:
      circuits: left and right factors of each, all of the same embed and head_dim.
    """
    left, right = (scaled(joined(*factors))[0] for factors in zip(*circuits, strict=True))
    q, s = rotated(left)
    turned, _ = scaled(right @ s.swapaxes(1, 2))
    squares = jnp.maximum((gram(q) * gram(turned)).sum(axis=(1, 2), keepdims=True), 0)
    parts = [_parted(each, [one for one, _ in circuits]) for each in (q, over_root(turned, squares))]
    return list(zip(*parts, strict=True))


def basis(*weights: Float[AnyArray, "_ embed head_dim"]) -> list[Factors]:
    """Returns an orthonormal basis of what the columns of every head's weights span; columns of 0 beyond their rank."""
    q, _ = rotated(scaled(joined(*weights))[0])
    q = q @ (1.5 * jnp.eye(q.shape[-1], dtype=q.dtype)[None] - gram(q) / 2)  # q (qᵀq)^−½, which derivatives need
    return _parted(q, weights)


# --- sums over pairs of heads ---


def wide(factors: Factors) -> Float[Array, "inner embed"]:
    """Returns the columns of all heads, one after another, as rows."""
    return factors.swapaxes(1, 2).reshape(-1, factors.shape[1])


def _known(
    n_head: int, *sides: Float[Array, "inner embed"]
) -> tuple[list[Float[Array, "inner embed"]], Bool[Array, "head"]]:
    """Returns `wide` columns, zeros for each head with a NaN in any of them, and which heads have no NaN.

    A NaN in a matrix product would make the derivatives by all other heads NaN.
    """
    broken = jnp.any(jnp.stack([jnp.isnan(columns).any(axis=1) for columns in sides]), axis=0)
    known = ~broken.reshape(n_head, broken.size // max(n_head, 1)).any(axis=1)
    kept = jnp.repeat(known, broken.size // max(n_head, 1))[:, None]
    return [jnp.where(kept, columns, 0) for columns in sides], known


def _sums_by_head(
    blocks: Float[Array, "inner other_inner"], n_head: int, n_other: int
) -> Float[Array, "head other_head"]:
    """Returns the sum of each pair of heads' block."""
    inner, other_inner = blocks.shape
    rows = blocks.reshape(inner, n_other, other_inner // max(n_other, 1)).sum(axis=2)
    return rows.reshape(n_head, inner // max(n_head, 1), n_other).sum(axis=1)


def block_norms(
    one: Float[Array, "inner embed"], other: Float[Array, "other_inner embed"], *, n_head: int, n_other: int
) -> Float[Array, "head other_head"]:
    """Returns ‖Z_aᵀ Z_b‖² (Frobenius) of all pairs of heads, from their `wide` columns: one matrix product."""
    ([one], known), ([other], other_known) = _known(n_head, one), _known(n_other, other)
    sums = _sums_by_head((one @ other.T) ** 2, n_head, n_other)
    return jnp.where(known[:, None] & other_known[None], sums, jnp.nan)


def block_overlaps(
    one: Float[Array, "inner embed"], other: Float[Array, "other_inner embed"], *, n_head: int, n_other: int
) -> Float[Array, "head other_head"]:
    """Returns ‖Q_aᵀ Q_b‖² / √(rank_a · rank_b) of all pairs of heads, from the `wide` columns of each `basis`."""
    ranks = [
        (each**2).sum(axis=1).reshape(count, each.shape[0] // max(count, 1)).sum(axis=1)
        for each, count in ((one, n_head), (other, n_other))
    ]
    sizes = jax.lax.stop_gradient(ranks[0][:, None] * ranks[1][None])
    return jnp.minimum(over_root(block_norms(one, other, n_head=n_head, n_other=n_other), sizes), 1)


def block_inner(
    left: Float[Array, "inner embed"],
    right: Float[Array, "inner embed"],
    other_left: Float[Array, "other_inner embed"],
    other_right: Float[Array, "other_inner embed"],
    *,
    n_head: int,
    n_other: int,
) -> Float[Array, "head other_head"]:
    """Returns the inner products of all pairs of heads' W, from their `wide` `unit_factors`."""
    (left, right), known = _known(n_head, left, right)
    (other_left, other_right), other_known = _known(n_other, other_left, other_right)
    products = (left @ other_left.T) * (right @ other_right.T)
    sums = jnp.clip(_sums_by_head(products, n_head, n_other), -1, 1)
    return jnp.where(known[:, None] & other_known[None], sums, jnp.nan)
