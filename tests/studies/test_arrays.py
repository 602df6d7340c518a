"""Names and axes of a figure's arrays, and that the tests would notice arrays that differ from them."""

import numpy as np
import pytest
from helpers.axes import check_arrays

from jaxqkv.studies import registry
from jaxqkv.studies.arrays import FigureArrays
from jaxqkv.studies.study import FigureSpec


def declared(text):
    return [(each.name, each.axes, each.condition) for each in FigureArrays(text).declared]


def test_names_share_axes():
    assert declared("edges [edge], mean, std [layer, qkv], r []") == [
        ("edges", ("edge",), ""),
        ("mean", ("layer", "qkv"), ""),
        ("std", ("layer", "qkv"), ""),
        ("r", (), ""),
    ]


def test_conditions_and_capitals():
    text = "counts_MATRIX_SIDE [bin]; MATRIX: q, k; SIDE: in, out; with --test: p [layer]; with more: *_NAME"
    assert declared(text) == [
        *((f"counts_{name}", ("bin",), "") for name in ("q_in", "q_out", "k_in", "k_out")),
        ("p", ("layer",), "with --test"),
        *((f"counts_{name}_NAME", ("bin",), "with more") for name in ("q_in", "q_out", "k_in", "k_out")),
        ("p_NAME", ("layer",), "with more"),
    ]


def test_capitals_stand_for_text_and_layers_for_numbers():
    arrays = FigureArrays("edges_LAYER [edge], mean_NAME [layer, qkv]")
    assert arrays.axes(["edges_12", "edges_1.2", "edges", "mean_a_b (2)", "mean_"]) == {
        "edges_12": ("edge",),
        "mean_a_b (2)": ("layer", "qkv"),
    }
    assert arrays.find("mean_a_b").match("mean_a_b") == ("a_b",)


def test_the_narrowest_name_counts():
    arrays = FigureArrays("p [layer]; with more: *_NAME; with sums: p_sum, p_sum_NAME []")
    assert arrays.axes(["p_sum_x", "p_sum", "p_su", "p"]) == {
        "p_sum_x": (),
        "p_sum": (),
        "p_su": ("layer",),
        "p": ("layer",),
    }


@pytest.mark.parametrize(
    "text", ["", "x", "x [a", "x [a]]", "x[a]", "x [a] y [b]", "x [a];y [b]", "x [a]; y [b]", "x [a],", "*_NAME"]
)
def test_other_forms_are_refused(text):
    with pytest.raises(ValueError, match="the form is"):
        FigureArrays(text)


TEXT = "edges [edge], d [layer, qkv, bin], c_SIDE [bin], e_SIDE [edge], w [qkv·head, layer+1]; SIDE: a, b; if: p [a/b]"
GOOD = {"edges": (6,), "d": (7, 3, 5), "c_a": (11,), "e_a": (12,), "c_b": (13,), "e_b": (14,), "w": (33, 8), "p": (2,)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"p": None}, None),
        ({"d": None}, "{'d'} are declared and not there"),
        ({"q": (3,)}, r"q \(3,\) is not declared"),
        ({"d": (7, 3)}, r"d \(7, 3\) has not the axes"),
        ({"d": (7, 4, 5)}, "qkv is 4, not 3"),
        ({"edges": (5,)}, "edge is 5, not 6"),
        ({"e_b": (12,)}, "edge is 12, not 14"),
        ({"w": (33, 9)}, r"layer\+1 is 9, not 8"),
        ({"p": (3,)}, "a/b is 3, not 2"),
    ],
)
def test_the_check_of_every_test(change, message):
    arrays = {name: np.zeros(shape) for name, shape in (GOOD | change).items() if shape is not None}
    spec = FigureSpec("1", "one", FigureArrays(TEXT), lambda run: None)
    if message is None:
        check_arrays(spec, arrays)
    else:
        with pytest.raises(AssertionError, match=message):
            check_arrays(spec, arrays)


def test_the_same_axis_in_two_arrays():
    spec = FigureSpec("1", "one", FigureArrays("x [layer], y [layer·head, head]"), lambda run: None)
    check_arrays(spec, {"x": np.zeros(7), "y": np.zeros((35, 5))})
    with pytest.raises(AssertionError, match="layer·head is 36, not 35"):
        check_arrays(spec, {"x": np.zeros(7), "y": np.zeros((36, 5))})
    spec = FigureSpec("1", "one", FigureArrays("x, y [layer]"), lambda run: None)
    with pytest.raises(AssertionError, match="layer is 7 elsewhere"):
        check_arrays(spec, {"x": np.zeros(7), "y": np.zeros(5)})


# Axes of the studies' figures without their lengths: a new one must be a word that readers know, or is named here.
WORDS = {
    *("layer", "shown_layer", "head", "query", "key", "pos", "embed", "head_dim", "vocab", "batch", "qkv", "qk"),
    *("bin", "edge", "softmax_bin", "softmax_edge", "edge_count", "pair", "value", "score", "weight", "permutation"),
    *("earlier_layer", "earlier_head", "later_layer", "later_head", "component", "dimension", "row", "column"),
    *("sentence", "word", "occurrence", "tensor", "model", "size"),
}


def test_axes_have_the_same_names_in_all_studies():
    axes = {axis for study in registry.studies() for spec in study.figures.values()
            for each in spec.arrays.declared for axis in each.axes if "/" not in axis}  # fmt: skip
    assert {word.removesuffix("+1").removesuffix("-1") for axis in axes for word in axis.split("·")} == WORDS
