"""How kernels are called: with arrays of any library, whose axes are checked by name and whose values are taken."""

import enum
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROUNDING

from jaxqkv import kernels
from jaxqkv.errors import KernelError
from jaxqkv.kernels import circuits

GENERATOR = np.random.default_rng(0)
MATRIX = GENERATOR.normal(size=(11, 15)).astype(np.float32)
EDGES = np.linspace(-0.75, 1, 8)  # in float64, and the same numbers in float32
Q, K = GENERATOR.normal(size=(2, 2, 3, 5, 7)).astype(np.float32)
MASK = np.array([[True] * 5, [False] * 2 + [True] * 3])
SQUARE = MATRIX @ MATRIX.T
KEY = jax.random.key(3)


def difference(labels, data):
    return labels @ data


def exchanged(swaps, data):
    return swaps.astype(data.dtype) @ data


HEADS, OTHERS = GENERATOR.normal(size=(3, 13, 7)), GENERATOR.normal(size=(5, 13, 7))
HEADS, OTHERS = HEADS.astype(np.float32), OTHERS.astype(np.float32)
TURNED = np.roll(HEADS, 1, axis=0)
GAMMA, READOUT = HEADS[0, :, 0], (HEADS[0] @ HEADS[1].T)
PATTERN = np.tril(GENERATOR.random((2, 3, 5, 5))).astype(np.float32)
V, OUTPUT = GENERATOR.normal(size=(3, 5, 7)).astype(np.float32), GENERATOR.normal(size=(3, 7, 11)).astype(np.float32)
# The arrays and the settings that each kernel is called with.
CALLS = {
    "attention_statistics": ((Q[:1, :2], K[:1, :2], MASK[:1]), {"causal": True}),
    "attribution": ((MATRIX, MATRIX[1], MATRIX[2], MATRIX[3]), {"epsilon": 1e-5}),
    "bootstrap_interval": ((MATRIX, KEY), {"n_unit": 11, "samples": 19}),
    "bin_index": ((MATRIX, EDGES), {}),
    "binned_moments": ((MATRIX[0], np.arange(15, dtype=np.int32) % 4), {"n_bin": 3}),
    "causal_samples": ((PATTERN, MASK), {}),
    "circuit_singular_values": ((HEADS, TURNED), {}),
    "column_correlation": ((MATRIX,), {}),
    "column_cosine": ((MATRIX,), {}),
    "column_cosine_moments": ((MATRIX,), {"strips": 2}),
    "composition": ((HEADS, TURNED, OTHERS, OTHERS**3), {}),
    "copying_score": ((HEADS, TURNED, READOUT), {}),
    "counts": ((MATRIX, EDGES, MATRIX > 0), {}),
    "density": ((MATRIX, EDGES, MATRIX > 0), {}),
    "density_by_group": ((MATRIX, EDGES, (MATRIX > 0).astype(np.int32)), {"n_group": 2}),
    "distribution_shape": ((MATRIX,), {}),
    "exchange_null": ((MATRIX, KEY), {"n_unit": 11, "statistic": exchanged, "permutations": 19}),
    "first_and_last": ((MASK,), {}),
    "fisher_z": ((MATRIX / 9,), {}),
    "freedman_diaconis_histogram": ((MATRIX,), {}),
    "group_densities": ((MATRIX, EDGES), {"centred": True}),
    "head_pair_densities": ((MATRIX, EDGES), {"n_head": 3}),
    "head_types": ((PATTERN[:, :, 1:, 1:],), {}),
    "head_similarity": ((HEADS, TURNED, OTHERS, OTHERS**3), {}),
    "jensen_shannon": ((PATTERN[0, 0, 4], PATTERN[1, 2, 4]), {}),
    "ks_normal": ((MATRIX, np.float32(0.1), np.float32(0.9)), {}),
    "last_token_scores": ((Q, K, MASK), {}),
    "linear_regression": ((MATRIX[:, :3], MATRIX[:, 3], MATRIX[:, 4] > -1), {}),
    "logit_lens": ((MATRIX, MATRIX[1], MATRIX[2], MATRIX**2), {"epsilon": 1e-5}),
    "moments": ((MATRIX, MATRIX > 0), {"ddof": 1}),
    "neighbour_correlations": ((MATRIX,), {}),
    "ov_circuit": ((HEADS, HEADS.swapaxes(1, 2)), {"folded": False}),
    "pattern_divergence": ((PATTERN[0], PATTERN[1], MASK[1]), {}),
    "pearson": ((MATRIX, MATRIX**2, MATRIX > 0), {}),
    "percentile_edges": ((MATRIX,), {"n_bin": 5}),
    "permutation_null": ((MATRIX[:, 0], MATRIX, KEY), {"statistic": difference, "permutations": 19}),
    "permutation_p": ((MATRIX, MATRIX[3]), {}),
    "permute_entries": ((MATRIX, KEY), {}),
    "principal_components": ((MATRIX,), {}),
    "qk_circuit": ((HEADS, TURNED, GAMMA, np.float32(0.3)), {"folded": True}),
    "representational_similarity": ((SQUARE, SQUARE**3), {}),
    "require_finite": ((MATRIX,), {}),
    "student_t": ((MATRIX[:, 0], MATRIX[:, 1]), {}),
    "welch_t": ((MATRIX[:, 0], MATRIX[:, 1]), {}),
    "spectrum": ((MATRIX,), {}),
    "subspace_overlap": ((HEADS, OTHERS), {}),
    "upper_density": ((MATRIX, EDGES), {}),
    "weighted_attention": ((PATTERN[0], V, OUTPUT), {}),
}
ARRAYS = [n for n in kernels.__all__ if callable(f := getattr(kernels, n)) and not inspect.isclass(f)]


def test_every_kernel_of_arrays_is_here():
    assert set(ARRAYS) - CALLS.keys() == {"head_pair_masks"}  # which takes none


def same(one, two):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# Whose data are trees of arrays, where a list is a tree of numbers.
OF_TREES = ("bootstrap_interval", "exchange_null", "permutation_null")
LIBRARIES = [(library, name) for library in ("torch", "jax", "lists", "dlpack") for name in CALLS
             if library != "lists" or name not in OF_TREES]  # fmt: skip


@functools.cache
def of_numpy(name):
    arrays, settings = CALLS[name]
    return getattr(kernels, name)(*arrays, **settings)


@pytest.mark.parametrize(("library", "name"), LIBRARIES)
def test_arrays_of_other_libraries(name, library):
    """The same numbers as of NumPy's arrays, whatever an array is made of, by position and by name."""

    class Dlpack:
        def __init__(self, values):
            self.values = values

        def __dlpack__(self, **options):
            return self.values.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.values.__dlpack_device__()

    torch = pytest.importorskip("torch", exc_type=ImportError) if library == "torch" else None
    make = {"jax": jnp.asarray, "lists": lambda x: x.tolist(), "dlpack": Dlpack}
    convert = (lambda x: torch.tensor(x, requires_grad=x.dtype.kind == "f")) if torch else make[library]
    arrays, settings = CALLS[name]
    kernel = getattr(kernels, name)
    given = [convert(x) if isinstance(x, np.ndarray) else x for x in arrays]
    if library == "lists" and name in ("percentile_edges", "require_finite", "freedman_diaconis_histogram"):
        expected = kernel(*(x.astype(np.float64) for x in arrays), **settings)  # as lists are, where float64 decides
    else:
        expected = of_numpy(name)
    if library in ("torch", "dlpack"):
        names = list(inspect.signature(kernel).parameters)
        found = kernel(given[0], **dict(zip(names[1:], given[1:], strict=False)), **settings)
    else:
        found = kernel(*given, **settings)
    same(jax.tree.map(np.asarray, found), jax.tree.map(np.asarray, expected))


def test_bfloat16_and_whole_numbers():
    torch = pytest.importorskip("torch", exc_type=ImportError)
    narrow = torch.tensor(MATRIX).bfloat16()
    same(kernels.moments(narrow), kernels.moments(narrow.float().numpy()))
    assert kernels.column_cosine(narrow).dtype == jnp.bfloat16
    whole = [[1, 2, 3], [4, 5, 7]]
    same(kernels.column_cosine(whole), kernels.column_cosine(np.array(whole, np.float32)))
    same(kernels.moments([True, False, False]), kernels.moments(np.array([1.0, 0, 0])))


def test_masks_of_whole_numbers():
    expected = kernels.last_token_scores(Q, K, MASK)
    for mask in (MASK.astype(np.int64), MASK.astype(int).tolist(), jnp.asarray(MASK.astype(np.int32))):
        same(kernels.last_token_scores(Q, K, mask), expected)
    for mask in (MASK.astype(np.float32), 2 * MASK.astype(np.int32)):
        with pytest.raises(KernelError, match="mask must be boolean, True at the values that count, or 1 and 0; not"):
            kernels.last_token_scores(Q, K, mask)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.column_cosine(MATRIX[0]), r"column_cosine: x has the axes \[row, column\], got \[15\]"),
        (lambda: kernels.column_cosine([[[1.0]]]), r"column_cosine: x has the axes \[row, column\], got \[1, 1, 1\]"),
        (lambda: kernels.last_token_scores(Q, K[..., :5], MASK), "head_dim is 7 in q and 5 in k"),
        (lambda: kernels.last_token_scores(Q, K, MASK[:1]), "batch is 2 in q and 1 in mask"),
        (lambda: kernels.pearson(MATRIX, MATRIX[:3]), r"pearson: y \[3, 15\] does not match x \[11, 15\]"),
        (lambda: kernels.moments(MATRIX, MATRIX[:, :2] > 0), r"where \[11, 2\] does not match values \[11, 15\]"),
        (lambda: kernels.moments([[1.0], [1.0, 2.0]]), "values cannot be read as an array"),
        (lambda: kernels.moments(["a"]), "values must be an array of numbers, not of <U1"),
        (lambda: kernels.moments(object()), "values must be an array of numbers, not of object"),
        (lambda: jax.jit(kernels.column_cosine)(MATRIX[0]), r"x has the axes \[row, column\]"),
        (lambda: kernels.moments(MATRIX * 1j), "values must be an array of real numbers, not of complex64"),
        (lambda: kernels.counts(jnp.asarray(MATRIX, jnp.complex64), EDGES), "values must be an array of real numbers"),
        (
            lambda: kernels.density_by_group(MATRIX, EDGES, MATRIX, n_group=2),
            "group must be whole numbers, not float32",
        ),
        (
            lambda: kernels.density_by_group(MATRIX, EDGES, MATRIX.astype(int), n_group=-1),
            "n_group is a whole number, 0 or more, not -1",
        ),
        (
            lambda: kernels.group_densities(MATRIX[:, :10], EDGES, centred=True),
            "10 columns, which are not three thirds",
        ),
        (lambda: kernels.column_cosine_moments(MATRIX, strips=0), "strips is the number of pieces of a product"),
        (lambda: kernels.percentile_edges(MATRIX, n_bin=0), "n_bin is the number of bins, 1 or more, not 0"),
        (
            lambda: kernels.bootstrap_interval(MATRIX, KEY, n_unit=11, together=0),
            "together is the number of resamples computed at a time, 1 or more, not 0",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(KernelError, match=message):
        call()


WRONG = {int: ("3", 3.0, -1, None, True), bool: ("yes", 2, None), float: ("1e-5", None, True, 1j)}
KINDS = {int: "a whole number, 0 or more", bool: "True or False", float: "a number"}
SETTINGS = [(name, each.name, each.annotation) for name in ("head_pair_masks", *CALLS)
            for each in inspect.signature(getattr(kernels, name)).parameters.values()
            if each.kind is each.KEYWORD_ONLY]  # fmt: skip


@pytest.mark.parametrize(("name", "setting", "kind"), SETTINGS)
def test_settings_of_another_kind_are_refused_by_name(name, setting, kind):
    arrays, settings = CALLS.get(name, ((), {"n_head": 3, "head_dim": 5}))
    described = "a whole number" if setting == "ddof" else KINDS.get(kind, "a function")
    for value in WRONG.get(kind, ("mean", 3)):
        if (setting, value) == ("ddof", -1):
            continue
        message = f"{setting} is {described}, not {value!r}"
        with pytest.raises(KernelError, match=re.escape(message)):
            getattr(kernels, name)(*arrays, **settings | {setting: value})


def test_settings_of_other_libraries_and_negative_ddof():
    torch = pytest.importorskip("torch", exc_type=ImportError)

    class Count(enum.IntEnum):
        ONE = 1

    for one in (torch.tensor(1), np.int64(1), jnp.int32(1), np.array(1), Count.ONE):
        same(kernels.moments(MATRIX, ddof=one), kernels.moments(MATRIX, ddof=1))
    squares = ((MATRIX - MATRIX.mean()) ** 2).sum()
    np.testing.assert_allclose(kernels.moments(MATRIX, ddof=-1)[1], (squares / (MATRIX.size + 1)) ** 0.5, rtol=1e-6)
    with pytest.raises(KernelError, match=r"ddof is one number, not an array of shape \[2\]"):
        kernels.moments(MATRIX, ddof=torch.tensor([1, 0]))


# Kernels that run operation by operation: on the device, one with a choice by platform, a condition, a scan and a map,
# which JAX does otherwise then, and another; and those that work on the host.
ONE_BY_ONE = {"attention_statistics", "first_and_last", "bin_index", "percentile_edges", "require_finite"}
ONE_BY_ONE |= {"freedman_diaconis_histogram", "copying_score"}


def recorded(call):
    """The results of a call whose operations are recorded as without jit, and compiled as one program.

    The arrays are arguments of the program. As its constants XLA would compute with them while it compiles, slowly.
    """
    program, results = jax.make_jaxpr(call, return_shape=True)()
    with jax.disable_jit(False):
        leaves = jax.jit(lambda constants: jax.core.eval_jaxpr(program.jaxpr, constants))(program.consts)
    return jax.tree.unflatten(jax.tree.structure(results), leaves)


@pytest.mark.parametrize("name", CALLS)
def test_without_compilation(name, monkeypatch):
    """Gives the same numbers as compiled, to the rounding of other sums; a principal component may point either way.

    Kernels then get NumPy's arrays as they are, their loops are Python's, and no part is compiled by itself. Some run
    so; of the others, the operations are recorded and compiled as one program, since 1,200 of one each take a minute.
    """
    value = np.abs if name == "principal_components" else np.asarray
    arrays, settings = CALLS[name]
    call = functools.partial(getattr(kernels, name), *arrays, **settings)
    expected = of_numpy(name)
    through = circuits._through  # the part of copying_score on the device
    monkeypatch.setattr(circuits, "_through", lambda *factors: recorded(functools.partial(through, *factors)))
    with jax.disable_jit():
        actual = call() if name in ONE_BY_ONE else recorded(call)
    for one, two in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_allclose(value(one), value(two), rtol=0, atol=100 * ROUNDING * np.abs(two).max())


def test_settings_may_be_arrays_of_one_number():
    groups = (MATRIX > 0).astype(np.int32)
    expected = kernels.density_by_group(MATRIX, EDGES, groups, n_group=2)
    same(kernels.density_by_group(MATRIX, EDGES, groups, n_group=np.array(2)), expected)
    expected = kernels.group_densities(MATRIX, EDGES, centred=True)
    same(kernels.group_densities(MATRIX, EDGES, centred=jnp.array(True)), expected)
    expected = kernels.head_pair_densities(MATRIX, EDGES, n_head=3)
    same(kernels.head_pair_densities(MATRIX, EDGES, n_head=jnp.array(3)), expected)


def test_masks_may_broadcast():
    same(kernels.moments(MATRIX, MATRIX[:1] > 0), kernels.moments(MATRIX, np.tile(MATRIX[:1] > 0, (11, 1))))


def test_what_the_caller_changes_after_a_call_is_not_seen():
    """A kernel may return before it has read its arguments."""
    large = GENERATOR.normal(size=(900, 900)).astype(np.float32)
    expected = np.asarray(kernels.column_cosine(jnp.asarray(large)))
    for _ in range(4):
        given = large.copy()
        result = kernels.column_cosine(given)
        given[:] = 0
        np.testing.assert_array_equal(result, expected)


def test_concrete_arrays_inside_other_transformations():
    """A mask and edges that are known, in a program of other arrays."""
    edges, mask = jnp.asarray(EDGES, jnp.float32), jnp.asarray(MASK.astype(np.int32))
    inside = jax.jit(lambda x: kernels.density(x, edges))(MATRIX)
    np.testing.assert_allclose(inside, kernels.density(MATRIX, EDGES), rtol=1e-6)
    scores = jax.jit(lambda q: kernels.last_token_scores(q, K, mask)[0].values.sum())
    np.testing.assert_allclose(scores(Q), kernels.last_token_scores(Q, K, MASK)[0].values.sum(), rtol=1e-5)
    assert np.isfinite(jax.grad(scores)(jnp.asarray(Q))).all()
    many = jax.vmap(lambda q: kernels.first_and_last(mask)[1] + q)(jnp.arange(3, dtype=jnp.int32))
    assert many.tolist() == [[4, 4], [5, 5], [6, 6]]
