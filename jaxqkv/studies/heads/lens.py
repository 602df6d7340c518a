"""Which token the residual stream would predict at every layer and position: figure `lens`."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxqkv.figures.displays import Display
from jaxqkv.figures.panels import Image, plain
from jaxqkv.kernels import logit_lens
from jaxqkv.model.model import Model
from jaxqkv.runtime import console
from jaxqkv.studies.heads import STUDY
from jaxqkv.studies.heads.attribution import check_final_norm
from jaxqkv.studies.heads.run import HeadsRun, reduction
from jaxqkv.studies.opening import wide_weights
from jaxqkv.text.batches import Batch

# The last positions whose tokens are written into their cells, and how many characters of each.
WORDS, CHARACTERS = 16, 9


class Lens(NamedTuple):
    """Most probable next tokens by layer and position, and their probabilities: the first row is of the embedding."""

    token: Int[np.ndarray, "layer+1 pos"]
    probability: Float[np.ndarray, "layer+1 pos"]


def read_streams(model: Model, batch: Batch) -> Lens:
    """Returns the tokens that W_U ln_f(residual) predicts of one text, before each layer and after the last.

    Raises:
      NotDrawable: where logits do not follow from one final norm of a sum, naming the architecture.
    """
    check_final_norm(model)
    config, weights = model.config, wide_weights(model)
    scale, shift = config.final_norm(weights.final(unembedding=False))
    unembedding = jnp.asarray(weights.W_U.T)
    rows = []
    for layer, attention in console.bar(model.layerwise(batch, {"resid_pre", "resid_post"}), total=config.n_layer):
        streams = [attention.resid_pre] + ([attention.resid_post] if layer == config.n_layer - 1 else [])
        settings: dict[str, Any] = {"epsilon": config.layer_norm_epsilon}
        rows += [logit_lens(np.asarray(x[0], np.float32), scale, shift, unembedding, **settings) for x in streams]
    return Lens(*(np.stack([np.asarray(row[place]) for row in rows]) for place in (0, 1)))


@reduction
def lens(run: HeadsRun) -> Lens:
    """Returns what the text's streams predict."""
    check_final_norm(run.model)
    return read_streams(run.model, run.batch)


@STUDY.define("lens", "most probable next token at every layer and position", "token, probability [layer+1, pos]")
def figure_lens(run: HeadsRun, lens: Lens) -> Display:
    rows, pos = lens.token.shape
    shown = slice(max(pos - WORDS, 0), pos)
    about: dict[str, Any] = {"origin": "lower", "vmin": 0, "vmax": 1, "cmap": "viridis", "ylabel": "Blocks",
                             "colorbar": "Probability", "integer_y": True}  # fmt: skip
    whole = Image(values=lens.probability, xlabel="Position", integer_x=True, **about)
    said = _words(run, np.asarray(run.batch.ids)[0, shown])
    last = Image(
        values=lens.probability[:, shown],
        texts=[_words(run, row[shown]) for row in lens.token],
        xticks=range(len(said)),
        xnames=said,
        xlabel="Token",
        **about,
    )
    return Display(
        arrays=lens._asdict(),
        panels=[[whole], [last]],
        title=run.label,
        caption=f"Most probable next token of {run.name} if it ended after so many of its {rows - 1} blocks, by "
        f"position of {run.text!r}: W_U ln_f(residual). Colours are its probability. The lowest row is of the "
        f"embedding, the uppermost the model's own output. Below, the last {len(said)} positions with those tokens.",
        size=(15, 4 + 0.4 * rows),
        heights=[1, 1.6],
    )


def _words(run: HeadsRun, ids: Int[np.ndarray, " pos"]) -> list[str]:
    """Returns tokens as cells show them, cut if they are long."""
    words = run.model.tokenizer.tokens(ids.tolist())
    return [plain(word if len(word) <= CHARACTERS else word[: CHARACTERS - 1] + "…") for word in words]
