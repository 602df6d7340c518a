"""Study 4: a tour of a transformer's weights. Weights only; the model is never built.

Source: "Exploring Transformer Weights", a post on visualising the internals of GPT-2.
"""

from jaxqkv.studies.weight_tour import embeddings, layers, matrices  # noqa: F401  (they register their figures)
from jaxqkv.studies.weight_tour.run import STUDY

__all__ = ["STUDY", "figure"]

figure = STUDY.draw
