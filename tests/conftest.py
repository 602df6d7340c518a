"""Strictness for the whole suite, and small checkpoints whose sizes are distinct primes."""

import dataclasses
import gc
import os
import socket
import sys
import time
from importlib.metadata import version
from importlib.util import cache_from_source
from pathlib import Path
from typing import get_args
from unittest import mock

from helpers.axes import check_arrays
from packaging.version import Version

# Before jax is imported: its own cache and the hub's belong to no test.
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Arrays are small, and several workers share the cores: threads of PyTorch's and NumPy's would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Most of the suite's time is XLA's, which compiles five times as fast without optimisations and without splitting its
# small programs. `XLA_FLAGS= pytest` runs everything as users do, and `helpers.processes` its processes.
QUICK_COMPILATION = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
]
KNOWN = 3 if Version(version("jaxlib")) >= Version("0.10") else 1
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK_COMPILATION[:KNOWN]))

import jax
import jaxtyping
import numpy as np
import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook, jaxtyped

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

with_shapes = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where a float is asked for is well


def has_axes(annotation):
    """Whether a shape with an axis is anywhere in an annotation; `...` is any shape."""
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return annotation.dim_str != "..."
    return isinstance(annotation, str) or any(map(has_axes, get_args(annotation)))


def jaxtyped_where_there_are_axes(typechecker):
    """`jaxtyping.jaxtyped` for functions and dataclasses that have shapes; all others stay as they are."""

    def decorate(decorated):
        inside = getattr(decorated, "__func__", decorated)
        parts = (inside.fget, inside.fset) if isinstance(inside, property) else (inside,)
        annotations = [each for part in parts for each in getattr(part, "__annotations__", {}).values()]
        return jaxtyped(decorated, typechecker=typechecker) if any(map(has_axes, annotations)) else decorated

    return decorate


# Shapes are checked in the functions that have some. Mypy checks all other types; to check them here too, in the tens
# of thousands of calls that read weights and make the keys of compiled programs, would take a tenth of the time.
ROOT = Path(__file__).parents[1]
FILES = [path for path in (ROOT / "jaxqkv").rglob("*.py") if "jaxtyping import" in path.read_text()]
SHAPED = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES]


def cached_apart(path, debug_override=None, *, optimization=None):
    """Names the file of a module's bytecode, which users are not to run if it checks shapes."""
    ours = Path(path).is_relative_to(ROOT / "jaxqkv")
    return cache_from_source(path, debug_override, optimization="jaxtyping" if ours else optimization)


with (
    install_import_hook(SHAPED, "conftest.with_shapes"),
    mock.patch.object(jaxtyping, "jaxtyped", jaxtyped_where_there_are_axes),
    mock.patch("importlib._bootstrap_external.cache_from_source", cached_apart),
):
    # If slipcover counts lines, it is asked for modules first, and takes their code from the hook of jaxtyping.
    sys.meta_path.sort(key=lambda finder: type(finder).__name__ != "SlipcoverMetaPathFinder")
    import jaxqkv
    import jaxqkv.kernels
    import jaxqkv.pages.view
    import jaxqkv.studies.adjustment_magnitudes.figures
    import jaxqkv.studies.attention_scores.figures
    import jaxqkv.studies.category_selectivity.categories
    import jaxqkv.studies.head_patching.figures
    import jaxqkv.studies.head_silencing.figures
    import jaxqkv.studies.heads.circuits
    import jaxqkv.studies.heads.lens
    import jaxqkv.studies.heads.norms
    import jaxqkv.studies.heads.similarity
    import jaxqkv.studies.heads.summary
    import jaxqkv.studies.heads.types
    import jaxqkv.studies.prediction_divergence.figures
    import jaxqkv.studies.qkv_activations.figures
    import jaxqkv.studies.qkv_weights.figures
    import jaxqkv.studies.token_frequency.adjustments
    import jaxqkv.studies.token_frequency.scores
    import jaxqkv.studies.token_similarity.figures
    import jaxqkv.studies.weight_tour.embeddings
    import jaxqkv.studies.weight_tour.layers
    import jaxqkv.studies.weight_tour.matrices
    import jaxqkv.text.corpora
    import jaxqkv.text.counting
    import jaxqkv.text.tokenizer_files
    from jaxqkv.cli.main import main

from jaxqkv.architectures.bert import BertConfig
from jaxqkv.architectures.distilbert import DistilBertConfig
from jaxqkv.architectures.gpt2 import GPT2Config
from jaxqkv.architectures.roberta import RobertaConfig
from jaxqkv.checkpoints.folder import save_checkpoint
from jaxqkv.figures import drawers
from jaxqkv.studies.study import FigureSpec

# The suite's commands draw in its own process; tests/figures/test_drawers.py looks at others.
drawers.FIGURES_EACH = 10**6

DAYS_KEPT = 7  # of a compiled program

SIZES = {
    "vocab_size": 43,
    "n_positions": 17,
    "n_embd": 35,
    "n_layer": 3,
    "n_head": 5,
    "n_inner": 29,
    "initializer_range": 0.3,
}
GPT2 = GPT2Config(
    **SIZES,
    activation="gelu_new",
    layer_norm_epsilon=1e-5,
    scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
    tie_word_embeddings=True,
)
BERT = BertConfig(**SIZES, activation="gelu", layer_norm_epsilon=1e-12, type_vocab_size=2)
# Positions begin after 2, so that the offset is not the usual one.
ROBERTA = RobertaConfig(**SIZES, activation="gelu", layer_norm_epsilon=1e-5, type_vocab_size=1, pad_token_id=2)
DISTILBERT = DistilBertConfig(**SIZES, activation="gelu", layer_norm_epsilon=1e-12)
CONFIGS = {"gpt2": GPT2, "bert": BERT, "roberta": ROBERTA, "distilbert": DISTILBERT}


def pytest_configure(config):
    """Programs are compiled once for all workers, and again only when they change (`--cache-clear` forgets them)."""
    jax.config.update("jax_traceback_in_locations_limit", 0)  # no test reads where in the code an operation is from
    if not config.pluginmanager.hasplugin("cacheprovider"):
        return
    folder = config.cache.mkdir("xla")
    if not hasattr(config, "workerinput"):
        for path in folder.iterdir():
            if path.stat().st_mtime < time.time() - DAYS_KEPT * 86400:
                path.unlink()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that look at the same runs, in fixtures of a module, stay in one worker with them."""
    for item in items:
        fixtures = item._fixtureinfo.name2fixturedefs.values()
        if any(fixture.scope == "module" for each in fixtures for fixture in each):
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))


def pytest_collection_finish():
    """What is imported stays, and traced programs are many small objects: they are searched for cycles less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True, scope="session")
def _alone(tmp_path_factory):
    """No test reaches beyond this machine or the user's caches."""
    connect = socket.socket.connect

    def only_loopback(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise ConnectionRefusedError(f"tests do not reach {address}")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("JAXQKV_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        patched.setattr(socket.socket, "connect", only_loopback)
        yield


@pytest.fixture(autouse=True, scope="session")
def _arrays_as_declared():
    """Every figure that a test makes in this process has the arrays that its definition names, with these axes."""
    make = FigureSpec.display

    def display(self, run, reductions):
        made = make(self, run, reductions)
        check_arrays(self, made.arrays)
        return made

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(FigureSpec, "display", display)
        yield


def random_tensors(config, seed=0):
    """Every tensor of a fresh model, norms and biases random too, so that each one matters."""
    rules = config.table().rules(config.n_layer)
    generator = np.random.default_rng(seed)
    return {
        key: (rule.init == "ones") + generator.normal(0, config.initializer_range, rule.shape).astype(np.float32)
        for key, rule in rules.items()
    }


@pytest.fixture(params=["gpt2", "bert"])  # one causal and pre-norm, one neither; the others in test_architectures.py
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def folder(config, tmp_path):
    """A tiny checkpoint in Hugging Face's format."""
    return write_folder(tmp_path / config.model_type, config)


def write_folder(path, config, tensors=None, **extra):
    save_checkpoint(path, config, random_tensors(config) if tensors is None else tensors, **extra)
    return path


@pytest.fixture
def model(folder):
    return jaxqkv.load(folder)


@pytest.fixture
def gpt2_model(tmp_path):
    return jaxqkv.load(write_folder(tmp_path / "gpt2", GPT2))


def changed(config, **changes):
    return dataclasses.replace(config, **changes)


def random_ids(config, batch, pos, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, pos)).astype(np.int32)


# Of one float32 operation, relative to its result. A sum of n terms is off by at most n of these times the sum of the
# terms' magnitudes; of a few dozen terms in any order it is off by some units, so that limits of n have room.
ROUNDING = 2.0**-24


# Of whole models, relative to the largest value of a tensor, between two float32 runs in other shapes, in another
# program or by PyTorch. The tests' models and the demos are within 4e-6 of float64 here and within 5e-6 in PyTorch,
# with vectors of 4 numbers and of 8; `verify` asks for the same.
MODEL_LIMIT = 2e-5


def relative_error(actual, expected):
    """Largest absolute difference, relative to the largest magnitude expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / np.abs(expected).max()


def write_word_tokenizer(folder, words):
    """A tokenizer of whole words, each with its leading space, for a GPT-2 folder."""
    import tokenizers

    vocabulary = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=words[0]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(" ?[^ ]+"), "isolated")
    backend.save(str(folder / "tokenizer.json"))
    return folder


def arrays_of(path):
    """The arrays of an .npz, read at once, so that no open file waits for the garbage collector."""
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def figures_of(study, base, folder, *arguments):
    """Arrays of all figures of a study on one checkpoint, as `numpy.load` gives them."""
    line = ["figures", study, "--model", str(folder), "--arrays-only", "--out", str(base / "out"), *arguments]
    assert main(line) == 0
    return {path.stem: arrays_of(path) for path in (base / "out" / study).glob("*.npz")}


def assert_same_figures(one, other):
    """Every array of every figure in two folders: counts exactly, the rest as models agree; how many figures."""
    paths = sorted(one.glob("*.npz"))
    for path in paths:
        expected, actual = arrays_of(path), arrays_of(other / path.name)
        for name in expected:
            assert actual[name].dtype == expected[name].dtype
            if expected[name].dtype.kind in "iu":
                np.testing.assert_array_equal(actual[name], expected[name], err_msg=f"{path.stem} {name}")
            else:
                # Correlations are ratios of small numbers: the rounding of what goes in shows more.
                limit = 5 * MODEL_LIMIT if name.startswith("r") else MODEL_LIMIT
                scale = np.nanmax(np.abs(expected[name]))
                np.testing.assert_allclose(actual[name], expected[name], rtol=0, atol=limit * scale, err_msg=path.stem)
    return len(paths)
