"""What reads files, on files that were changed at random: refused in words, or read as they are, in bounded memory."""

import contextlib
import dataclasses
import json
import math
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from conftest import GPT2, changed, random_tensors, write_folder
from helpers.checkpoints import write_sharded
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from jaxqkv.architectures import REGISTRY
from jaxqkv.checkpoints.config import ACTIVATIONS, LARGEST, MOST_LAYERS
from jaxqkv.checkpoints.folder import FolderCheckpoint
from jaxqkv.checkpoints.mapped import FLOATS, MappedFile
from jaxqkv.checkpoints.weights import Weights
from jaxqkv.errors import LONGEST, CheckpointError, JaxqkvWarning
from jaxqkv.pages.manifest import ENTRY, Record, listed_figures

# The same files in every run, on any machine.
same = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=70,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MEMORY = 16 << 20  # bytes; the files have a few thousand, some changes a hundred thousand more

TINY = changed(GPT2, n_layer=1, n_embd=5, n_inner=3, vocab_size=7, n_positions=2)
SHAPES = {key: tensor.shape for key, tensor in random_tensors(TINY).items()}
# What may stand in the place of any value.
VALUES = [
    "null", "true", "0", "-1", "1.5", "1e400", "NaN", "-Infinity", "9" * 5000, "18446744073709551616", "4294967296",
    "1000000000000", "[]", "{}", '""', '"x"', '"../out.safetensors"', '"/etc/passwd"', '"\\ud800"', '"\\u0000"', '"."',
    '"\\n\\u001b[31m"', '"F64"', '"F16"', '"I32"', '"F8_E4M3"', '"F4"', "[0, 18446744073709551615]", "[-8, 8]",
    "[8, 0]", "[1000000000000, 1000000000000]", "[4294967296, 4294967296]", "[0]", "[0, 0]",
    "[1, 2, 3]", '{"a": {"b": [1]}}',
    "[" * 200 + "]" * 200, "[" * 100_000, '{"a":' * 5000, "[" + "0," * 20_000 + "0]", '"' + "n" * 5000 + '"',
]  # fmt: skip


@st.composite
def other_bytes(draw, content):
    """The content with some bytes flipped, cut off, taken out or put in, or with another length of the header."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "delete", "length"]))
        if kind == "flip" and place < len(data):
            data[place] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del data[place:]
        elif kind == "insert":
            data[place:place] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "delete":
            del data[place : place + draw(st.integers(1, 9))]
        else:
            length = draw(st.sampled_from([0, 1, len(data) - 8, len(data), 2**31, 2**62, 2**64 - 1]))
            data[:8] = max(length, 0).to_bytes(8, "little")
    return bytes(data)


def places_in(node, path=()):
    """The path of every value in a JSON tree."""
    yield path
    if isinstance(node, dict | list):
        for key in node if isinstance(node, dict) else range(len(node)):
            yield from places_in(node[key], (*path, key))


@st.composite
def other_json(draw, tree):
    """The text of a JSON tree with one or two values replaced, or there twice under the same name."""
    tree = json.loads(json.dumps(tree))
    texts = []
    for number in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from([path for path in places_in(tree) if path]))
        *parents, last = path
        node = tree
        for step in parents:
            node = node[step]
        value, text = json.dumps(node[last]), draw(st.sampled_from(VALUES))
        if isinstance(last, str) and draw(st.booleans()):
            text = f"{value}, {json.dumps(last)}: {text}"
        elif isinstance(last, str) and draw(st.booleans()):
            text = f"{text}, {json.dumps(last)}: {value}"
        node[last] = f"@{number}@"
        texts.append(text)
    result = json.dumps(tree)
    for number, text in enumerate(texts):
        result = result.replace(f'"@{number}@"', text)
    return result.encode()


@contextlib.contextmanager
def bounded():
    """Neither a crash nor much memory: what is wrong is a `CheckpointError` in one line."""
    tracemalloc.start()
    message = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", JaxqkvWarning)  # of keys that are unknown by then
            yield
    except CheckpointError as error:
        message = str(error)
    finally:
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < MEMORY
    assert message.isprintable()
    assert len(message) < 1.1 * LONGEST


# --- safetensors ---

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(3, dtype=np.float16),
    "c": np.zeros((0, 5), np.float64),
    "d": np.ones((), ml_dtypes.bfloat16),
    "e": np.arange(4, dtype=np.int32),
}
FILE = save(TENSORS, metadata={"format": "pt"})
HEADER_BYTES = int.from_bytes(FILE[:8], "little")
HEADER = json.loads(FILE[8 : 8 + HEADER_BYTES])


def with_header(text):
    return len(text).to_bytes(8, "little") + text + FILE[8 + HEADER_BYTES :]


def check_safetensors(path, content):
    """Reads every tensor; what is read has to be what a reading of our own finds inside the file."""
    path.write_bytes(content)
    with bounded():
        file = MappedFile(path)
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        assert set(file.header) == set(header)
        for key, entry in header.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            assert start <= begin <= end <= len(content)
            if entry["dtype"] not in FLOATS:
                with pytest.raises(CheckpointError):
                    file.tensor(key)
                continue
            try:
                tensor = file.tensor(key)
            except CheckpointError:
                assert 0 in entry["shape"]  # beside a size that no array can have
                assert max(entry["shape"]) > 2**60
                continue
            assert tensor.shape == tuple(entry["shape"])
            assert tensor.dtype == np.dtype(FLOATS[entry["dtype"]])
            assert tensor.nbytes == end - begin == math.prod(entry["shape"]) * tensor.itemsize
            assert tensor.tobytes() == content[begin:end]


def test_the_file_as_it_is(tmp_path):
    check_safetensors(tmp_path / "x", FILE)
    file = MappedFile(tmp_path / "x")
    for key in "abcd":
        np.testing.assert_array_equal(file.tensor(key), TENSORS[key])


@same
@given(content=other_bytes(FILE))
def test_safetensors_with_other_bytes(tmp_path, content):
    check_safetensors(tmp_path / "x", content)


@same
@example(text=json.dumps(HEADER).replace("[0, 5]", "[0, 18446744073709551615]").encode())
@given(text=other_json(HEADER))
def test_safetensors_with_another_header(tmp_path, text):
    check_safetensors(tmp_path / "x", with_header(text))


@same
@given(text=other_bytes(FILE[8 : 8 + HEADER_BYTES]))
def test_safetensors_with_other_bytes_in_the_header(tmp_path, text):
    check_safetensors(tmp_path / "x", with_header(text))


# --- config.json ---


def check_config(path, content):
    path.write_bytes(content)
    with bounded():
        config = REGISTRY.read(path)
        sizes = [getattr(config, field.name) for field in dataclasses.fields(config) if field.type is int]
        assert len(sizes) >= 6
        assert all(type(size) is int and 1 <= size <= LARGEST for size in sizes)
        assert config.n_layer <= MOST_LAYERS
        assert config.head_dim * config.n_head == config.n_embd
        assert config.activation in ACTIVATIONS
        assert 0 <= config.layer_norm_epsilon < 1
        assert REGISTRY.parse(config.to_json(), "again") == config


@same
@given(data=st.data())
def test_config(tmp_path, config, data):
    tree = config.to_json() | {"n_ctx": 5, "pruned_heads": {}, "task_specific_params": {"a": [1]}}
    text = json.dumps(tree).encode()
    check_config(tmp_path / "config.json", data.draw(other_json(tree) | other_bytes(text)))


# --- an index, and all of a checkpoint ---


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A checkpoint in two files, and beside it one that it must not reach."""
    base = tmp_path_factory.mktemp("sharded")
    folder = write_sharded(base / "model", TINY)
    (base / "out.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict(list(index["weight_map"].items())[:6])
    return folder, index


@settings(same, max_examples=150)  # which name the file outside too
@given(data=st.data())
def test_index(sharded, data):
    folder, index = sharded
    text = json.dumps(index).encode()
    (folder / "model.safetensors.index.json").write_bytes(data.draw(other_json(index) | other_bytes(text)))
    opened = []

    class Spy(MappedFile):
        def __init__(self, path):
            opened.append(path)
            super().__init__(path)

    with pytest.MonkeyPatch.context() as patch, bounded():
        patch.setattr("jaxqkv.checkpoints.folder.MappedFile", Spy)
        checkpoint = FolderCheckpoint(str(folder), folder, REGISTRY)
        for key, shape in checkpoint.shapes.items():
            assert checkpoint.tensor(key).shape == shape
    assert all(path.resolve().is_relative_to(folder.resolve()) for path in opened)


@same
@given(data=st.data())
def test_weights(tmp_path, data):
    """Config and tensors that may not fit each other: refused before a tensor is read."""
    folder = tmp_path / "model"
    if not folder.exists():
        write_folder(folder, TINY)
    tree = TINY.to_json()
    (folder / "config.json").write_bytes(data.draw(other_json(tree)))
    with bounded():
        weights = Weights(FolderCheckpoint(str(folder), folder, REGISTRY))
        assert {name: weights[name].shape for name in weights.names} == SHAPES


# --- the manifest of a study's figures ---

RUN = {"command": "jaxqkv figures", "seed": 3, "checkpoint": [{"checkpoint": "gpt2", "files": {"a": "b"}}]}
MANIFEST = {
    "study": "qkv-weights",
    **RUN,
    "figures": {id: {"title": "t", "caption": "c", "files": [f"{id}.npz"], "run": RUN} for id in ("1", "2a")},
}


@same
@given(content=other_json(MANIFEST) | other_bytes(json.dumps(MANIFEST).encode()))
def test_manifest(tmp_path, content):
    """Whatever it has become, its reader finds sound entries or none, and the next run can write one."""
    for id in ("1", "2a"):
        (tmp_path / f"{id}.npz").write_bytes(b"")
    (tmp_path / "manifest.json").write_bytes(content)
    listed = listed_figures(tmp_path / "manifest.json")
    for entry in listed.values():
        assert all(isinstance(entry.get(name, kind()), kind) for name, kind in ENTRY.items())
        assert all(isinstance(name, str) for name in entry.get("files", []))
    record = Record(tmp_path, "qkv-weights", {"seed": 5})
    (tmp_path / "manifest.json").write_bytes(record.manifest("3", {"title": "new", "caption": "", "files": []}))
    again = listed_figures(tmp_path / "manifest.json")
    assert again.pop("3")["run"] == {"seed": 5}
    deep = b"[[[" in content  # what Python reads, and cannot write
    assert deep or set(again) == set(listed) & {"1", "2a"}


# --- memory that Python does not count ---

FORGERY = """
import json, resource, sys
from pathlib import Path
from jaxqkv.checkpoints.mapped import MappedFile
from jaxqkv.errors import CheckpointError

size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (128 << 20),) * 2)

def entry(shape, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}

headers = [
    {"a": entry([10**12], 4 * 10**12)},
    {"a": entry([2**62], 0)},
    {"a": entry([2**32, 2**32], 0)},
    {"a": entry([2**63, 2], 8)},
    {"a": entry([0, 2**62, 2**62], 0)},
    {"a": entry([1] * 100_000, 8)},
    {"a": entry([2], 2**64)},
    {"a": entry([2], -8)},
    {str(i): entry([2**40], 2**42) for i in range(1000)},
]
contents = [len(text).to_bytes(8, "little") + text + bytes(8) for text in (json.dumps(h).encode() for h in headers)]
contents += [length.to_bytes(8, "little") + b"{}" for length in (2**27, 2**31, 2**40, 2**62, 2**63, 2**64 - 1)]
for content in contents:
    Path(sys.argv[1]).write_bytes(content)
    try:
        MappedFile(Path(sys.argv[1]))
        print("read")
    except CheckpointError:
        print("refused")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is set from Linux's own figures")
@pytest.mark.slow
def test_forged_sizes_reserve_no_memory(tmp_path):
    """With 128 MiB left: lengths of up to 2**64 bytes, and shapes of up to 2**124 values."""
    line = [sys.executable, "-c", FORGERY, str(tmp_path / "x")]
    result = subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["refused"] * 15
