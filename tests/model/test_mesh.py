"""Eight simulated devices give the numbers of one. In a process of its own: devices are made when JAX starts."""

import json
import os

import jax
import numpy as np
import pytest
from conftest import CONFIGS, MODEL_LIMIT, arrays_of, assert_same_figures, changed, random_ids, write_folder
from helpers.checkpoints import write_checkpoint_of_words
from helpers.processes import fork

from jaxqkv.architectures.activations import FIELDS
from jaxqkv.cli.main import main
from jaxqkv.errors import JaxqkvError
from jaxqkv.model import microbatches
from jaxqkv.runtime import devices

# Sizes that a mesh of head=2 divides, and no two the same.
# Weights of moderate size: with large ones a softmax makes much of the last bit.
SIZES = {"n_embd": 42, "n_head": 6, "n_inner": 34, "initializer_range": 0.1}
EIGHT = {"XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"])}

RUN = """
import json, sys
from pathlib import Path

import jax, numpy as np
import jaxqkv
from jaxqkv import edits, metrics
from jaxqkv.architectures.activations import FIELDS
from jaxqkv.cli.main import main
from jaxqkv.runtime import devices

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
base, shapes, line, EDIT = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
assert len(jax.devices()) == 8
reduce = lambda a, mask, extra: (a.scores.max(axis=(2, 3)), extra * 2)
metric = metrics.of_hidden(lambda hidden: hidden[:, 3])

def computed(model, batch, extra, parts):
    acts = model.run(batch, capture=(*FIELDS, "hidden"))
    results = {name: np.asarray(getattr(acts, name)) for name in (*FIELDS, "hidden")}
    if "stream" in parts:
        results["stream"] = np.asarray(model.hidden(batch))
    if "reduce" in parts:
        results["largest"], results["extra"] = map(np.asarray, model.run(batch, reduce=reduce, inputs=extra, layers=0))
    if "cut" in parts:
        results["cut"], _ = map(np.asarray, model.run(batch, reduce=reduce, inputs=extra, layers=0, memory=1))
    if "edit" in parts:
        edit = eval(EDIT, {"edits": edits, "donor": acts})
        edited = model.run(batch, capture={"z", "hidden"}, edit=edit)
        results |= {"edited": np.asarray(edited.z), "edited_hidden": np.asarray(edited.hidden)}
    for method in {"exact", "gradient"} & set(parts):
        results[method] = model.sweep(batch, edits.zero, metric, per_text=True, method=method)
    return results

for folder in sorted(base.glob("checkpoint-*")):
    given = np.load(folder / "inputs.npz")
    batch = jaxqkv.Batch(ids=given["ids"], mask=given["mask"], token_types=np.zeros_like(given["ids"]))
    alone = {"edit", "exact", "gradient"} & {part for _, parts in shapes[folder.name] for part in parts}
    np.savez(folder / "alone.npz", **computed(jaxqkv.load(folder), batch, given["extra"], alone))
    for number, (shape, parts) in enumerate(shapes[folder.name]):
        mesh = devices.make_mesh(**shape)
        model = jaxqkv.load(folder, mesh=mesh)
        # What the compiler is given is split, not copied: by head, and by the batch.
        kernel = model.params()["layers"][0]["attn"]["q"]["kernel"]
        assert kernel.addressable_shards[0].data.shape[1] * mesh.shape["head"] == kernel.shape[1]
        placed = devices.place_batch(given["ids"], mesh)
        assert placed.addressable_shards[0].data.shape[0] * mesh.shape["data"] == placed.shape[0]
        np.savez(folder / f"{number}.npz", **computed(model, batch, given["extra"], parts))

# A reducer whose result has no batch: its shape, and what is said where the batch is filled up.
model = jaxqkv.load(folder, mesh=devices.make_mesh(4))
ids = np.ones((8, 5), np.int32)
reduce = lambda a, mask: a.scores.max()
said = {"shape": model.run(ids, reduce=reduce, layers=0).shape}
try:
    model.run(ids[:7], reduce=reduce, layers=0)
except jaxqkv.JaxqkvError as error:
    said["error"] = str(error)
(base / "said.json").write_text(json.dumps(said))

for name, more in (("one", []), ("eight", ["--mesh", "data=4,head=2"])):
    assert main([*line, *more, "--out", str(base / name)]) == 0
"""
# Of heads on several devices, with arrays of the batch.
EDIT = """{
    "z": [
        edits.replace(donor, [(1, 2), (2, 5)], positions=[5, 3], source=[6, 8]),
        edits.zero((0, 4), positions=[[6]] * 11),
    ],
    "scores": [edits.noise(1, 0.3, [(0, 1), (1, 3)]), edits.mean([(2, 0)])],
    "pattern": edits.zero([(1, 1)], keys=[5], renormalise=True),
    "v": edits.permute(2, layers=2),
    "mlp_out": lambda value, site: value * 0.5,
}"""
# Of five sequences on a mesh of data=4, the last part has nothing but what fills the batch up.
STUDY = ["figures", "token-frequency", "--arrays-only", "--no-cache", "--tokens", "300"]
STUDY += ["--batch", "5", "--length", "37", "--significance", "--permutations", "29"]
# What is computed besides all activations, and the names of its arrays: `Model.hidden`, reductions without and with
# microbatches, edits, and sweeps by both methods.
PARTS = {
    "stream": ["stream"],
    "reduce": ["largest", "extra"],
    "cut": ["cut"],
    "edit": ["edited", "edited_hidden"],
    "exact": ["exact"],
    "gradient": ["gradient"],
}
# On a mesh with both axes, everything of one architecture, and the activations of the others, whose weights are split
# by the same rules. The batch alone, where 11 sequences are filled up to 14 and, cut to fit a limit of memory, 4 to 7;
# and the heads alone.
BOTH = {"data": 4, "head": 2}
MESHES = {
    "gpt2": [
        (BOTH, ["stream", "reduce", "edit", "exact", "gradient"]),
        ({"data": 7}, ["cut"]),
        ({"data": 1, "head": 2}, []),
    ],
    "bert": [(BOTH, [])],
    "roberta": [(BOTH, [])],
    "distilbert": [(BOTH, [])],
}


def inputs(config, size):
    """Sequences with pads on both sides, and an array of the batch's own."""
    mask = np.ones((size, 13), bool)
    mask[1, :4] = mask[2, 9:] = False
    extra = np.random.default_rng(5).integers(0, 1000, (size, 3)).astype(np.int32)
    return {"ids": random_ids(config, size, 13), "mask": mask, "extra": extra}


def write_texts(path):
    """Documents of 37 to 60 words, of which the first are frequent."""
    generator = np.random.default_rng(3)
    sizes = generator.integers(37, 61, 23)
    texts = [" ".join(f"w{5 + int(38 * u**2)}" for u in generator.random(size)) for size in sizes]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A folder with what a process of eight devices computed of every architecture, and with the study's figures."""
    base = tmp_path_factory.mktemp("eight")
    for name, config in CONFIGS.items():
        config = changed(config, **SIZES)
        folder = write_folder(base / f"checkpoint-{name}", config)
        np.savez(folder / "inputs.npz", **inputs(config, 11))
    shapes = {f"checkpoint-{name}": meshes for name, meshes in MESHES.items()}
    words = write_checkpoint_of_words(base / "words", changed(CONFIGS["bert"], **SIZES, n_positions=37))
    line = [*STUDY, "--model", str(words), "--corpus", str(write_texts(base / "texts.jsonl"))]
    arguments = [str(base), json.dumps(shapes), json.dumps(line), EDIT]
    done = fork(RUN, *arguments, env=EIGHT).completed(timeout=300)
    assert done.returncode == 0, done.stderr
    return base


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_eight_devices_give_the_numbers_of_one(name, eight):
    """Eleven sequences, which divide evenly among none of them."""
    folder = eight / f"checkpoint-{name}"
    expected, extra = arrays_of(folder / "alone.npz"), arrays_of(folder / "inputs.npz")["extra"]
    largest = expected["scores"][:1].max(axis=(3, 4))  # reductions are those of the first layer
    expected |= {"stream": expected["hidden"], "largest": largest, "cut": largest}
    expected["extra"] = extra[None] * 2
    for number, (shape, parts) in enumerate(MESHES[name]):
        results = arrays_of(folder / f"{number}.npz")
        assert results.keys() == {*FIELDS, "hidden", *(field for part in parts for field in PARTS[part])}
        for field, values in results.items():
            right = expected[field]
            assert values.shape == right.shape
            limit = 0 if field == "extra" else MODEL_LIMIT * np.abs(right).max()
            np.testing.assert_allclose(values, right, rtol=0, atol=limit, err_msg=f"{field} on {shape}")


@pytest.mark.slow
def test_the_study_on_eight_devices(eight):
    """Every array of token-frequency, counts exactly."""
    one, many = (eight / name / "token-frequency" for name in ("one", "eight"))
    assert json.loads((many / "manifest.json").read_text())["mesh"] == {"data": 4, "head": 2}
    assert assert_same_figures(one, many) == 10


@pytest.mark.slow
def test_a_reducer_without_the_batch_is_refused_where_pads_would_count(eight):
    said = json.loads((eight / "said.json").read_text())
    assert said["shape"] == [1]
    assert "filled up for the mesh" in said["error"]


def test_padding_is_cut_off_by_one_program_for_all_fields():
    fields = {"q": np.arange(84.0).reshape(4, 3, 7), "z": np.arange(20).reshape(4, 5), "left out": None}
    before = microbatches._cut_to._cache_size()
    found = microbatches.first(3, fields, 2)
    assert microbatches._cut_to._cache_size() == before + 1
    assert found["left out"] is None
    for name in ("q", "z"):
        np.testing.assert_array_equal(found[name], fields[name][:3])
    assert microbatches.first(4, fields, 2) is fields


def test_meshes_that_cannot_be():
    count = len(jax.local_devices())
    with pytest.raises(JaxqkvError, match=f"data=9, head=2 needs 18 devices; here are {count} cpu"):
        devices.make_mesh(9, 2)
    mesh = devices.make_mesh(1)
    assert dict(mesh.shape) == {"data": 1, "head": 1}
    with pytest.raises(JaxqkvError, match="head=2 cannot split 5 heads evenly"):
        devices.check_split(2, 5, 8)
    with pytest.raises(JaxqkvError, match="head=2 cannot split 29 hidden"):
        devices.check_split(2, 4, 29)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "data=2,data=3"], "data=2,data=3 is not like data=4,head=2"),
        (["--mesh", "rows=2"], "rows=2 is not like data=4,head=2"),
        (["--devices", "0"], "0 is not a whole number from 1 up"),
        (["--devices", "64"], "needs 64 devices"),
        (["--devices", "2", "--mesh", "data=2"], "exclude each other"),
    ],
)
def test_bad_meshes_on_the_command_line(arguments, message, tmp_path, capsys):
    line = ["figures", "token-frequency", "--demo", "--out", str(tmp_path), *arguments]
    try:
        status = main(line)
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    assert message in capsys.readouterr().err
