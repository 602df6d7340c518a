"""Study 6: what Q, K and V look like at a word and at the token before it, layer by layer.

Source: Mike X Cohen, "50 ML projects to understand LLMs", project 34, QKV activation characteristics.
"""

import dataclasses
from pathlib import Path

from jaxqkv.errors import JaxqkvError
from jaxqkv.studies.options import Documents, Options, Resampling, Running, option, whole_number
from jaxqkv.studies.study import Study


@dataclasses.dataclass(frozen=True, kw_only=True)
class QkvActivationsOptions(Options, Running, Documents, Resampling):
    """Text and target."""

    text_file: Path | None = option(
        None, "run the text in this file instead of Alice's Adventures in Wonderland", parse=Path, metavar="FILE"
    )
    target: str = option(" like", "target token, with its leading space", metavar="WORD")
    context: int | None = option(
        None, "run this many tokens before the target", parse=whole_number(1), metavar="N",
        shown="50, or as many as the model takes",
    )  # fmt: skip
    rows: int = option(500, "run at most this many occurrences of the target", parse=whole_number(2), metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_file is not None and self.corpus:
            raise JaxqkvError("--text-file and --corpus exclude each other")


STUDY = Study(
    name="qkv-activations",
    title="Activations of Q, K and V",
    models=("gpt2-large",),
    demo="demo-gpt2",
    options=QkvActivationsOptions,
    modules=(f"{__name__}.run", f"{__name__}.figures"),
)
figure = STUDY.figure
