"""Figures from Python: the same as the command's, from whatever is open, with its options as keywords."""

import base64
import html
import io
import json
import re
import sys

import jax
import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
from conftest import BERT, GPT2, arrays_of, changed, random_tensors, write_folder, write_word_tokenizer
from helpers.checkpoints import WORDS
from helpers.processes import in_a_process

import jaxqkv
from jaxqkv.architectures import open_checkpoint
from jaxqkv.cli.figures import parse
from jaxqkv.cli.main import main
from jaxqkv.cli.parser import made
from jaxqkv.errors import JaxqkvError, NotDrawable
from jaxqkv.figures import drawing
from jaxqkv.figures.drawing import Figure
from jaxqkv.studies import attention_scores, qkv_weights, token_frequency, token_similarity, weight_tour
from jaxqkv.studies.options import from_keywords
from jaxqkv.studies.registry import names, study

TEXT = "a cat saw her run home"
# The checkpoint predicts some of its words, and not all.
PREDICTED = " cat cat saw her home home cat cat home saw home saw home her cat home cat her"
DOCUMENTS = ("the cat saw her " * 20, "run home run " * 30, "home her a the cat " * 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = changed(GPT2, initializer_range=0.2)
    return write_word_tokenizer(write_folder(tmp_path_factory.mktemp("model") / "tiny", config), WORDS)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """A checkpoint of one layer, for which one program is compiled where others need two."""
    config = changed(GPT2, initializer_range=0.2, n_layer=1)
    return write_word_tokenizer(write_folder(tmp_path_factory.mktemp("model") / "tiny", config), WORDS)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "texts.txt"
    path.write_text("\n\n".join(DOCUMENTS))
    return path


@pytest.fixture(scope="module")
def figure(folder):
    return attention_scores.figure("5a", model=str(folder), text=TEXT, dpi=50, theme="dark")


@pytest.fixture(scope="module")
def page(figure):
    """The figure as a notebook shows it."""
    return figure._repr_html_()


@pytest.fixture(scope="module")
def light(folder):
    """A figure that is drawn quickly."""
    return weight_tour.figure("position-dimension", model=folder, dpi=20)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures without pictures, for tests of what else they have."""
    monkeypatch.setattr(drawing, "drawn", lambda display, theme, dpi: None)


def of_the_command(tmp_path, study, id, *arguments):
    """The folder with what `jaxqkv figures` writes; the first argument is a checkpoint's."""
    line = ["figures", study, id, "--out", str(tmp_path / "out"), "--model", *map(str, arguments)]
    assert main(line) == 0
    return tmp_path / "out" / study


def caption_of(files, id):
    return json.loads((files / "manifest.json").read_text())["figures"][id]["caption"]


def pixels(png):
    return matplotlib.image.imread(io.BytesIO(png))


def shown(page):
    """The picture in a figure's HTML."""
    (inside,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    return pixels(base64.b64decode(inside))


def assert_same(arrays, path):
    expected = arrays_of(path)
    assert list(arrays) == list(expected)
    for name in expected:
        assert arrays[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(arrays[name], expected[name])


def assert_same_options(name, line, keywords):
    """All that a figure is made from is the same."""
    kind = study(name).options
    assert made(kind, parse([name, *map(str, line)])) == from_keywords(kind, keywords, name)


class TestTheSameAsTheCommands:
    def test_attention_scores(self, folder, figure, page, tmp_path, monkeypatch):
        line = ("--text", TEXT, "--dpi", "50", "--theme", "dark")
        files = of_the_command(tmp_path, "attention-scores", "5a", folder, *line)
        np.testing.assert_array_equal(shown(page), pixels((files / "5a.png").read_bytes()))
        monkeypatch.setattr(drawing, "drawn", lambda display, theme, dpi: None)
        models = (folder, open_checkpoint(folder), jaxqkv.load(folder), [jaxqkv.load(folder, stream=True)])
        for each in (figure, *(attention_scores.figure("5a", model=model, text=TEXT) for model in models)):
            assert_same(each.arrays, files / "5a.npz")
            assert each.caption == caption_of(files, "5a")

    def test_token_similarity_with_a_list_of_sentences(self, tmp_path, folder, undrawn):
        sentences = ["a cat saw her run", "the cat saw her", "run her home", "no such word"]
        path = tmp_path / "sentences.txt"
        path.write_text("\n".join(sentences))
        options = {"measure": "cosine", "layer": 2, "skip_missing": True, "target": " her"}
        line = ("--measure", "cosine", "--layer", 2, "--skip-missing", "--sentences", path)
        files = of_the_command(tmp_path, "token-similarity", "pair-order", folder, *line, "--arrays-only")
        figure = token_similarity.figure("pair-order", model=folder, sentences=sentences, **options)
        assert_same(figure.arrays, files / "pair-order.npz")
        assert "1 sentences without the target were left out" in figure.caption
        for given in (path, str(path)):
            assert_same_options("token-similarity", line, options | {"sentences": given})

    def test_token_frequency(self, tmp_path, shallow, corpus, undrawn):
        options = {"documents": "paragraphs", "tokens": 60, "batch": 3, "length": 13, "memory": "1MB"}
        options |= {"no_cache": True, "mesh": {"data": 1}}
        line = ("--corpus", corpus, "--documents", "paragraphs", "--tokens", 60, "--batch", 3, "--length", 13)
        line += ("--memory", "1MB", "--no-cache", "--mesh", "data=1")
        files = of_the_command(tmp_path, "token-frequency", "5d", shallow, *line, "--arrays-only")
        figure = token_frequency.figure("5d", model=shallow, corpus=corpus, **options)
        assert_same(figure.arrays, files / "5d.npz")
        for given in (corpus, [str(corpus)]):
            assert_same_options("token-frequency", line, options | {"corpus": given})

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("qkv-activations", {"text_file": "a.txt", "target": " her", "context": 3, "permutations": 19}),
            ("adjustment-magnitudes", {"corpus": "a.txt", "documents": "paragraphs", "positions": 5}),
            ("prediction-divergence", {"text_file": "a.txt", "length": 13, "permutations": 19, "skip_first": True}),
            ("category-selectivity", {"words": "words", "permutations": 19, "seed": 3}),
            ("head-silencing", {"text": "a cat saw her", "edit": "permute", "seed": 3}),
            ("head-patching", {"clean": "a cat her", "donor": "a saw her", "answers": (" her", " cat")}),
        ],
    )
    def test_other_studies_of_runs(self, tmp_path, folder, name, options):
        """An open model and keywords make the same run as a line: options, texts and checkpoint are the same.

        Files are given as paths, and texts and answers as they are.
        """
        (tmp_path / "a.txt").write_text("\n\n".join((PREDICTED, "a cat saw her run home", "run home her", PREDICTED)))
        (tmp_path / "words").write_text("a cat\na saw\na her\nb run\nb home\n")
        options = {key: tmp_path / given if given in ("a.txt", "words") else given for key, given in options.items()}
        line = []
        for key, given in options.items():
            line += [
                f"--{key.replace('_', '-')}",
                *(given if isinstance(given, tuple) else [] if given is True else [given]),
            ]
        assert_same_options(name, line, options)
        kind, model = study(name).options, jaxqkv.load(folder)
        with (
            study(name).start(from_keywords(kind, options | {"model": model}, name)) as run,
            study(name).start(made(kind, parse([name, "--model", str(folder), *map(str, line)]))) as of_the_line,
        ):
            assert run.model is model
            assert run.describe() == of_the_line.describe()
            assert run.describe()["checkpoint"] == [model.checkpoint.identity()]

    def test_weights_of_several_and_compared(self, tmp_path, folder, undrawn):
        fresh = f"random:{folder}"
        models = [jaxqkv.load(folder, dtype="bfloat16"), open_checkpoint(fresh, seed=3)]
        files = of_the_command(tmp_path, "qkv-weights", "3", folder, fresh, "--seed", 3, "--arrays-only")
        arrays = qkv_weights.figure("3", model=models).arrays
        assert set(arrays) == {"mean_tiny", "std_tiny", "mean_random:tiny", "std_random:tiny"}
        assert_same(arrays, files / "3.npz")
        line = ("--compare", folder, "--seed", 3)
        files = of_the_command(tmp_path, "weight-tour", "layer-statistics", fresh, *line, "--arrays-only")
        figure = weight_tour.figure("layer-statistics", model=models[1], compare=models[0], as_published=False)
        assert "mean_tiny" in figure.arrays
        assert_same(figure.arrays, files / "layer-statistics.npz")
        for compare in ([str(folder)], folder):
            options = {"model": fresh, "compare": compare, "seed": 3, "as_published": False}
            assert_same_options("weight-tour", ("--model", fresh, *line), options)

    def test_every_study_has_one(self, undrawn):
        for name in names():
            made = getattr(jaxqkv.studies, name.replace("-", "_")).figure
            assert made == study(name).figure
        demo = weight_tour.figure("position-dimension", demo=True)
        assert {"values", "values_random:demo-gpt2"} <= set(demo.arrays)


class TestFigure:
    def test_it_unpacks(self, figure):
        picture, arrays = figure
        assert isinstance(picture, matplotlib.figure.Figure)
        assert picture is figure.figure
        assert arrays is figure.arrays
        assert {name: array.shape for name, array in arrays.items()} == {"edges": (101,), "density": (3, 2, 100)}
        assert picture.axes[0].get_title() == "A) Within heads"
        np.testing.assert_array_equal(picture.axes[0].images[0].get_array(), arrays["density"][:, 0])

    def test_arrays_are_the_callers_own(self, figure):
        edges = attention_scores.run.LAST_TOKEN_EDGES
        np.testing.assert_array_equal(figure.arrays["edges"], edges)
        assert figure.arrays["edges"].flags.writeable
        assert not np.shares_memory(figure.arrays["edges"], edges)

    def test_what_it_says(self, figure):
        assert repr(figure).splitlines() == [
            "Figure 5a of attention-scores: scores of the last token within and across heads by layer",
            "  edges    [edge=101]                           float64",
            "  density  [layer=3, within/across=2, bin=100]  float32",
        ]
        assert "in each layer of tiny" in figure.caption

    def test_a_notebook_shows_it(self, figure, page):
        picture = shown(page)
        assert picture.shape[:2] == (215, 10 * 50)
        assert picture.std() > 0.02
        assert "width: 960px; max-width: 100%" in page
        assert figure.caption in html.unescape(page)

    def test_themes(self, page, light):
        assert shown(light._repr_html_())[0, 0].min() == 1
        np.testing.assert_allclose(shown(page)[0, 0, :3] * 255, [0x28, 0x2A, 0x2C], atol=1)

    def test_what_is_changed_in_it_is_shown(self, folder):
        figure = weight_tour.figure("position-dimension", model=folder, dpi=20)
        for axes in figure.figure.axes:
            axes.set_visible(False)
        figure.figure.suptitle("")
        assert shown(figure._repr_html_()).min() == 1

    def test_its_html_is_escaped(self, tmp_path):
        evil = write_folder(tmp_path / "<script>alert(1)<", GPT2)
        page = weight_tour.figure("position-dimension", model=evil, dpi=20)._repr_html_()
        assert "<script>" not in page
        assert "&lt;script&gt;alert(1)&lt;" in page

    def test_saving(self, light, tmp_path):
        assert base64.b64encode(light.save(str(tmp_path / "a.PNG")).read_bytes()).decode() in light._repr_html_()
        assert light.save(tmp_path / "a.npz") == tmp_path / "a.npz"
        assert_same(light.arrays, tmp_path / "a.npz")
        assert "Position embedding values" in light.save(tmp_path / "a.svg").read_text()
        assert light.save(tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
        before = sorted(tmp_path.iterdir())
        for name, reason in (
            ("a.jpg", r"saved as one of \.png, \.svg, \.pdf, \.npz"),
            ("a", r"such an ending"),
            ("no/such/a.png", r"cannot be written \(No such file or directory\)"),
        ):
            with pytest.raises(JaxqkvError, match=reason):
                light.save(tmp_path / name)
        assert sorted(tmp_path.iterdir()) == before


class TestSeveral:
    def test_in_one_pass_in_the_order_asked_for(self, folder, figure, undrawn, monkeypatch):
        model, passes = jaxqkv.load(folder), []
        layerwise = jaxqkv.Model.layerwise
        monkeypatch.setattr(
            jaxqkv.Model, "layerwise", lambda self, *args, **more: passes.append(1) or layerwise(self, *args, **more)
        )
        figures = attention_scores.figure(["9", "5a", "4"], model=model, text=TEXT)
        assert [each.id for each in figures] == ["9", "5a", "4"]
        assert all(isinstance(each, Figure) for each in figures)
        assert len(passes) == 1
        assert figures[1].caption == figure.caption

    def test_a_model_keeps_its_weights(self, folder, undrawn, monkeypatch):
        model = jaxqkv.load(folder)
        for _ in range(3):
            attention_scores.figure("5a", model=model, text=TEXT)
        monkeypatch.setattr(model.weights, "layer", lambda layer: pytest.fail("read again"))
        attention_scores.figure("5a", model=model, text=TEXT)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"laier": 3}, "attention-scores takes no option laier; did you mean layer?"),
            (
                {"corpus": "x"},
                "attention-scores takes no option corpus; there is text, text_file, tokenizer, dtype, model, demo",
            ),
            ({"out": "x"}, "attention-scores takes no option out"),
            ({"layer": "six"}, "layer: six is not a whole number"),
            ({"layer": 1.5}, "layer: 1.5 is not a whole number"),
            ({"layer": 3}, "--layer 3: the layers of tiny are 0 to 2"),
            ({"seed": -1}, "seed: -1 is not a whole number from 0 up"),
            ({"dpi": True}, "dpi: True is not a whole number from 10 to 2400"),
            ({"theme": "blue"}, "theme is one of light, dark, not 'blue'"),
            ({"text": []}, "text is empty"),
            ({"text": 3}, "text cannot be 3"),
            ({"text": [3]}, "text cannot be 3"),
            ({"text": "a", "text_file": "b"}, "--text and --text-file exclude each other"),
            ({"demo": True}, "--demo and --model exclude each other"),
            ({"demo": 1}, "demo is True or False, not 1"),
            ({"model": []}, "model is empty"),
            ({"model": 3}, "model cannot be 3"),
            ({"model": [3]}, "model cannot be 3"),
            ({"model": "./nowhere"}, "./nowhere: no such folder"),
            ({"model": ["demo-gpt2", "demo-bert"]}, "draws one checkpoint at a time, not demo-gpt2, demo-bert"),
        ],
    )
    def test_options(self, folder, options, message):
        with pytest.raises(JaxqkvError) as error:
            attention_scores.figure("5a", **({"model": folder} | options))
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    def test_what_an_open_model_has_decided(self, folder, undrawn):
        model = jaxqkv.load(folder)
        for name, value in (("dtype", "bfloat16"), ("tokenizer", folder), ("revision", "main")):
            with pytest.raises(JaxqkvError, match=f"{name} was decided when"):
                attention_scores.figure("5a", model=model, **{name: value})
        with pytest.raises(JaxqkvError, match="revision was decided when"):
            attention_scores.figure("5a", model=model.checkpoint, revision="main")
        with pytest.raises(JaxqkvError, match=r"at a time, not .*tiny, .*tiny"):
            attention_scores.figure("5a", model=[model, model.checkpoint])
        with jax.numpy_dtype_promotion("standard"):  # Flax's norms go through float32
            half = attention_scores.figure("5a", model=model.checkpoint, dtype="bfloat16", text=TEXT)
            own = attention_scores.figure("5a", model=jaxqkv.load(folder, dtype="bfloat16"), text=TEXT)
        np.testing.assert_array_equal(half.arrays["density"], own.arrays["density"])

    def test_figures(self, folder, tmp_path):
        with pytest.raises(JaxqkvError, match=r"attention-scores has no figure 5z; did you mean 5"):
            attention_scores.figure("5z", model=folder)
        bert = write_folder(tmp_path / "bert", BERT, random_tensors(BERT))
        with pytest.raises(NotDrawable, match="attends to later tokens too"):
            attention_scores.figure("8", model=bert, tokenizer=folder, text=TEXT)


@pytest.mark.slow
def test_studies_are_attributes_of_the_package_and_pyplot_keeps_its_state():
    code = (
        "import sys, jaxqkv\n"
        "print('jaxqkv.kernels' in sys.modules, 'jaxqkv.studies' in sys.modules)\n"
        "print(jaxqkv.kernels.pearson.__name__, jaxqkv.studies.weight_tour.figure.__name__, 'studies' in dir(jaxqkv))\n"
        "import matplotlib\n"
        "before = matplotlib.rcParams.copy()\n"
        "jaxqkv.studies.qkv_weights.figure('1', model='demo-gpt2', theme='dark')._repr_html_()\n"
        "print('matplotlib.pyplot' in sys.modules, dict.__eq__(before, matplotlib.rcParams))"
    )
    result = in_a_process("-c", code)
    assert result.stdout.split() == ["False", "False", "pearson", "figure", "True", "False", "True"], result.stderr
    with pytest.raises(AttributeError, match=r"module jaxqkv has no attribute kernel$"):
        _ = jaxqkv.kernel
    with pytest.raises(AttributeError, match=r"module jaxqkv\.studies has no attribute weights"):
        _ = jaxqkv.studies.weights
    assert all(hasattr(jaxqkv, name) for name in jaxqkv.__all__)
    assert sys.modules["jaxqkv.studies"] is jaxqkv.studies
