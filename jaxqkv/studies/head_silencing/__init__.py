"""Study 10: what silencing a head does further down the model.

Source: Mike X Cohen, "50 ML projects to understand LLMs", project 40, downstream impacts of head silencing.
"""

import dataclasses

from jaxqkv.studies.options import Options, Running, option, whole_number
from jaxqkv.studies.study import Study


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadSilencingOptions(Options, Running):
    """Options of `head-silencing`."""

    text: str | None = option(None, "run this text instead of the study's own", metavar="TEXT")
    head: int | None = option(None, "head to silence (default 1)", parse=whole_number(0), metavar="HEAD")
    edit: str = option(
        "zero",
        "how a head is silenced: z set to 0, to its mean over the text's positions, or shuffled",
        choices=("zero", "mean", "permute"),
    )
    target: str | None = option(
        None, "token whose probability is shown (default the clean model's most probable one)", metavar="WORD"
    )
    fact: str | None = option(None, "text of figure 4c", metavar="TEXT")
    answer: str | None = option(None, "token that should follow --fact", metavar="WORD")
    against: str | None = option(None, "token to compare --answer with", metavar="WORD")


STUDY = Study(
    name="head-silencing",
    title="Downstream impacts of head silencing",
    models=("gpt2-medium",),
    demo="demo-gpt2",
    options=HeadSilencingOptions,
    modules=(f"{__name__}.run", f"{__name__}.figures"),
)
figure = STUDY.figure
