"""Kernels: pure functions from arrays to arrays, for CPU, GPU and TPU.

They take one matrix or sample unless they say otherwise, and jit and vmap over layers or heads.

Histograms, moments, correlations of samples, statistics in bins, tests, and statistics of weights, circuits and
patterns are computed in float32: float64 is rounded, also with `jax_enable_x64`. `column_cosine`,
`column_cosine_moments`, `column_correlation`, `permute_entries`, `last_token_scores` and `causal_samples` keep the
dtype of their input, float64 with `jax_enable_x64`; `permutation_null`, `exchange_null` and `bootstrap_interval` have
the dtype of the statistic.

All run on the device except `freedman_diaconis_histogram`, whose result has a size that depends on the data,
`percentile_edges` and `bin_index`, which compute in float64, and the eigenvalues of `copying_score`, which accelerators
do not have.
"""

from jaxqkv.kernels.binned import bin_index, binned_moments, percentile_edges
from jaxqkv.kernels.blockwise import AttentionStatistics, attention_statistics
from jaxqkv.kernels.circuits import (
    Circuit,
    circuit_singular_values,
    composition,
    copying_score,
    head_similarity,
    ov_circuit,
    qk_circuit,
    subspace_overlap,
)
from jaxqkv.kernels.correlation import fisher_z, pearson, representational_similarity
from jaxqkv.kernels.divergence import jensen_shannon, pattern_divergence
from jaxqkv.kernels.groups import GROUPS, column_correlation, group_densities, permute_entries, upper_density
from jaxqkv.kernels.histograms import counts, density, density_by_group, freedman_diaconis_histogram, require_finite
from jaxqkv.kernels.logits import attribution, logit_lens
from jaxqkv.kernels.moments import moments
from jaxqkv.kernels.patterns import HeadTypes, head_types, weighted_attention
from jaxqkv.kernels.regression import linear_regression
from jaxqkv.kernels.resampling import bootstrap_interval, exchange_null, permutation_null, permutation_p
from jaxqkv.kernels.scores import Sample, causal_samples, first_and_last, last_token_scores
from jaxqkv.kernels.similarity import column_cosine, column_cosine_moments, head_pair_densities, head_pair_masks
from jaxqkv.kernels.t_tests import student_t, welch_t
from jaxqkv.kernels.weights import (
    DistributionShape,
    distribution_shape,
    ks_normal,
    neighbour_correlations,
    principal_components,
    spectrum,
)

__all__ = [
    "GROUPS",
    "AttentionStatistics",
    "Circuit",
    "DistributionShape",
    "HeadTypes",
    "Sample",
    "attention_statistics",
    "attribution",
    "bin_index",
    "binned_moments",
    "bootstrap_interval",
    "causal_samples",
    "circuit_singular_values",
    "column_correlation",
    "column_cosine",
    "column_cosine_moments",
    "composition",
    "copying_score",
    "counts",
    "density",
    "density_by_group",
    "distribution_shape",
    "exchange_null",
    "first_and_last",
    "fisher_z",
    "freedman_diaconis_histogram",
    "group_densities",
    "head_pair_densities",
    "head_pair_masks",
    "head_similarity",
    "head_types",
    "jensen_shannon",
    "ks_normal",
    "last_token_scores",
    "linear_regression",
    "logit_lens",
    "moments",
    "neighbour_correlations",
    "ov_circuit",
    "pattern_divergence",
    "pearson",
    "percentile_edges",
    "permutation_null",
    "permutation_p",
    "permute_entries",
    "principal_components",
    "qk_circuit",
    "representational_similarity",
    "require_finite",
    "spectrum",
    "student_t",
    "subspace_overlap",
    "upper_density",
    "weighted_attention",
    "welch_t",
]
