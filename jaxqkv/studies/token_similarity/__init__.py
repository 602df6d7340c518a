"""Study 5: similarities between a token's Q, K and V dimensions over sentences.

Source: Mike X Cohen, "A deep understanding of AI language model mechanisms", the lecture on
token-related similarities within and across Q, K, V matrices.
"""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxqkv.studies.options import Options, Running, Significance, option
from jaxqkv.studies.study import Study


def _are_texts(value: Any) -> bool:
    """Tells sentences themselves from the name of a file."""
    return isinstance(value, Iterable) and not isinstance(value, str | os.PathLike)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenSimilarityOptions(Options, Running, Significance):
    """Options of `token-similarity`."""

    # A file, or texts; the run refuses elements that are not texts.
    sentences: Path | Iterable[Any] | None = option(
        None,
        "run the sentences in this file, one on each line, instead of the study's own",
        parse=Path,
        metavar="FILE",
        accepts=_are_texts,
    )
    target: str = option(" her", "target token, with its leading space", metavar="WORD")
    measure: str = option("correlation", "similarity in figures distributions, pair-order and laminar",
                          choices=("correlation", "cosine"))  # fmt: skip
    skip_missing: bool = option(False, "leave out sentences without the target")


STUDY = Study(
    name="token-similarity",
    title="Token-related similarities within and across Q, K, V",
    models=("gpt2",),
    demo="demo-gpt2",
    options=TokenSimilarityOptions,
    modules=(f"{__name__}.run", f"{__name__}.figures"),
)
figure = STUDY.figure
