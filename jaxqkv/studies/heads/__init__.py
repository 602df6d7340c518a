"""Study 12: what the heads do, by their weights and by what they attend to.

Sources: Elhage et al. 2021, "A mathematical framework for transformer circuits" (copying, composition); Olsson et al.
2022, "In-context learning and induction heads" (types); Kobayashi et al. 2020, "Attention is not only a weight"
(norms); nostalgebraist 2020, "interpreting GPT: the logit lens" (lens).
"""

import dataclasses

from jaxqkv.studies.options import Options, PairOfTexts, Running, option, whole_number
from jaxqkv.studies.study import Study


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsOptions(Options, Running, PairOfTexts):
    """Options of `heads`."""

    text: str | None = option(None, "text instead of the study's own", metavar="TEXT")
    null: int = option(
        20, "freshly initialised checkpoints that heads are tested against; 0 for no test", parse=whole_number(0),
        metavar="N",
    )  # fmt: skip
    raw: bool = option(False, "weights as they are stored, without the norms folded in")


STUDY = Study(
    name="heads",
    title="What the heads do",
    models=("gpt2",),
    demo="demo-gpt2",
    options=HeadsOptions,
    modules=(
        f"{__name__}.run",
        f"{__name__}.types",
        f"{__name__}.circuits",
        f"{__name__}.similarity",
        f"{__name__}.attribution",
        f"{__name__}.lens",
        f"{__name__}.norms",
    ),
)
figure = STUDY.figure
