"""The run of the study `qkv-activations`: the model, the occurrences of the target, and one forward pass."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxqkv.architectures.activations import Attention
from jaxqkv.architectures.attention import merge_heads
from jaxqkv.errors import CorpusError, JaxqkvError
from jaxqkv.kernels import bootstrap_interval, density
from jaxqkv.runtime import console
from jaxqkv.runtime.devices import jit
from jaxqkv.runtime.showing import plural
from jaxqkv.studies.layers import OfOneLayer, pick_layer
from jaxqkv.studies.opening import load_model
from jaxqkv.studies.qkv_activations import STUDY, QkvActivationsOptions
from jaxqkv.studies.stimuli import alice
from jaxqkv.studies.study import Run
from jaxqkv.text.corpora import open_corpus
from jaxqkv.text.reading import read_text
from jaxqkv.typing import AnyArray

LAYER, CONTEXT = 6, 50
ALICE = "Alice's Adventures in Wonderland"
# Edges of bins for the layer that is shown, and for every layer.
SHOWN_EDGES = np.linspace(-7, 7, 234)
EDGES = np.linspace(-4, 4, 101)
# Measures of a vector, in the order of the last axis of `rows`.
MEASURES = ("mean", "l1", "variance")

# Arrays by name.
Reduced = Mapping[str, np.ndarray]
Vectors = Float[AnyArray, "qkv two row embed"]


@jit
def _wide(attention: Attention) -> Float[Array, "qkv row pos embed"]:
    """Returns Q, K and V with their heads side by side."""
    return jnp.stack([merge_heads(x) for x in (attention.q, attention.k, attention.v) if x is not None])


def _at_target(wide: Float[Array, "qkv row pos embed"]) -> Vectors:
    """Returns the vectors of the target, which is last, and of the token before it."""
    return jnp.stack([wide[:, :, -1], wide[:, :, -2]], axis=1)


def measures(vectors: Vectors) -> Float[Array, "row qkv two measure"]:
    """Returns mean, mean of absolute values and sample variance over the dimensions of each vector."""
    each = [vectors.mean(axis=-1), jnp.abs(vectors).mean(axis=-1), vectors.var(axis=-1, ddof=1)]
    return jnp.stack(each, axis=-1).transpose(2, 0, 1, 3)


def _densities(vectors: Vectors, edges: np.ndarray) -> Float[Array, "qkv two bin"]:
    return jax.vmap(jax.vmap(lambda x: density(x, edges)))(vectors)


@jit
def of_every_layer(wide: Float[AnyArray, "qkv row pos embed"]) -> dict[str, Float[Array, "..."]]:
    """Reduces one layer, for the figures of all layers.

    Returns:
      `rows` `[row, qkv, two, measure]`: measures of target and non-target; `density` `[qkv, two, bin]`; `std` `[qkv]`:
      sample standard deviation over a row's positions, averaged over rows and dimensions.
    """
    vectors = _at_target(jnp.asarray(wide))
    std = jnp.asarray(wide).std(axis=2, ddof=1).mean(axis=(1, 2))
    return {"rows": measures(vectors), "density": _densities(vectors, EDGES), "std": std}


@jit
def of_shown_layer(wide: Float[AnyArray, "qkv row pos embed"]) -> dict[str, Float[Array, "..."]]:
    """Reduces the layer that is shown.

    Returns:
      `activations` `[row, three_embed]`: Q, K and V of the target side by side; `rows` as in `of_every_layer`;
      `density` `[qkv, two, bin]` with finer bins; `q` `[pos, embed]` of the first row.
    """
    wide = jnp.asarray(wide)
    vectors = _at_target(wide)
    activations = jnp.concatenate(list(vectors[:, 0]), axis=1)
    shown = {"activations": activations, "rows": measures(vectors), "q": wide[0, 0]}
    return shown | {"density": _densities(vectors, SHOWN_EDGES)}


@STUDY.computation
class QkvActivationsRun(OfOneLayer, Run):
    """The model, the layer that is shown, and the rows of tokens that end in the target."""

    def __init__(self, options: QkvActivationsOptions, folder: Path | None = None):
        self.model = load_model(options, STUDY)
        self.config, self.name = self.model.config, self.model.checkpoint.name
        self.layer, self.layer_note = pick_layer(options, LAYER, self.config.n_layer, self.name)
        self.seed, self.samples, self.target = options.seed, options.permutations, options.target
        self.context, self.context_note = self._pick_context(options.context)
        token = self.model.tokenizer.single_token(self.target)
        self.notes: list[str] = []
        self.about: dict[str, Any] = {}
        self.ids = self._rows(self._documents(options), token, options.rows)

    def _pick_context(self, wanted: int | None) -> tuple[int, str]:
        """Returns the number of tokens before the target, and the captions' note if it is not the original's."""
        most = self.config.n_positions - 1
        if wanted is not None and wanted > most:
            raise JaxqkvError(f"--context {wanted}: {self.name} has {most + 1} positions, so {most} at most")
        if wanted is None and most < CONTEXT:
            return most, f" ({self.name} takes {most} tokens before the target, not {CONTEXT} as in the original.)"
        return (CONTEXT if wanted is None else wanted), ""

    def _documents(self, options: QkvActivationsOptions) -> Iterable[str]:
        """Returns the texts, and describes them in `about`."""
        if options.corpus:
            how = {"documents": options.documents, "text_column": options.text_column}
            corpus = open_corpus(options.corpus, **how)
            self.about = corpus.about
            return corpus
        self.about = {"text": ALICE if options.text_file is None else str(options.text_file)}
        return [alice() if options.text_file is None else read_text(options.text_file)]

    def _rows(self, documents: Iterable[str], token: int, most: int) -> np.ndarray:
        """Returns ids `[row, context + 1]` that end in the target, for occurrences with enough tokens before them.

        Raises:
          CorpusError: for fewer than two.
        """
        rows: list[list[int]] = []
        for document in documents:
            (ids,) = self.model.tokenizer.encode([document], special_tokens=False)
            places = np.flatnonzero(np.array(ids[self.context :], np.int64) == token)
            rows += [ids[place : place + self.context + 1] for place in places]
            if len(rows) >= most:
                self.notes.append(f"the first {most} occurrences of {self.target!r} are run; --rows takes more")
                break
        if len(rows) < 2:
            raise CorpusError(
                f"{self.source}: {len(rows)} {plural(len(rows), 'occurrence')} of {self.target!r} with "
                f"{self.context} tokens before, and two or more are needed; give a longer text, another --target or a "
                "smaller --context"
            )
        return np.array(rows[:most], np.int32)

    @property
    def source(self) -> str:
        """Name of the text or the corpus."""
        return str(self.about.get("text") or self.about.get("corpus"))

    def describe(self) -> dict[str, Any]:
        """Returns this run's entries in the manifest."""
        return {
            "checkpoint": [self.model.checkpoint.identity()],
            "layer": self.layer,
            "target": self.target,
            "context": self.context,
            "rows": len(self.ids),
            "resamples": self.samples,
            "notes": self.notes,
        } | self.about

    def compute(self, names: Collection[str]) -> dict[str, Reduced]:
        """Makes one forward pass up to the last layer that is needed; each layer is reduced and then freed.

        Returns:
          For each name, its arrays: `shown` from `of_shown_layer`; `layers` from `of_every_layer`, with a layer axis.
        """
        if not names:
            return {}
        layers = range(self.config.n_layer) if "layers" in names else [self.layer]
        computed: dict[str, Reduced] = {}
        results: list[Any] = []
        with console.bar(total=len(layers), desc="layers", unit="layer") as progress:
            for layer, attention in self.model.layerwise(self.ids, capture={"q", "k", "v"}, layers=list(layers)):
                wide = _wide(attention.astype(np.float32))
                if "layers" in names:
                    results.append(jax.tree.map(np.asarray, of_every_layer(wide)))
                if layer == self.layer and "shown" in names:
                    computed["shown"] = jax.tree.map(np.asarray, of_shown_layer(wide))
                progress.update()
        if results:
            computed["layers"] = {name: np.stack([each[name] for each in results]) for name in results[0]}
        return computed

    def interval(self, difference: Float[np.ndarray, "row *shape"]) -> list[Float[np.ndarray, "*shape"]]:
        """Returns the ends of the bootstrap interval of the mean over rows."""
        ends = bootstrap_interval(difference, jax.random.key(self.seed), n_unit=len(difference), samples=self.samples)
        return [np.asarray(end) for end in ends]

    @property
    def of_rows(self) -> str:
        """The end of captions: the occurrences and their context."""
        most = f" ({self.notes[0].capitalize()}.)" if self.notes else ""
        return (
            f" {len(self.ids)} occurrences of {self.target!r} in {self.source}, with the {self.context} tokens before "
            f"each.{most}{self.context_note}"
        )
