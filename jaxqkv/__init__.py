"""GPT-2 and BERT in JAX with every attention intermediate as a return value."""

from jaxqkv.activations import Activations, Attention
from jaxqkv.checkpoint import open_checkpoint
from jaxqkv.errors import CheckpointError, JaxqkvError
from jaxqkv.model import Model, forward, hidden, load, logits
from jaxqkv.tokens import Batch
from jaxqkv.weights import Weights

__version__ = "0.1.0"

__all__ = [
    "Activations",
    "Attention",
    "Batch",
    "CheckpointError",
    "JaxqkvError",
    "Model",
    "Weights",
    "forward",
    "hidden",
    "load",
    "logits",
    "open_checkpoint",
]
