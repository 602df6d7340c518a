"""What a change costs: a kernel, a study and an architecture from outside the package, each in a few lines."""

import dataclasses
import json
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GPT2, arrays_of, figures_of, random_ids, random_tensors, write_folder, write_word_tokenizer
from helpers.checkpoints import WORDS

import jaxqkv
from jaxqkv.architectures import REGISTRY
from jaxqkv.architectures.activations import FIELDS
from jaxqkv.architectures.gpt2 import GPT2Config
from jaxqkv.cli.main import main
from jaxqkv.errors import CheckpointError, JaxqkvError
from jaxqkv.figures.displays import Display
from jaxqkv.figures.panels import Line, Lines
from jaxqkv.runtime.devices import jit
from jaxqkv.studies import registry
from jaxqkv.studies.opening import open_weights
from jaxqkv.studies.options import Options, option
from jaxqkv.studies.study import Run, Study

# --- a kernel ---


@jit
def participation_ratio(x):
    """Returns (Σσ²)² / Σσ⁴ of a matrix's singular values σ: of how many directions it is made."""
    gram = x.T @ x
    return jnp.trace(gram) ** 2 / (gram**2).sum()


# --- a study of one figure, with an option of its own ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class DirectionsOptions(Options):
    """Options of `directions`."""

    matrix: str = option("V", "matrix of each layer", choices=("Q", "K", "V"))


DIRECTIONS = Study("directions", "Directions of the weights", ("gpt2",), "demo-gpt2", DirectionsOptions)


@DIRECTIONS.computation
class DirectionsRun(Run):
    def __init__(self, options, folder=None):
        (self.weights,) = open_weights(options, DIRECTIONS)
        self.matrix = options.matrix

    def describe(self):
        return {"checkpoint": [self.weights.checkpoint.identity()]}

    def compute(self, names):
        read = getattr(self.weights, f"W_{self.matrix}")
        layers = range(self.weights.config.n_layer)
        return {"ratios": np.array([participation_ratio(read(layer)) for layer in layers])}


@DIRECTIONS.define("1", "participation ratio by layer", "ratio [layer]")
def figure_1(run, ratios):
    line = Line(x=np.arange(len(ratios)), y=ratios)
    panel = Lines(lines=[line], xlabel="Layer", ylabel="Participation ratio")
    return Display(arrays={"ratio": ratios}, panels=[[panel]], caption=f"W_{run.matrix}.", size=(6, 3))


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setattr(registry, "_added", {})
    registry.add(DIRECTIONS)


def ratios(tensors, matrix):
    """By singular values, in float64."""
    place = "QKV".index(matrix)
    found = []
    for layer in range(GPT2.n_layer):
        wide = tensors[f"h.{layer}.attn.c_attn.weight"].astype(np.float64)
        squares = np.linalg.svd(wide[:, 35 * place : 35 * (place + 1)], compute_uv=False) ** 2
        found.append(squares.sum() ** 2 / (squares**2).sum())
    return found


def test_a_study(added, tmp_path, capsys):
    folder = write_folder(tmp_path / "tiny", GPT2)
    tensors = random_tensors(GPT2)
    for matrix, more in (("V", []), ("K", ["--matrix", "K"])):
        arrays = figures_of("directions", tmp_path, folder, *more)
        np.testing.assert_allclose(arrays["1"]["ratio"], ratios(tensors, matrix), rtol=1e-5)
    figure = DIRECTIONS.figure("1", model=folder, matrix="Q", dpi=40)
    np.testing.assert_allclose(figure.arrays["ratio"], ratios(tensors, "Q"), rtol=1e-5)
    assert figure.caption == "W_Q."
    with pytest.raises(JaxqkvError, match="matrix is one of Q, K, V, not 'O'"):
        DIRECTIONS.figure("1", model=folder, matrix="O")
    line = ["figures", "directions", "1", "--model", str(folder), "--dpi", "40", "--out", str(tmp_path / "out")]
    assert main(line) == 0
    assert (tmp_path / "out" / "directions" / "1.png").read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((tmp_path / "out" / "directions" / "manifest.json").read_text())
    assert manifest["command"].startswith("jaxqkv figures directions 1 --model")
    assert manifest["figures"]["1"]["arrays"] == {"ratio": ["layer"]}
    assert 'id="directions-1"' in (tmp_path / "out" / "index.html").read_text()
    capsys.readouterr()
    assert main(["list", "directions"]) == 0
    *_, title, arrays = capsys.readouterr().out.splitlines()
    assert title.split() == ["directions", "1", *["participation", "ratio", "by", "layer"]]
    assert arrays.strip() == "ratio [layer]"
    with pytest.raises(SystemExit):
        main(["figures", "directions", "--help"])
    assert "--matrix {Q,K,V}" in capsys.readouterr().out


# --- an architecture: GPT-2 whose heads are of a width that its files say ---


@dataclasses.dataclass(frozen=True)
class WideHeads(GPT2Config):
    head_dim: int = dataclasses.field(kw_only=True)

    model_type = "gpt2-wide"
    keys: ClassVar = GPT2Config.keys | {"head_dim": "head_dim"}


WIDE = WideHeads(**dataclasses.asdict(GPT2), head_dim=11)
HEADS, INNER = 5, 55


@pytest.fixture
def wide(monkeypatch, tmp_path):
    """A checkpoint of that architecture."""
    monkeypatch.setattr(REGISTRY, "architectures", dict(REGISTRY.architectures))
    REGISTRY.add(WideHeads)
    return write_folder(tmp_path / "wide", WIDE)


def test_the_config_of_an_architecture(wide):
    data = json.loads((wide / "config.json").read_text())
    assert data["head_dim"] == 11
    assert REGISTRY.parse(data, "here") == WIDE
    assert (WIDE.head_dim, WIDE.attention_width, GPT2.head_dim, GPT2.attention_width) == (11, INNER, 7, 35)
    with pytest.raises(CheckpointError, match=r"here: head_dim is missing; add it to config\.json"):
        REGISTRY.parse({key: value for key, value in data.items() if key != "head_dim"}, "here")
    with pytest.raises(CheckpointError, match="here: head_dim = 0 is not a positive integer"):
        REGISTRY.parse(data | {"head_dim": 0}, "here")


def test_attention_of_an_architecture(wide):
    """Each intermediate from the tensors of the file, in float64."""
    ids = random_ids(WIDE, 2, 13)
    acts = jaxqkv.load(wide).run(ids, capture=FIELDS)
    tensors = {key: values.astype(np.float64) for key, values in random_tensors(WIDE).items()}
    x = tensors["wte.weight"][ids] + tensors["wpe.weight"][:13]
    for layer in range(WIDE.n_layer):
        np.testing.assert_allclose(acts.resid_pre[layer], x, atol=2e-5 * np.abs(x).max())
        of = {
            key.removeprefix(f"h.{layer}."): values for key, values in tensors.items() if key.startswith(f"h.{layer}.")
        }

        def norm(x, name, of=of):
            centred = x - x.mean(-1, keepdims=True)
            return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * of[f"{name}.weight"] + of[f"{name}.bias"]

        wide_qkv = norm(x, "ln_1") @ of["attn.c_attn.weight"] + of["attn.c_attn.bias"]
        q, k, v = wide_qkv.reshape(2, 13, 3, HEADS, 11).transpose(2, 0, 3, 1, 4)
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(11)
        seen = np.where(np.tril(np.ones((13, 13), bool)), scores, -np.inf)
        pattern = np.exp(seen - seen.max(-1, keepdims=True))
        pattern /= pattern.sum(-1, keepdims=True)
        z = pattern @ v
        attn_out = z.swapaxes(1, 2).reshape(2, 13, INNER) @ of["attn.c_proj.weight"] + of["attn.c_proj.bias"]
        middle = x + attn_out
        up = norm(middle, "ln_2") @ of["mlp.c_fc.weight"] + of["mlp.c_fc.bias"]
        gelu = up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))) / 2
        mlp_out = gelu @ of["mlp.c_proj.weight"] + of["mlp.c_proj.bias"]
        values = {"q": q, "k": k, "v": v, "scores": scores, "pattern": pattern, "z": z}
        for name, expected in (values | {"attn_out": attn_out, "mlp_out": mlp_out}).items():
            found = np.asarray(getattr(acts, name)[layer])
            np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5 * np.abs(expected).max(), err_msg=name)
        x = middle + mlp_out


def test_studies_of_an_architecture(wide, tmp_path, capsys):
    write_word_tokenizer(wide, [*WORDS, *(f" w{number}" for number in range(36))])
    (tmp_path / "sentences.txt").write_text("a cat saw her\na run her home\n")
    tensors = random_tensors(WIDE)
    weights = figures_of("qkv-weights", tmp_path, wide, "1", "2a", "2d")
    attention = sum(values.size for key, values in tensors.items() if ".attn." in key)
    assert weights["1"]["head_dim"] == [11]
    assert weights["1"]["attention_parameters"] * 1e6 == pytest.approx(attention)
    np.testing.assert_array_equal(weights["2a"]["weights"], tensors["h.1.attn.c_attn.weight"])
    v = tensors["h.2.attn.c_attn.weight"][:, 2 * INNER :].astype(np.float64)
    assert weights["2d"]["mean"][2, 2] == pytest.approx(v.mean(), rel=1e-4)
    assert weights["2d"]["std"][2, 2] == pytest.approx(v.std(ddof=1), rel=1e-4)
    of_attention = ("weights", "pca-variance", "layer-statistics", "row-variance", "query-heads", "head-clusters")
    tour = figures_of("weight-tour", tmp_path, wide, *of_attention)
    queries = tensors["h.0.attn.c_attn.weight"][:, :INNER].reshape(35, HEADS, 11).swapaxes(0, 1)
    np.testing.assert_array_equal(tour["query-heads"]["heads"], queries.reshape(HEADS, -1))
    text = "a cat saw her run"
    model = jaxqkv.load(wide)
    q = model.run(model.tokenize(text), capture={"q"}).q
    scores = figures_of("attention-scores", tmp_path, wide, "3", "--text", text)
    np.testing.assert_allclose(scores["3"]["q"], q[1, 0], atol=1e-5)
    similar = figures_of("token-similarity", tmp_path, wide, "means", "--sentences", str(tmp_path / "sentences.txt"))
    assert similar["means"]["mean"].shape == (3 * INNER,)
    capsys.readouterr()
    assert main(["info", str(wide)]) == 0
    assert "gpt2-wide, 3 layers, 5 heads of 11" in capsys.readouterr().out
    assert arrays_of(tmp_path / "out" / "qkv-weights" / "2a.npz")["weights"].shape == (35, 3 * INNER)
