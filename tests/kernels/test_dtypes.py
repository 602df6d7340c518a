"""The dtype of each kernel's results: as the folder's docstring says, also where JAX has float64."""

import jax
import numpy as np
import pytest

from jaxqkv import kernels
from jaxqkv.model.comparison import _double_precision

GENERATOR = np.random.default_rng(0)
X, EDGES = GENERATOR.normal(size=(5, 9)), np.linspace(-4, 4, 8)
HEADS, MASK = GENERATOR.normal(size=(2, 3, 5, 7)), np.ones((2, 5), bool)
ROUNDED = {
    "density": lambda: kernels.density(X, EDGES),
    "moments": lambda: kernels.moments(X),
    "pearson": lambda: kernels.pearson(X, X),
    "binned_moments": lambda: kernels.binned_moments(X[0], np.zeros(9, int), n_bin=2)[1:],
    "distribution_shape": lambda: tuple(kernels.distribution_shape(X)),
    "ks_normal": lambda: kernels.ks_normal(X, 0.0, 1.0),
    "neighbour_correlations": lambda: kernels.neighbour_correlations(X),
    "spectrum": lambda: kernels.spectrum(X),
    "jensen_shannon": lambda: kernels.jensen_shannon(abs(X[0]), abs(X[1])),
    "student_t": lambda: kernels.student_t(X[0], X[1]),
    "welch_t": lambda: kernels.welch_t(X[0], X[1]),
    "linear_regression": lambda: kernels.linear_regression(X[:, :2], X[:, 2]),
    "representational_similarity": lambda: kernels.representational_similarity(X[:, :5], X[:, :5]),
    "fisher_z": lambda: kernels.fisher_z(X / 9),
    "permutation_p": lambda: kernels.permutation_p(X, X[0]),
}
CIRCUITS = HEADS[0].swapaxes(1, 2), HEADS[1].swapaxes(1, 2)
ROUNDED |= {
    "qk_circuit": lambda: tuple(kernels.qk_circuit(*CIRCUITS, HEADS[0, 0, 0], 0.3)),
    "ov_circuit": lambda: tuple(kernels.ov_circuit(CIRCUITS[0], HEADS[1], GENERATOR.normal(size=7))),
    "circuit_singular_values": lambda: kernels.circuit_singular_values(*CIRCUITS),
    "composition": lambda: kernels.composition(*CIRCUITS, *CIRCUITS),
    "copying_score": lambda: kernels.copying_score(*CIRCUITS, np.eye(7)),
    "head_similarity": lambda: kernels.head_similarity(*CIRCUITS, *CIRCUITS),
    "subspace_overlap": lambda: kernels.subspace_overlap(*CIRCUITS),
    "pattern_divergence": lambda: kernels.pattern_divergence(abs(HEADS[0]), abs(HEADS[1])),
}
KEPT = {
    "column_cosine": lambda: kernels.column_cosine(X),
    "column_cosine_moments": lambda: kernels.column_cosine_moments(X),
    "column_correlation": lambda: kernels.column_correlation(X),
    "permute_entries": lambda: kernels.permute_entries(X, jax.random.key(0)),
    "last_token_scores": lambda: [sample.values for sample in kernels.last_token_scores(HEADS, HEADS, MASK)],
}


@pytest.mark.parametrize("name", [*ROUNDED, *KEPT])
def test_dtypes(name):
    call = (ROUNDED | KEPT)[name]
    with _double_precision():
        # Traced, but for the one that runs on the host.
        results = jax.tree.leaves(call() if name == "copying_score" else jax.eval_shape(call))
    assert {str(leaf.dtype) for leaf in results} == {"float32" if name in ROUNDED else "float64"}
