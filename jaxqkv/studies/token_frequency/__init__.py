"""Study 3: token frequencies, attention adjustments and QKᵀ, on documents of a corpus.

Source: Mike X Cohen, "50 ML projects to understand LLMs", project 39, token frequencies, attention
adjustments, and QK^T.
"""

from jaxqkv.studies.token_frequency import adjustments, scores  # noqa: F401  (they register their figures)
from jaxqkv.studies.token_frequency.run import STUDY

__all__ = ["STUDY", "figure"]

figure = STUDY.draw
