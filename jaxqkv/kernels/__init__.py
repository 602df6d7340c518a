"""Kernels: pure functions from arrays to arrays, for CPU, GPU and TPU.

They take one matrix or sample unless they say otherwise, and jit and vmap over layers or heads.
Only `freedman_diaconis_histogram` runs on the host: the size of its result depends on the data.
"""

from jaxqkv.kernels.groups import GROUPS, column_correlation, group_densities, permute_entries, upper_density
from jaxqkv.kernels.histograms import counts, density, density_by_group, freedman_diaconis_histogram
from jaxqkv.kernels.moments import moments
from jaxqkv.kernels.scores import Sample, causal_samples, first_and_last, last_token_scores
from jaxqkv.kernels.similarity import column_cosine, column_cosine_moments, head_pair_densities, head_pair_masks

__all__ = [
    "GROUPS",
    "Sample",
    "causal_samples",
    "column_correlation",
    "column_cosine",
    "column_cosine_moments",
    "counts",
    "density",
    "density_by_group",
    "first_and_last",
    "freedman_diaconis_histogram",
    "group_densities",
    "head_pair_densities",
    "head_pair_masks",
    "last_token_scores",
    "moments",
    "permute_entries",
    "upper_density",
]
