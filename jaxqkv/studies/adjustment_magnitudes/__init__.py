"""Study 7: how much attention adds to the residual stream, by layer and position, on short texts.

Source: Mike X Cohen, "50 ML projects to understand LLMs", project 36, attention adjustment magnitudes.
"""

import dataclasses

from jaxqkv.studies.options import Documents, Options, Running, option, whole_number
from jaxqkv.studies.study import Study


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdjustmentMagnitudesOptions(Options, Running, Documents):
    """Texts and positions."""

    batch: int = option(64, "run this many texts, the first of the corpus", parse=whole_number(1), metavar="N")
    positions: int = option(30, "fit this many positions in figure 4, from the second on", parse=whole_number(2),
                            metavar="N")  # fmt: skip


STUDY = Study(
    name="adjustment-magnitudes",
    title="Attention adjustments by layer and position",
    models=("gpt2-large",),
    demo="demo-gpt2",
    options=AdjustmentMagnitudesOptions,
    modules=(f"{__name__}.run", f"{__name__}.figures"),
)
figure = STUDY.figure
