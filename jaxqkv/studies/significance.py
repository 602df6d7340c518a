"""q-values of a figure's tests, and marks of what is significant."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from jaxqkv.figures.panels import Line

# Share of false discoveries among what is marked in a picture.
LEVEL = 0.05


def q_values(*p: Float[np.ndarray, "..."]) -> list[Float[np.ndarray, "..."]]:
    """Returns Benjamini and Hochberg's q-values of all tests of a figure together, in the arrays' shapes.

    As `scipy.stats.false_discovery_control`; NaN where p is NaN, which does not count as a test.
    """
    from scipy.stats import false_discovery_control

    together = np.concatenate([each.ravel() for each in p]).astype(np.float64)
    q = np.full(together.size, np.nan)
    tested = np.isfinite(together)
    if tested.any():
        q[tested] = false_discovery_control(together[tested])
    parts = np.split(q.astype(np.float32), np.cumsum([each.size for each in p])[:-1])
    return [part.reshape(each.shape) for part, each in zip(parts, p, strict=True)]


def stars(
    x: Shaped[np.ndarray, "point"], y: Float[np.ndarray, "point"], q: Float[np.ndarray, "point"], color: str
) -> Line:
    """Returns a star at every significant point, to be drawn over a curve."""
    chosen = q < LEVEL
    return Line(x=x[chosen], y=y[chosen], color=color, marker="*", size=13, linestyle="", face=1.0)


def star_texts(significant: Bool[np.ndarray, "layer head"]) -> list[list[str]]:
    """Returns the texts of a map with a column for each layer: a star in every significant cell."""
    return [["★" if each else "" for each in row] for row in significant.T]


def marked(
    x: Shaped[np.ndarray, "point"], y: Float[np.ndarray, "point"], significant: Bool[np.ndarray, "point"], **look: Any
) -> list[Line]:
    """Returns a curve with filled markers at significant points and hollow ones at the others."""
    label, marker, linestyle = look.pop("label", ""), look.pop("marker", "o"), look.pop("linestyle", "-")
    return [
        Line(x=x, y=y, label=label, linestyle=linestyle, **look),
        Line(x=x, y=np.where(significant, y, np.nan), marker=marker, linestyle="", face=1.0, **look),
        Line(x=x, y=np.where(significant, np.nan, y), marker=marker, linestyle="", face=0.0, **look),
    ]
