"""Kernels: pure functions from arrays to arrays, for CPU, GPU and TPU.

They take one matrix or sample unless they say otherwise, and jit and vmap over layers or heads.
On the host run only `freedman_diaconis_histogram`, the size of whose result depends on the data, and
`percentile_edges` and `bin_index`, for which float64 decides.
"""

from jaxqkv.kernels.binned import bin_index, binned_moments, percentile_edges
from jaxqkv.kernels.correlation import pearson
from jaxqkv.kernels.groups import GROUPS, column_correlation, group_densities, permute_entries, upper_density
from jaxqkv.kernels.histograms import counts, density, density_by_group, freedman_diaconis_histogram
from jaxqkv.kernels.moments import moments
from jaxqkv.kernels.scores import Sample, causal_samples, first_and_last, last_token_scores
from jaxqkv.kernels.similarity import column_cosine, column_cosine_moments, head_pair_densities, head_pair_masks

__all__ = [
    "GROUPS",
    "Sample",
    "bin_index",
    "binned_moments",
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
    "pearson",
    "percentile_edges",
    "permute_entries",
    "upper_density",
]
