"""Study 4: a tour of a transformer's weights. Reads weights only; the model is never built.

Source: "Exploring Transformer Weights", a post on visualising the internals of GPT-2.
"""

import dataclasses

from jaxqkv.studies.options import Comparison, Options, option
from jaxqkv.studies.study import Study


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightTourOptions(Options, Comparison):
    """Definitions."""

    as_published: bool = option(False, "compute as the original does, errors included")


STUDY = Study(
    name="weight-tour",
    title="Exploring transformer weights",
    models=("gpt2",),
    demo="demo-gpt2",
    options=WeightTourOptions,
    modules=(f"{__name__}.run", f"{__name__}.embeddings", f"{__name__}.layers", f"{__name__}.matrices"),
)
figure = STUDY.figure
