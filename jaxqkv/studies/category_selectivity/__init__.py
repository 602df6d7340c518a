"""Study 9: are words of a category more alike in Q, K and V than words of different ones, and in which layers?

Source: Mike X Cohen, "50 ML projects to understand LLMs", project 38, laminar profile of RSA and category selectivity.
"""

import dataclasses
from pathlib import Path

from jaxqkv.studies.options import Options, Resampling, Running, option
from jaxqkv.studies.study import Study


@dataclasses.dataclass(frozen=True, kw_only=True)
class CategorySelectivityOptions(Options, Running, Resampling):
    """The words."""

    words: Path | None = option(
        None, "words instead of the study's own: a file with lines of a category and a word", parse=Path, metavar="FILE"
    )
    as_published: bool = option(False, "as the original, also where it slips")


STUDY = Study(
    name="category-selectivity",
    title="Similarity of representations and category selectivity by layer",
    models=("gpt2-xl",),
    demo="demo-gpt2",
    options=CategorySelectivityOptions,
    modules=(f"{__name__}.run", f"{__name__}.figures", f"{__name__}.categories"),
)
figure = STUDY.figure
