"""Figure `attribution`: contributions of heads, MLPs and the embedding to the logit difference of two answers."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxqkv.architectures.activations import Attention
from jaxqkv.errors import NotDrawable
from jaxqkv.figures import style
from jaxqkv.figures.displays import Display, head_map, strongest
from jaxqkv.figures.panels import Line, Lines
from jaxqkv.kernels import attribution as attribution_kernel
from jaxqkv.model.model import Model
from jaxqkv.studies.heads import STUDY
from jaxqkv.studies.heads.run import HeadsRun, reduction
from jaxqkv.studies.opening import wide_model
from jaxqkv.text.batches import Batch

TEXTS = ("clean", "donor")
COLORS = {"clean": style.WITHIN, "donor": style.ACROSS}


class Contributions(NamedTuple):
    """Contributions to a logit difference at the last position of each text; all of a text add up to `total`.

    Attributes:
      head: z W_O of every head.
      mlp: of every layer, with its output bias.
      embedding: of token and position.
      bias: all b_O, what the final norm's bias gives, and the output bias.
      total: the model's own logit difference.
    """

    head: Float[np.ndarray, "text layer head"]
    mlp: Float[np.ndarray, "text layer"]
    embedding: Float[np.ndarray, " text"]
    bias: Float[np.ndarray, " text"]
    total: Float[np.ndarray, " text"]


def _of_last(attention: Attention, mask: Bool[Array, "batch pos"], last: Int[Array, " batch"]) -> dict[str, Array]:
    """Returns what a layer writes at each text's last position, before W_O, and the stream around it."""
    assert attention.z is not None  # of the whole layer
    z = jnp.take_along_axis(attention.z, last[:, None, None, None], axis=2)[:, :, 0]
    streams = {name: getattr(attention, name) for name in ("mlp_out", "resid_pre", "resid_post")}
    at_last = {name: jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0] for name, x in streams.items()}
    return {name: x.astype(jnp.float32) for name, x in ({"z": z} | at_last).items()}


def contributions(model: Model, batch: Batch, answers: Sequence[int]) -> Contributions:
    """Returns what every part of the model adds to logit(first answer) − logit(second) after each text.

    One pass over the layers, in float32 whatever the model's dtype, so that the parts add up; W_O is read one layer at
    a time.

    Raises:
      NotDrawable: where logits do not follow from one final norm of a sum, naming the architecture.
    """
    check_final_norm(model)
    model = wide_model(model)
    config, weights = model.config, model.weights
    final = weights.final(unembedding=False)
    scale, shift = config.final_norm(final)
    first, second = answers
    direction = weights.W_U[:, first] - weights.W_U[:, second]
    found = jax.tree.map(np.asarray, model.run(batch, reduce=_of_last, inputs=np.asarray(batch.last)))
    residual = found["resid_post"][-1]

    def of(parts: Float[np.ndarray, "text part embed"]) -> Float[np.ndarray, "text part"]:
        settings = {"scale": scale, "direction": direction, "epsilon": config.layer_norm_epsilon}
        pairs = zip(parts, residual, strict=True)
        return np.stack([np.asarray(attribution_kernel(each, whole, **settings)) for each, whole in pairs])

    layers = range(config.n_layer)
    heads = [of(np.einsum("thd,hde->the", found["z"][layer], weights.W_O(layer, by_head=True))) for layer in layers]
    written = np.stack([weights.b_O(layer) for layer in layers])
    return Contributions(
        head=np.stack(heads, axis=1),
        mlp=of(found["mlp_out"].swapaxes(0, 1)),
        embedding=of(found["resid_pre"][:1].swapaxes(0, 1))[:, 0],
        bias=of(np.broadcast_to(written, (len(residual), *written.shape))).sum(axis=1) + shift @ direction,
        total=np.asarray(config.final(final, jnp.asarray(residual)[:, None]))[:, 0] @ direction,
    )


def check_final_norm(model: Model) -> None:
    """Refuses models whose logits do not follow from one final norm of a sum.

    Raises:
      NotDrawable: naming the architecture.
    """
    if not model.config.has_final_norm:
        raise NotDrawable(
            f"{model.config.model_type} normalises the residual stream after every block, so that its logits do not "
            "follow from one final norm of a sum; take a GPT-2"
        )


@reduction
def attribution(run: HeadsRun) -> Contributions:
    """Returns the contributions to the logit difference of the two answers after both texts."""
    check_final_norm(run.model)
    return contributions(run.model, run.pair_batch, run.answers)


@STUDY.define(
    "attribution",
    "what every head and MLP adds to the logit difference of two answers",
    "head [clean/donor, layer, head], mlp [clean/donor, layer], embedding, bias, total [clean/donor]",
)
def figure_attribution(run: HeadsRun, attribution: Contributions) -> Display:
    about = dict(zip(TEXTS, (run.pair.clean, run.pair.donor), strict=True))
    maps = [
        head_map(values, title=f"Heads, {name}", colorbar="Logit difference")
        for name, values in zip(TEXTS, attribution.head, strict=True)
    ]
    layers = np.arange(run.config.n_layer)
    curves = [
        Line(x=layers, y=values, label=f"{what}, {name}", color=COLORS[name], marker=marker, linestyle=line)
        for what, each, marker, line in (
            ("heads", attribution.head.sum(axis=2), "o", "-"),
            ("MLP", attribution.mlp, "s", "--"),
        )
        for name, values in zip(TEXTS, each, strict=True)
    ]
    by_layer = Lines(lines=curves, title="Layers", xlabel="Transformer layer", ylabel="Logit difference",
                     integer_x=True, zero_y=True)  # fmt: skip
    one, two = run.pair.answers
    said = "; ".join(f"{name}, {text!r}: {total:.3f}" for (name, text), total in
                     zip(about.items(), attribution.total, strict=True))  # fmt: skip
    heads = [f"{name}, {strongest(values)}" for name, values in zip(TEXTS, attribution.head, strict=True)]
    return Display(
        arrays=attribution._asdict(),
        panels=[maps, [by_layer, _all_parts(attribution)]],
        title=run.label,
        caption=f"What each part of {run.name} adds to the logit of {one!r} minus that of {two!r} at the last position "
        f"of two texts ({said}): every head, every MLP, the embedding of token and position, and what does not depend "
        "on the text. The parts are divided by the standard deviation of the whole final residual, so that they add "
        f"up to the difference{_dtype(run)}. Colours to ± twice the mean of absolute values. Strongest heads "
        f"(layer.head): {'; '.join(heads)}.",
        size=(11, 8),
    )


def _dtype(run: HeadsRun) -> str:
    """Returns the caption's sentence on a dtype that was asked for."""
    asked = run.model.weights.dtype
    return "" if asked == np.float32 else f"; all in float32, for in {asked} they would not"


def _all_parts(found: Contributions) -> Lines:
    """Returns the sums of parts of a kind, and the difference that they add up to."""
    names = ("Embedding", "Heads", "MLPs", "Bias", "Total")
    sums = [found.embedding, found.head.sum(axis=(1, 2)), found.mlp.sum(axis=1), found.bias, found.total]
    places = np.arange(len(names))
    lines = [
        Line(x=places + beside, y=values, label=name, color=COLORS[name], marker="s", linestyle="", size=9)
        for name, values, beside in zip(TEXTS, np.stack(sums, axis=1), (-0.1, 0.1), strict=True)
    ]
    ends = (-0.5, len(names) - 0.5)
    return Lines(
        lines=lines, title="All parts", ylabel="Logit difference", xticks=range(len(names)), xnames=names, xlim=ends,
        zero_y=True,
    )  # fmt: skip
