"""Study 9: are words of one category more alike in Q, K and V than words of different ones, and in which layers?

Source: Mike X Cohen, "50 ML projects to understand LLMs", project 38, laminar profile of RSA and category selectivity.
"""

import dataclasses
from pathlib import Path

from jaxqkv.studies.options import Options, Resampling, Running, option
from jaxqkv.studies.study import Study


@dataclasses.dataclass(frozen=True, kw_only=True)
class CategorySelectivityOptions(Options, Running, Resampling):
    """Words and definitions."""

    words: Path | None = option(
        None, "run the words in this file, a category and a word on each line, instead of the study's own", parse=Path,
        metavar="FILE",
    )  # fmt: skip
    as_published: bool = option(False, "compute as the original does, errors included")


STUDY = Study(
    name="category-selectivity",
    title="Similarity of representations and category selectivity by layer",
    models=("gpt2-xl",),
    demo="demo-gpt2",
    options=CategorySelectivityOptions,
    modules=(f"{__name__}.run", f"{__name__}.figures", f"{__name__}.categories"),
)
figure = STUDY.figure
