"""Kernels: pure, jitted functions from arrays to arrays, for CPU, GPU and TPU.

They take one matrix or sample unless they say otherwise; `jax.vmap` them over layers or heads.
"""

from jaxqkv.kernels.histograms import counts, density, freedman_diaconis_histogram
from jaxqkv.kernels.moments import moments
from jaxqkv.kernels.similarity import column_cosine, column_cosine_moments, head_pair_densities, head_pair_masks

__all__ = [
    "column_cosine",
    "column_cosine_moments",
    "counts",
    "density",
    "freedman_diaconis_histogram",
    "head_pair_densities",
    "head_pair_masks",
    "moments",
]
