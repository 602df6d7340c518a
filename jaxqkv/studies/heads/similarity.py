"""The figure of similarities between heads, which do not depend on the basis inside a head."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxqkv.errors import NotDrawable
from jaxqkv.figures.displays import Display
from jaxqkv.figures.panels import Image
from jaxqkv.studies.heads import STUDY
from jaxqkv.studies.heads.layers import Layers
from jaxqkv.studies.heads.pairs_of_heads import Similarity, divergences, similarities
from jaxqkv.studies.heads.run import HeadsRun, reduction

# Heads up to this many are named at the edges.
NAMED = 24


class Similarities(NamedTuple):
    """Similarities of weights, and divergence of patterns on a text."""

    weights: Similarity
    divergence: Float[np.ndarray, "all_heads all_heads"]


@reduction
def similarity(run: HeadsRun) -> Similarities:
    """Returns the similarity of all pairs of heads.

    Raises:
      NotDrawable: for a text of one token.
    """
    if run.batch.ids.shape[1] < 2:
        raise NotDrawable(
            "the divergence of patterns, a panel of this figure, needs a text of 2 tokens or more; choose a longer one "
            "with --text"
        )
    return Similarities(similarities(Layers(run.weights, run.options.raw)), divergences(run.model, run.batch))


def ward_order(cosine: Float[np.ndarray, "all_heads all_heads"]) -> Int[np.ndarray, "all_heads"]:
    """Returns the heads in the order of Ward's clustering of the distances √(2 − 2·cosine); NaN counts as cosine 0."""
    from scipy.cluster.hierarchy import leaves_list, ward

    if len(cosine) < 2:
        return np.arange(len(cosine))
    above = np.triu_indices(len(cosine), 1)
    distances = np.sqrt(np.maximum(2 - 2 * np.nan_to_num(cosine[above].astype(np.float64)), 0))
    return np.asarray(leaves_list(ward(distances)), np.int64)


@STUDY.define(
    "similarity",
    "similarity of every pair of heads, by weights and by patterns",
    "qk, ov, overlap, divergence [layer·head, layer·head], order [layer·head]",
)
def figure_similarity(run: HeadsRun, similarity: Similarities) -> Display:
    arrays = similarity.weights._asdict() | {"divergence": similarity.divergence}
    order = ward_order(similarity.weights.qk)
    layers = Layers(run.weights, run.options.raw)
    n_head = run.config.n_head
    ticks: dict[str, Any] = {"xticks": (), "yticks": ()}
    if len(order) <= NAMED:
        names = [f"{each // n_head}.{each % n_head}" for each in order]
        ticks = {"xticks": range(len(order)), "yticks": range(len(order)), "xnames": names, "ynames": names}
    apart = ~np.eye(len(order), dtype=bool)
    panels = []
    for title, name, label, signed in (
        (r"A) Cosine of $\mathbf{W_{QK}}$", "qk", "Cosine", True),
        (r"B) Cosine of $\mathbf{W_{OV}}$", "ov", "Cosine", True),
        (r"C) Overlap of what $\mathbf{W_Q}$ reads", "overlap", "Overlap", False),
        ("D) Divergence of patterns", "divergence", "Jensen–Shannon divergence (nats)", False),
    ):
        values = arrays[name][np.ix_(order, order)]
        others = values[apart]  # of a head with itself there is nothing to see
        largest = float(np.nanmax(np.abs(others))) if np.isfinite(others).any() else 1.0
        image = Image(values=values, cmap="RdBu_r" if signed else "viridis", vmin=-largest if signed else 0.0,
                      vmax=largest or 1.0, title=title, colorbar=label, **ticks)  # fmt: skip
        panels.append(image)
    strip = Image(values=(order // n_head)[None], cmap="plasma", yticks=(), xticks=(), colorbar="Layer",
                  xlabel=r"Heads, those of similar $\mathbf{W_{QK}}$ side by side")  # fmt: skip
    return Display(
        arrays=arrays | {"order": order},
        panels=[panels[:2], panels[2:], [strip, strip]],
        heights=(12, 12, 1),
        title=f"Similarity of the heads of {run.label}",
        caption=f"All pairs of heads of {run.name}: cosines of W_QK and of W_OV, overlap of the subspaces that W_Q "
        f"reads (1 the same, {run.config.head_dim / run.config.n_embd:.3f} random; where a W_Q has not full rank, of "
        "what its columns span, over the root of the product of the ranks), and Jensen–Shannon divergence of "
        f"attention patterns on the text, mean over queries from 1 on. Weights {layers.words}. Heads in the order of "
        "Ward's clustering by W_QK, with their layers below; colours to the largest value of two different heads. None "
        "of these depends on the basis inside a head, or on b_K, as the cosines of single columns do.",
        size=(12, 10.8),
    )
