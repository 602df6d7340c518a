"""Study 11: which heads tell who gave the coffee, by patching their outputs from another sentence.

Source: Mike X Cohen, "50 ML projects to understand LLMs", project 41, patching heads in indirect object identification.
"""

import dataclasses
from pathlib import Path

from jaxqkv.studies.options import Options, PairOfTexts, Running, option, whole_number
from jaxqkv.studies.study import Study


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadPatchingOptions(Options, Running, PairOfTexts):
    """Options of `head-patching`."""

    pairs: Path | None = option(
        None,
        "average over the pairs in this file; each line has clean text, donor, first and second answer, between tabs",
        parse=Path,
        metavar="FILE",
    )
    repeats: int = option(1, "shuffle each head this often in figure 2", parse=whole_number(1), metavar="N")


STUDY = Study(
    name="head-patching",
    title="Patching heads in indirect object identification",
    models=("gpt2-large",),
    demo="demo-gpt2",
    options=HeadPatchingOptions,
    modules=(f"{__name__}.run", f"{__name__}.figures"),
)
figure = STUDY.figure
