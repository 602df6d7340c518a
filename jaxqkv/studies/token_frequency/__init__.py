"""Study 3: token frequencies, attention adjustments and QKᵀ, on documents of a corpus.

Source: Mike X Cohen, "50 ML projects to understand LLMs", project 39, token frequencies, attention
adjustments, and QK^T.
"""

import dataclasses

from jaxqkv.runtime.sizes import size_in_bytes
from jaxqkv.studies.options import Devices, Documents, Job, Options, Running, Significance, option, whole_number
from jaxqkv.studies.study import Study


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFrequencyOptions(Options, Running, Documents, Significance, Devices, Job):
    """Options of the tokens that are counted and of the batch that is run."""

    tokens: int = option(1_000_000, "tokens to count at least", parse=whole_number(1), metavar="N")
    batch: int = option(64, "documents to run", parse=whole_number(1), metavar="N")
    length: int | None = option(
        None, "tokens of each (default the model's positions)", parse=whole_number(2), metavar="N"
    )
    memory: int = option(
        2_000_000_000,
        "for temporaries of a block, as 2GB or 500MB",
        parse=size_in_bytes,
        metavar="SIZE",
        shown="2GB",
    )
    no_cache: bool = option(False, "count anew, and do not keep the counts")
    resume: bool = option(False, "go on from the state that an interrupted run left in the folder", command_only=True)


STUDY = Study(
    name="token-frequency",
    title="Token frequencies, attention adjustments, QKᵀ",
    models=("bert-large-uncased",),
    demo="demo-bert",
    options=TokenFrequencyOptions,
    modules=(f"{__name__}.run", f"{__name__}.adjustments", f"{__name__}.scores"),
)
figure = STUDY.figure
