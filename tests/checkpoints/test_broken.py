"""Broken checkpoints where they are read: every one is refused in words, or its values are named."""

import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import GPT2, write_folder, write_word_tokenizer
from helpers.broken import CHECKPOINTS, SPOILT, TOKENIZERS, WORDS, spoil, tensors

import jaxqkv
from jaxqkv.checkpoints.weights import Weights, count_broken
from jaxqkv.errors import CheckpointError, JaxqkvError, JaxqkvWarning


@pytest.fixture(scope="session")  # so that the tests need not stay in one worker
def sound(tmp_path_factory):
    return write_word_tokenizer(write_folder(tmp_path_factory.mktemp("sound") / "model", GPT2), WORDS)


@pytest.fixture
def place(sound, tmp_path, monkeypatch):
    """A folder to be in, with a checkpoint named `model`."""
    shutil.copytree(sound, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("what", CHECKPOINTS)
def test_broken_checkpoint(place, what):
    """The same is said of the weights alone and of the model."""
    damage, message = CHECKPOINTS[what]
    damage(place / "model")
    for read in (lambda spec: Weights(jaxqkv.open_checkpoint(spec)), jaxqkv.load):
        with pytest.raises(CheckpointError) as error:
            read("./model")
        assert message in str(error.value)
        assert str(error.value).isprintable()


@pytest.mark.parametrize("what", TOKENIZERS)
def test_broken_tokenizer(place, what):
    damage, message = TOKENIZERS[what]
    damage(place / "model")
    with pytest.raises(JaxqkvError) as error:
        jaxqkv.load("./model").tokenize("I saw her cat")
    assert message in str(error.value)
    assert str(error.value).isprintable()


class TestNotFinite:
    """The library's warnings: of what was used, once, and with the right results beside."""

    def test_what_comes_before_is_as_it_was(self, place):
        clean = jaxqkv.load("./model").run([[1, 2, 3]])
        tensors(spoil)(place / "model")
        with pytest.warns(JaxqkvWarning) as caught:
            spoilt = jaxqkv.load("./model").run([[1, 2, 3]])
        assert [str(each.message) for each in caught] == [SPOILT]
        np.testing.assert_array_equal(spoilt.q[0], clean.q[0])
        assert np.isnan(spoilt.q[1]).any()

    @pytest.mark.parametrize(
        ("key", "place_of", "size"),
        [
            ("wte.weight", (2, 3), "1,505"),
            ("wpe.weight", (1, 3), "595"),
            ("h.0.ln_1.bias", (3,), "35"),
            ("h.1.mlp.c_proj.weight", (3, 5), "1,015"),
            ("h.2.attn.c_attn.weight", (3, 5), "3,675"),
            ("h.2.mlp.c_fc.weight", (3, 5), "1,015"),
        ],
    )
    def test_each_place_is_named_once(self, place, key, place_of, size):
        tensors(lambda t: t[key].__setitem__(place_of, np.inf))(place / "model")
        model = jaxqkv.load("./model")
        with pytest.warns(JaxqkvWarning, match=rf"model.safetensors: NaN .* in {key} \(1 of {size}\)$"):
            model.run([[1, 2, 3]])
        model.run([[1, 2, 3]])  # warnings are errors

    def test_what_is_not_used_is_not_named(self, place):
        def change(t):
            t["h.1.attn.c_attn.weight"][3, 5] = t["wte.weight"][7, 3] = np.nan

        tensors(change)(place / "model")
        model = jaxqkv.load("./model")
        assert np.isfinite(model.run([[1, 2, 3]], layers=0).q).all()
        with pytest.warns(JaxqkvWarning, match=r"in wte.weight \(1 of"):
            model.run([[1, 2, 7]], layers=0)
        with pytest.warns(JaxqkvWarning, match=r"in h.1.attn.c_attn.weight \(1 of"):
            model.hidden([[1, 2, 3]])

    @pytest.mark.parametrize("layers", [None, [2], [1]])
    def test_a_loop_over_layers_that_is_left_hears_of_what_it_was_given(self, place, layers):
        """Said before the layer is handed out, or the first one after it, and of each layer once."""
        key = "h.0.mlp.c_proj.weight"
        tensors(lambda t: t[key].__setitem__((3, 5), np.nan))(place / "model")
        model = jaxqkv.load("./model")
        loop = model.layerwise([[1, 2, 3]], layers=layers)
        with pytest.warns(JaxqkvWarning, match=rf"NaN or infinite values in {key} \(1 of 1,015\)$") as caught:
            next(loop)
        assert len(caught) == 1
        for _ in loop:  # warnings are errors
            pass

    def test_a_loop_over_sound_layers_looks_at_no_weights(self, place, monkeypatch):
        looked = []
        monkeypatch.setattr(jaxqkv.checkpoints.weights, "count_broken", lambda tensor: looked.append(tensor.shape) or 0)
        model = jaxqkv.load("./model")
        for layer, _ in model.layerwise([[1, 2, 3]]):
            if layer == 1:
                break
        assert set(looked) <= {
            (43, 35),
            (17, 35),
            (35,),
        }  # the embeddings and the final norm, none of a layer's matrices

    def test_parameters_are_looked_at_before_they_are_handed_out(self, place):
        tensors(spoil)(place / "model")
        with pytest.warns(JaxqkvWarning, match=r"h.1.attn.c_attn.weight \(3 of 3,675\)"):
            jaxqkv.load("./model").params()

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
    def test_broken_values_are_counted(self, dtype):
        values = np.random.default_rng(0).standard_normal((31, 37)).astype(dtype)
        values[0, :4] = np.finfo(np.float16).max, -np.finfo(np.float16).max, 0, 1e-8
        assert count_broken(values) == 0
        values[3, 5:8] = np.nan, np.inf, -np.inf
        values[30, 36] = -np.array(np.nan, dtype)
        assert count_broken(values) == 4
        assert count_broken(np.full(5, np.finfo(np.float32).max, np.float32)) == 0

    def test_results_that_are_not_finite_by_themselves_are_no_news(self, place):
        result = jaxqkv.load("./model").run([[1, 2, 3]], reduce=lambda a, mask: jax.numpy.log(0 * a.q.sum()))
        assert np.isneginf(result).all()

    def test_weights_read_by_name_and_by_role(self, place):
        tensors(spoil)(place / "model")
        weights = jaxqkv.load("./model").weights
        weights.W_Q(0)
        with pytest.warns(JaxqkvWarning, match=r"h.1.attn.c_attn.weight \(3 of 3,675\)"):
            weights.W_Q(1)
        assert np.isnan(weights["h.1.attn.c_attn.weight"][3, 5])

    def test_of_many_the_first_dozen_is_named(self, place):
        tensors(lambda t: [x.fill(np.nan) for key, x in t.items() if key.startswith("h.")])(place / "model")
        with pytest.warns(JaxqkvWarning, match=r"in h\.0\.ln_1\.weight \(35 of 35\), .*, and 24 more$"):
            jaxqkv.load("./model").run([[1, 2, 3]])

    @pytest.mark.parametrize(
        ("stored", "computed", "value"), [(np.float64, "float32", 1e300), (np.float32, "float16", 1e5)]
    )
    def test_too_large_for_the_dtype_of_the_arithmetic(self, place, stored, computed, value):
        def change(t):
            t |= {key: x.astype(stored) for key, x in t.items()}
            t["h.0.attn.c_attn.weight"][3, 5] = value

        tensors(change)(place / "model")
        with pytest.warns(JaxqkvWarning, match=r"h.0.attn.c_attn.weight \(1 of 3,675\)"):
            jaxqkv.load("./model", dtype=computed).weights.W_K(0)
