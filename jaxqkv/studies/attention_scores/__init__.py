"""Study 2: raw and softmax attention scores, on the activations of one text or a few.

Source: Mike X Cohen, "50 ML projects to understand LLMs", project 35, raw and softmax attention scores.
"""

import dataclasses

from jaxqkv.studies.options import Options, Running, Texts
from jaxqkv.studies.study import Study


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionScoresOptions(Options, Running, Texts):
    """Options of `attention-scores`."""


STUDY = Study(
    name="attention-scores",
    title="Raw and softmax attention scores",
    models=("gpt2-medium",),
    demo="demo-gpt2",
    options=AttentionScoresOptions,
    modules=(f"{__name__}.run", f"{__name__}.figures"),
)
figure = STUDY.figure
