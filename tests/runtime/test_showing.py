"""What objects say of themselves: names, shapes, dtypes and sizes, whatever they hold, and never a number."""

import re
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BERT, GPT2, random_ids, write_folder
from flax import struct
from jaxtyping import Array, Float, Int

import jaxqkv
from jaxqkv.runtime import showing


class Cells(HTMLParser):
    """The texts of a table's cells, row by row; every tag must be closed in its turn."""

    def __init__(self, page):
        super().__init__()
        self.rows, self.open, self.caption = [], [], ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] == "caption":
            self.caption += data


@pytest.fixture
def activations():
    shapes = {"q": (2, 2, 5, 13, 7), "pattern": (2, 2, 5, 13, 13), "mlp_out": (2, 2, 13, 35)}
    fields = {name: jnp.asarray(np.ones(shape, np.float32)) for name, shape in shapes.items()}
    return jaxqkv.Activations(mask=np.ones((2, 13), bool), layers=(0, 2), **fields)


def test_activations(activations):
    lines = str(activations).splitlines()
    # 2·2·5·13·7 numbers of q, 2·2·5·13·13 of the pattern and 2·2·13·35 of the MLP, four bytes each.
    assert lines[0] == "Activations of layers 0, 2: 0.028 MB"
    assert [re.split(" {2,}", line)[1:] for line in lines[1:]] == [
        ["mask", "[batch=2, pos=13]", "bool", "< 0.001 MB"],
        ["q", "[layer=2, batch=2, head=5, pos=13, head_dim=7]", "float32", "0.007 MB"],
        ["pattern", "[layer=2, batch=2, head=5, query=13, key=13]", "float32", "0.014 MB"],
        ["mlp_out", "[layer=2, batch=2, pos=13, embed=35]", "float32", "0.007 MB"],
    ]


def test_activations_in_a_notebook(activations):
    page = Cells(activations._repr_html_())
    assert page.caption == "Activations of layers 0, 2: 0.028 MB"
    assert page.rows[0] == ["field", "shape", "dtype", "MB"]
    assert [row[0] for row in page.rows[1:]] == ["mask", "q", "pattern", "mlp_out"]
    assert page.rows[3] == ["pattern", "[layer=2, batch=2, head=5, query=13, key=13]", "float32", "0.014"]


def test_no_colour_of_its_own(activations, gpt2_model):
    """Light and dark pages keep theirs; nothing is fetched."""
    for each in (activations, gpt2_model, gpt2_model.weights, gpt2_model.checkpoint):
        styles = re.findall(r'style="([^"]*)"', each._repr_html_())
        assert styles
        assert not [style for style in styles if re.search(r"(?<!-)color:|background", style)]
        assert not re.search(r"<script|<style|src=|href=", each._repr_html_())


def test_one_layer_and_a_batch():
    batch = jaxqkv.Batch(
        ids=random_ids(GPT2, 3, 11), mask=np.ones((3, 11), bool), token_types=np.zeros((3, 11), np.int32)
    )
    assert str(batch).splitlines()[1].split() == ["ids", "[batch=3,", "pos=11]", "int32", "<", "0.001", "MB"]
    attention = jaxqkv.Attention(v=jnp.zeros((3, 5, 11, 7)))
    assert str(attention).splitlines() == [
        "Attention: 0.005 MB",
        "  v  [batch=3, head=5, pos=11, head_dim=7]  float32  0.005 MB",
    ]


def test_nothing_at_all():
    assert str(jaxqkv.Attention()) == "Attention: 0.000 MB"
    assert Cells(jaxqkv.Attention()._repr_html_()).rows == [["field", "shape", "dtype", "MB"]]


def test_the_numbers_are_not_looked_at(activations):
    shown = str(activations), activations._repr_html_()
    for array in (activations.q, activations.pattern):
        array.delete()
        with pytest.raises(RuntimeError, match="deleted"):
            np.asarray(array)
    assert (str(activations), activations._repr_html_()) == shown


@struct.dataclass
class Pair(showing.Arrays):
    """A struct that is not checked as the package's are under test, so that anything can be put in it."""

    __repr__ = showing.Arrays.__repr__

    one: Float[Array, "row column"] | None
    other: Float[Array | np.ndarray, "row column"] | Int[Array, " elsewhere"] | None = None
    setting: str = struct.field(pytree_node=False, default="")


def test_inside_jit_vmap_and_tree_transformations(activations):
    seen = []

    def look(struct):
        seen.append((str(struct), struct._repr_html_()))
        return jax.tree.leaves(struct)[0]

    jax.jit(look)(activations)
    assert seen.pop() == (str(activations), activations._repr_html_())
    pair = Pair(one=jnp.zeros((3, 7)), other=jnp.ones((3, 5)), setting="x")
    jax.grad(lambda pair: look(pair).sum())(pair)
    assert seen.pop()[0].splitlines()[1:] == [
        "  one    [row=3, column=7]  float32  < 0.001 MB",
        "  other  [row=3, column=5]  float32  < 0.001 MB",
    ]
    jax.vmap(look)(pair)
    assert seen.pop()[0].splitlines()[1].split() == ["one", "[7]", "float32", "<", "0.001", "MB"]  # no axis is named
    shapes = jax.eval_shape(lambda pair: pair, pair)
    assert str(shapes) == str(pair)
    for leaf, shown in ((None, ["Pair: 0.000 MB"]), (3, ["Pair: 0.000 MB", "  one    int    0.000 MB"])):
        lines = str(jax.tree.map(lambda _: leaf, pair)).splitlines()  # noqa: B023
        assert lines[:2] == shown


def test_they_are_pytrees_still(activations):
    leaves, structure = jax.tree.flatten(activations)
    assert len(leaves) == 4
    again = jax.tree.unflatten(structure, leaves)
    assert again.layers == (0, 2)
    assert again.q is activations.q
    assert activations.replace(q=None).q is None
    with pytest.raises(AttributeError):
        activations.q = None


def test_bfloat16(gpt2_model):
    model = jaxqkv.load(gpt2_model.checkpoint, dtype=jnp.bfloat16)
    assert "in bfloat16" in str(model)
    assert model.checkpoint is gpt2_model.checkpoint
    half = jaxqkv.Attention(q=jnp.zeros((2, 5, 3, 7), jnp.bfloat16))
    assert str(half).splitlines()[1] == "  q  [batch=2, head=5, pos=3, head_dim=7]  bfloat16  < 0.001 MB"


def test_model_weights_and_checkpoint(model, config):
    kind = config.model_type
    count = sum(tensor.parameters for tensor in model.weights.inventory())
    tensors = len(model.checkpoint.shapes)
    spec, size = model.checkpoint.spec, f"{count * 4 / 1e6:.3f}"
    assert str(model).splitlines() == [
        f"Model {spec}: {kind}, 3 layers, 5 heads of 7, 43 tokens, 17 positions",
        f"  {count:,} parameters, {size} MB; in float32, layers kept between runs",
    ]
    described = f"{spec}: {kind}, 3 layers, 5 heads of 7"
    assert str(model.weights) == f"Weights of {described}; {count:,} parameters, {size} MB in float32"
    assert str(model.checkpoint) == f"Checkpoint {described}; {tensors} tensors"
    assert dict(Cells(model._repr_html_()).rows)["parameters"] == f"{count:,}"
    assert dict(Cells(model.checkpoint._repr_html_()).rows)["tensors"] == f"{tensors}, F32"
    assert "layers read at every run" in str(jaxqkv.load(model.checkpoint, stream=True))


def test_the_table_of_weights_holds_every_tensor_once(model, config):
    rows = Cells(model.weights._repr_html_()).rows[1:]
    names = []
    for name, *_ in rows:
        name, _, times = name.partition(" (× ")
        assert times in ("", "3)")
        names += [name.replace("*", str(layer)) for layer in range(3)] if times else [name]
    assert sorted(names) == sorted(model.weights.names)
    row = {"gpt2": "h.*.mlp.c_fc.weight (× 3)", "bert": "encoder.layer.*.intermediate.dense.weight (× 3)"}
    shape = {"gpt2": "[35, 29]", "bert": "[29, 35]"}[config.model_type]
    expected = [row[config.model_type], "Feed Forward", shape, "float32", f"{3 * 35 * 29 * 4 / 1e6:.3f}"]
    assert expected in rows


@pytest.mark.parametrize("config", [GPT2, BERT], ids=["gpt2", "bert"])
def test_what_comes_from_outside_is_escaped(tmp_path, config):
    model = jaxqkv.load(write_folder(tmp_path / "<script>alert(1)<" / "b&c", config))
    for each in (model, model.weights, model.checkpoint):
        page = each._repr_html_()
        assert "<script>" not in page
        assert "&lt;script&gt;alert(1)&lt;/b&amp;c" in page


def test_ranges():
    for numbers, words in {(): "", (4,): "4", (0, 1): "0, 1", (0, 1, 2, 5, 7, 8, 9): "0–2, 5, 7–9"}.items():
        assert showing.ranges(numbers) == words


def test_megabytes():
    sizes = {0: "0.000", 999: "< 0.001", 1000: "0.001", 123_456: "0.123", 1_000_000: "1.0", 6_400_000_000: "6,400.0"}
    assert {size: showing.megabytes(size) for size in sizes} == sizes
