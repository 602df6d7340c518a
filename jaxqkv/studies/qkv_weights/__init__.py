"""Study 1: characteristics of the weights of Q, K and V. Reads weights only; the model is never built.

Source: Mike X Cohen, "50 ML projects to understand LLMs", project 33, QKV weights characteristics.
"""

import dataclasses

from jaxqkv.studies.options import Comparison, Options, Significance
from jaxqkv.studies.study import Study


@dataclasses.dataclass(frozen=True, kw_only=True)
class QKVWeightsOptions(Options, Comparison, Significance):
    """Options of `qkv-weights`."""


STUDY = Study(
    name="qkv-weights",
    title="QKV weights characteristics",
    models=("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"),
    demo="demo-gpt2",
    options=QKVWeightsOptions,
    modules=(f"{__name__}.run", f"{__name__}.figures"),
)
figure = STUDY.figure
