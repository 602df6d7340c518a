"""Study 8: does attention add as much where the model predicts the next token as where it does not?

Source: Mike X Cohen, "50 ML projects to understand LLMs", project 37, token prediction and attention
Kullback-Leibler divergences.
"""

import dataclasses
from pathlib import Path

from jaxqkv.studies.options import Options, Resampling, Running, option, whole_number
from jaxqkv.studies.study import Study


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictionDivergenceOptions(Options, Running, Resampling):
    """Text and definitions."""

    text_file: Path | None = option(
        None, "run the text in this file instead of Alice's Adventures in Wonderland", parse=Path, metavar="FILE"
    )
    length: int | None = option(
        None,
        "run this many tokens, from the text's middle on (default the number of the model's positions)",
        parse=whole_number(2),
        metavar="N",
    )
    skip_first: bool = option(False, "leave out the first position, which attention treats differently")
    as_published: bool = option(False, "compute as the original does, errors included")


STUDY = Study(
    name="prediction-divergence",
    title="Token prediction and divergence of attention adjustments",
    models=("gpt2-large",),
    demo="demo-gpt2",
    options=PredictionDivergenceOptions,
    modules=(f"{__name__}.run", f"{__name__}.figures"),
)
figure = STUDY.figure
