"""Figures of the heads' weights: copying, spectra and composition."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxqkv.checkpoints.checkpoint import Checkpoint
from jaxqkv.checkpoints.weights import Weights
from jaxqkv.errors import NotDrawable
from jaxqkv.figures import style
from jaxqkv.figures.displays import Display, head_map
from jaxqkv.figures.panels import Image, Line, Lines
from jaxqkv.kernels import circuit_singular_values, copying_score
from jaxqkv.kernels.weights import effective_rank
from jaxqkv.runtime import console
from jaxqkv.runtime.devices import jit
from jaxqkv.studies.heads import STUDY
from jaxqkv.studies.heads.layers import Heads, Layers
from jaxqkv.studies.heads.null import null_q, null_values
from jaxqkv.studies.heads.pairs_of_heads import Composition, compositions
from jaxqkv.studies.heads.run import HeadsRun, reduction
from jaxqkv.studies.significance import LEVEL, star_texts
from jaxqkv.typing import AnyArray

# Raised when copying scores are computed otherwise, so that those of fresh checkpoints are computed again.
VERSION = 2
# Rows of the token embedding that are multiplied at a time.
ROWS = 8192
# Share of the differences from the baseline that colours tell apart, and how many pairs of heads the caption names.
SHOWN, NAMED = 0.995, 3
# Layers and heads with fewer than this have a tick each.
TICKS = 16


# --- copying ---


@jit(donate_argnums=0)
def _add_product(
    total: Float[Array, "embed embed"], out: Float[AnyArray, "row embed"], token: Float[AnyArray, "row embed"]
) -> Float[Array, "embed embed"]:
    return total + jnp.asarray(out).T @ jnp.asarray(token)


def readout(weights: Weights, folded: bool) -> Float[Array, "embed embed"]:
    """Returns diag(γ_f) W_U W_E, from some thousand tokens at a time; without the final norm's γ_f if not folded."""
    token, out = weights.W_E, weights.W_U.T
    total = jnp.zeros((token.shape[1],) * 2, np.float32)
    for start in range(0, len(token), ROWS):
        total = _add_product(total, out[start : start + ROWS], token[start : start + ROWS])
    if not folded:
        return total
    gamma, _ = weights.config.final_norm(weights.final(unembedding=False))
    return total * gamma[:, None]


def copying_scores(checkpoint: Checkpoint, raw: bool = False) -> dict[str, Float[np.ndarray, "layer head"]]:
    """Returns the copying score of every head, as `copying`."""
    weights = Weights(checkpoint)
    layers = Layers(weights, raw)
    last = readout(weights, layers.folded)
    found = []
    for layer in console.bar(range(weights.config.n_layer), desc="copying", unit="layer", leave=False):
        heads = layers(layer)
        found.append(copying_score(heads.ov.left, heads.w_o, last))
    return {"copying": np.stack(found)}


class Copying(NamedTuple):
    """Copying scores, and those of fresh checkpoints, if asked for."""

    scores: Float[np.ndarray, "layer head"]
    null: Float[np.ndarray, "seed layer head"] | None


@reduction
def copying(run: HeadsRun) -> Copying:
    """Returns the copying scores of all heads.

    Raises:
      NotDrawable: for an architecture whose logits are no linear map of a sum of what heads write.
    """
    if not (run.config.has_logits and run.config.has_final_norm):
        raise NotDrawable(
            f"copying needs next-token logits that follow from one final norm of a sum, which {run.config.model_type} "
            "does not have; take a GPT-2"
        )
    raw, count = run.options.raw, run.options.null
    scores = copying_scores(run.model.checkpoint, raw)["copying"]
    if not count:
        return Copying(scores, None)
    about = {"figure": "copying", "version": VERSION, "raw": raw}
    null = null_values(run.config, count, lambda checkpoint: copying_scores(checkpoint, raw), **about)
    return Copying(scores, null["copying"])


def _head_ticks(shape: tuple[int, ...]) -> dict[str, Any]:
    """Ticks of a map of layers by heads: one each, if they are few."""
    return {axis: range(size) for axis, size in zip(("xticks", "yticks"), shape, strict=True) if size < TICKS}


@STUDY.define(
    "copying",
    "how much every head makes what it attends to more probable",
    "copying [layer, head]; unless --null 0: q_value [layer, head]",
)
def figure_copying(run: HeadsRun, copying: Copying) -> Display:
    scores, null = copying
    arrays, marks, tested = {"copying": scores}, np.zeros(scores.shape, bool), ""
    points = [
        Line(x=np.arange(len(scores)), y=column, marker="o", linestyle="", color=style.WITHIN) for column in scores.T
    ]
    if null is not None:
        arrays["q_value"] = null_q(scores, null)
        marks = arrays["q_value"] < LEVEL
        low, high = np.nanquantile(null, [0.025, 0.975])
        ends = np.array([-0.5, len(scores) - 0.5])
        band = Line(x=ends, y=np.zeros(2), linestyle=":", color="0.5", label="95% of fresh heads",
                    interval=(np.full(2, low), np.full(2, high)))  # fmt: skip
        points = [band, *points]
        tested = (
            f" Stars: more than in {len(null)} freshly initialised checkpoints of the same sizes (q < {LEVEL}, "
            f"one-sided; {int(marks.sum())} of {marks.size} heads)."
        )
    image = head_map(scores, colorbar="Copying score", texts=star_texts(marks), **_head_ticks(scores.shape))
    image.vmin, image.vmax = -1, 1
    dots = Lines(lines=points, xlabel="Transformer layer", ylabel="Copying score", ylim=(-1.05, 1.05), integer_x=True,
                 zero_y=True, title="A point a head")  # fmt: skip
    return Display(
        arrays=arrays,
        panels=[[image, dots]],
        title=f"Copying by the heads of {run.label}",
        caption=f"Copying score Σ Re λ / Σ |λ| of every head of {run.name}, where λ are the eigenvalues of the map "
        "from the token attended to, through W_V and W_O, to the logits of all tokens: 1 if every direction of tokens "
        "makes itself more probable, −1 if less. "
        f"Weights {Layers(run.weights, run.options.raw).words}. After the first layer the token embedding is only a "
        f"part of what a head reads.{tested}",
        size=(11, 4.5),
    )


# --- spectra ---


class Spectra(NamedTuple):
    """Largest singular values and effective ranks of W_QK and W_OV."""

    qk_largest: Float[AnyArray, "*layer head"]
    qk_rank: Float[AnyArray, "*layer head"]
    ov_largest: Float[AnyArray, "*layer head"]
    ov_rank: Float[AnyArray, "*layer head"]


@jit
def _spectra(heads: Heads) -> Spectra:
    values = circuit_singular_values(*(jnp.concatenate(factors) for factors in zip(heads.qk, heads.ov, strict=True)))
    largest, rank = values[:, 0], jax.vmap(effective_rank)(values)
    qk, ov = (slice(None, len(heads.w_o)), slice(len(heads.w_o), None))
    return Spectra(largest[qk], rank[qk], largest[ov], rank[ov])


@reduction
def spectra(run: HeadsRun) -> Spectra:
    """Returns what there is to know of the singular values of all heads' circuits."""
    layers = Layers(run.weights, run.options.raw)
    bar = console.bar(range(run.config.n_layer), desc="spectra", unit="layer")
    found = [jax.device_get(_spectra(layers(layer))) for layer in bar]
    return Spectra(*map(np.stack, zip(*found, strict=True)))


@STUDY.define(
    "spectra",
    "largest singular value and effective rank of W_QK and W_OV of every head",
    "qk_largest, qk_rank, ov_largest, ov_rank [layer, head]",
)
def figure_spectra(run: HeadsRun, spectra: Spectra) -> Display:
    panels = []
    for name, largest, rank in (
        (r"$\mathbf{W_{QK}}$", spectra.qk_largest, spectra.qk_rank),
        (r"$\mathbf{W_{OV}}$", spectra.ov_largest, spectra.ov_rank),
    ):
        row = []
        for values, what in ((largest, "Largest singular value"), (rank, "Effective rank")):
            image = head_map(np.asarray(values), title=name, colorbar=what, **_head_ticks(values.shape))
            image.cmap, image.vmin, image.vmax = "viridis", None, None
            row.append(image)
        panels.append(row)
    return Display(
        arrays=spectra._asdict(),
        panels=panels,
        title=run.label,
        caption="Largest singular value σ and effective rank, exp of the entropy of σ/Σσ, of W_QK = W_Q W_Kᵀ / "
        f"√head_dim and W_OV = W_V W_O of every head of {run.name}. "
        f"Weights {Layers(run.weights, run.options.raw).words}. A rank is at most head_dim = {run.config.head_dim}.",
        size=(11, 8),
    )


# --- composition ---


@reduction
def composition(run: HeadsRun) -> Composition:
    """Returns the composition of all pairs of heads.

    Raises:
      NotDrawable: for a model of one layer.
    """
    if run.config.n_layer < 2:
        raise NotDrawable(f"composition is between two layers, and {run.name} has one")
    return compositions(Layers(run.weights, run.options.raw))


def layer_ticks(n_layer: int, n_head: int) -> dict[str, Any]:
    """Returns boundaries between the layers of a map of all heads, and ticks with the layers' numbers."""
    step = -(-n_layer // TICKS)
    layers = range(0, n_layer, step)
    places = [(layer + 0.5) * n_head - 0.5 for layer in layers]
    names = [str(layer) for layer in layers]
    return {
        "boundaries": [layer * n_head - 0.5 for layer in range(1, n_layer)],
        "xticks": places,
        "xnames": names,
        "yticks": places,
        "ynames": names,
    }


def _named(excess: Float[np.ndarray, "layer head layer head"], baseline: float) -> str:
    """Returns the pairs of heads with the largest composition, in words."""
    order = np.argsort(-np.nan_to_num(excess, nan=-1).ravel())[:NAMED]
    found = []
    for place in order:
        a, head_a, b, head_b = np.unravel_index(place, excess.shape)
        if not np.isnan(excess.ravel()[place]):
            found.append(f"{a}.{head_a} → {b}.{head_b} ({excess.ravel()[place] + baseline:.2f})")
    return ", ".join(found)


@STUDY.define(
    "composition",
    "Q-, K- and V-composition of every pair of heads",
    "q, k, v [earlier_layer, earlier_head, later_layer, later_head], baseline []",
)
def figure_composition(run: HeadsRun, composition: Composition) -> Display:
    layers = Layers(run.weights, run.options.raw)
    config = run.config
    baseline = np.float32((config.n_embd - layers.folded) ** -0.5)
    size = config.n_layer * config.n_head
    excess = [each - baseline for each in composition]
    together = np.concatenate([each[np.isfinite(each)] for each in excess])
    limit = float(np.quantile(np.abs(together), SHOWN)) if together.size else 1.0
    ticks = layer_ticks(config.n_layer, config.n_head)
    images, said = [], []
    for name, each in zip("QKV", excess, strict=True):
        images.append(
            Image(
                values=each.reshape(size, size).T,  # a row reads, a column writes
                cmap="RdBu_r",
                vmin=-limit,
                vmax=limit,
                origin="lower",
                aspect="equal",
                title=f"{name}-composition",
                xlabel="Layer of the earlier head",
                ylabel="Layer of the later head" if name == "Q" else "",
                colorbar="Composition − baseline" if name == "V" else "",
                **ticks,
            )
        )
        said.append(f"{name}: {_named(each, float(baseline))}")
    return Display(
        arrays=composition._asdict() | {"baseline": baseline},
        panels=[images],
        title=f"How the heads of {run.label} go together",
        caption="How much of what an earlier head writes (column) is what a later one reads as query, key or value "
        f"(row), of all heads of {run.name} in the order of layers: ‖W_OV W_QK‖ / (‖W_OV‖ ‖W_QK‖) for Q, with W_QKᵀ "
        "for K and the later head's W_OV for V, minus the root mean square of random directions, "
        f"{baseline:.4f}. Weights {layers.words}. Colours to the {100 * SHOWN:g}th percentile of absolute values. "
        f"Largest (layer.head): {'; '.join(said)}.",
        size=(16, 5.6),
    )
