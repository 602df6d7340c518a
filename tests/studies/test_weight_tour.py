"""Study 4: every array of every figure against NumPy and SciPy."""

import functools
import json

import matplotlib.image
import numpy as np
import pytest
from conftest import BERT, GPT2, arrays_of, changed, figures_of, random_tensors, relative_error, write_folder
from helpers.spoilt import check_spoilt_run
from helpers.studies import without_layout
from scipy import stats
from scipy.cluster.hierarchy import linkage

import jaxqkv
from jaxqkv.cli.main import main
from jaxqkv.studies.layers import nearest_indices
from jaxqkv.studies.registry import study
from jaxqkv.studies.weight_tour import STUDY, WeightTourOptions
from jaxqkv.studies.weight_tour.embeddings import _lines
from jaxqkv.studies.weight_tour.layers import WINDOWS, _ks_p, _p, _windows

CONFIG = changed(GPT2, n_layer=7, n_embd=55, initializer_range=0.2)
WIDTH, HEADS, LAYERS, ENDS = 55, 5, 7, [0, 1, 2, 4, 5, 6]
# All others have these widths too, so that the same programs reduce them.
SMALL = changed(GPT2, n_layer=2, n_embd=22, n_head=2, initializer_range=0.1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {"large": write_folder(base / "large", CONFIG), "small": write_folder(base / "small", SMALL)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def compared(folders, base):
    """The figures of the large checkpoint, beside the small one."""
    return figures_of("weight-tour", base, folders["large"], "--compare", str(folders["small"]))


@pytest.fixture(scope="module")
def arrays(compared):
    """The large checkpoint's own."""
    return {id: {name: x for name, x in each.items() if not name.endswith("_small")} for id, each in compared.items()}


@pytest.fixture(scope="module")
def alone(folders, tmp_path_factory):
    """The figures of the small checkpoint."""
    return figures_of("weight-tour", tmp_path_factory.mktemp("alone"), folders["small"])


@pytest.fixture(scope="module")
def published_base(tmp_path_factory):
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def published(folders, published_base):
    ids = ("query-heads", "head-clusters")
    return figures_of("weight-tour", published_base, folders["large"], *ids, "--as-published")


def caption_of(base, id):
    return json.loads((base / "out" / "weight-tour" / "manifest.json").read_text())["figures"][id]["caption"]


@functools.cache
def wide(layer, config=CONFIG):
    """W_Q, W_K and W_V side by side, in float64."""
    return random_tensors(config)[f"h.{layer}.attn.c_attn.weight"].astype(np.float64)


def signature_of(matrix):
    """What tells trained from fresh weights, by its definition."""
    sigma = np.linalg.svd(matrix, compute_uv=False)
    p = sigma / sigma.sum()
    return {
        "kurtosis": stats.kurtosis(matrix.ravel()),
        "effective_rank": np.exp(-(p * np.log(p)).sum()),
        "largest_singular_value": sigma[0],
    }


@pytest.fixture(scope="module")
def positions():
    return random_tensors(CONFIG)["wpe.weight"].astype(np.float64)


def test_every_figure_is_there(arrays):
    assert set(arrays) == set(study("weight-tour").figures)


class TestArchitecture:
    def test_every_tensor_once(self, arrays):
        table, tensors = arrays["architecture"], random_tensors(CONFIG)
        assert table["name"].tolist() == list(tensors)
        assert table["parameters"].tolist() == [tensor.size for tensor in tensors.values()]
        layers = [int(name.split(".")[1]) if name.startswith("h.") else -1 for name in tensors]
        assert table["layer"].tolist() == layers
        words = {"wte": "Token Embedding", "wpe": "Positional Embedding", "attn": "Attention", "mlp": "Feed Forward"}
        expected = [next((c for w, c in words.items() if w in name), "Layer Norm") for name in tensors]
        assert table["category"].tolist() == expected

    def test_totals(self, arrays):
        total = sum(tensor.size for tensor in random_tensors(CONFIG).values())
        assert arrays["architecture"]["total"] == total
        assert arrays["architecture"]["total_with_tied"] == total + CONFIG.vocab_size * CONFIG.n_embd
        assert arrays["architecture"]["megabytes"] == total * 4 / 2**20

    def test_gpt2_has_the_seeds_number_of_parameters(self):
        sizes = {tensor.name: tensor.parameters for tensor in jaxqkv.load("random:gpt2").weights.inventory()}
        assert sum(sizes.values()) == 124_439_808
        assert sum(sizes.values()) + sizes["wte.weight"] == 163_037_184

    def test_printed(self, folders, tmp_path, capsys):
        figures_of("weight-tour", tmp_path, folders["large"], "architecture")
        lines = capsys.readouterr().out.splitlines()
        assert any(line.split()[:3] == ["Attention", "h.*.attn.c_attn.weight", "55"] for line in lines)
        assert len([line for line in lines if line.startswith("Total")]) == 2
        assert len([line for line in lines if "tied: the token embedding again" in line]) == 1

    def test_checkpoints_of_one_architecture_share_a_table(self, folders, tmp_path):
        """And titles of many names take several lines."""
        twin = write_folder(tmp_path / "twin", CONFIG, random_tensors(CONFIG, seed=1))
        large, small = str(folders["large"]), str(folders["small"])
        for compare, titles in (
            ((), ["large"]),
            ((small,), ["large", "small"]),
            ((str(twin),), ["large, twin"]),
            ((small, str(twin)), ["large, twin", "small"]),
        ):
            with STUDY.start(WeightTourOptions(model=(large,), compare=compare)) as run:
                display = STUDY.figures["architecture"].display(run, {})
            assert [row[0].title for row in display.panels[::2]] == titles
            assert [len(row) for row in display.panels] == [1, 2] * len(titles)
            assert (display.size, display.heights) == ((12, 10 * len(titles)), [6, 4] * len(titles))
            heads = [text.splitlines()[0] for text in display.text.split("\n\n")]
            if len(titles) > 1:
                assert heads == titles
            else:  # the names are in the first line of the run
                assert heads[0].startswith("Category ")
            note = " (One table for large, twin, which have the same tensors.)"
            assert display.caption.endswith(note if "twin" in titles[0] else "has its own line.")
            assert len(display.arrays) == 8 * (1 + len(compare))
        lines = _lines([f"step{number}" for number in range(30)]).splitlines()
        assert max(map(len, lines)) <= 90
        assert " ".join(lines).split(", ") == [f"step{number}" for number in range(30)]

    def test_an_output_embedding_of_its_own_is_counted(self, tmp_path):
        config = changed(GPT2, tie_word_embeddings=False)
        table = figures_of("weight-tour", tmp_path, write_folder(tmp_path / "untied", config), "architecture")
        table = table["architecture"]
        assert table["category"][table["name"] == "lm_head.weight"].tolist() == ["Output Embedding"]
        assert "total_with_tied" not in table


class TestPositions:
    def test_matrix_and_dimensions(self, arrays, positions):
        np.testing.assert_array_equal(arrays["positions"]["positions"], positions)
        fraction = [each * WIDTH // 768 for each in (500, 400, 600, 700)]
        assert arrays["position-dimension"]["dimension"] == fraction[0]
        np.testing.assert_array_equal(arrays["position-dimension"]["values"], positions[:, fraction[0]])
        assert arrays["position-dimensions"]["dimensions"].tolist() == fraction[1:]
        np.testing.assert_array_equal(arrays["position-dimensions"]["values"], positions[:, fraction[1:]].T)

    def test_variance(self, arrays, positions):
        variance = positions.var(axis=0)
        np.testing.assert_allclose(arrays["position-variance"]["variance"], variance, rtol=1e-6)
        order = np.argsort(variance)
        chosen = [order[0], order[WIDTH // 2], order[-1]]
        assert arrays["position-variance"]["dimensions"].tolist() == chosen
        np.testing.assert_array_equal(arrays["position-variance"]["values"], positions[:, chosen].T)

    def test_correlation(self, arrays, positions):
        expected = [stats.pearsonr(positions[i], positions[i + 1])[0] for i in range(len(positions) - 1)]
        np.testing.assert_allclose(arrays["position-correlation"]["r"], expected, atol=1e-6)


class TestOneLayer:
    def test_histogram_and_statistics(self, arrays):
        weights, ours = wide(0).ravel(), arrays["weight-histogram"]
        heights, edges = np.histogram(weights.astype(np.float32), bins=50, density=True)
        np.testing.assert_allclose(ours["density"], heights)
        np.testing.assert_allclose(ours["edges"], edges)
        mean, std = weights.mean(), weights.std()
        test = stats.kstest(weights, "norm", args=(mean, std))
        expected = {
            "mean": mean,
            "std": std,
            "skewness": stats.skew(weights),
            "kurtosis": stats.kurtosis(weights),
            "ks": test.statistic,
        }
        for name, value in expected.items():
            assert ours[name] == pytest.approx(value, abs=2e-6, rel=1e-5), name
        assert ours["p"] == pytest.approx(test.pvalue, rel=1e-3)

    def test_the_matrix_and_its_windows(self, arrays):
        matrix = wide(0)
        np.testing.assert_array_equal(arrays["weights"]["weights"], matrix)
        zoom = arrays["weights-zoom"]
        for number in (1, 2):
            (top, bottom), (left, right) = zoom[f"rows_{number}"], zoom[f"columns_{number}"]
            np.testing.assert_array_equal(zoom[f"window_{number}"], matrix[top:bottom, left:right])
        assert zoom["rows_2"].tolist() == [300 * WIDTH // 768, 600 * WIDTH // 768]
        assert zoom["columns_1"].tolist() == [100 * 3 * WIDTH // 2304, 300 * 3 * WIDTH // 2304]

    def test_windows_where_they_fit_are_the_seeds(self):
        assert tuple(_windows((768, 2304))) == tuple(_windows((600, 400))) == WINDOWS
        scaled = [each * 599 // 768 for each in (0, 300, 300, 600)]
        rows = [rows for rows, _ in _windows((599, 400))]
        assert rows == [tuple(scaled[:2]), tuple(scaled[2:])]
        assert [columns for _, columns in _windows((599, 400))] == [(100, 300), (200, 400)]

    def test_indices_are_the_seeds_or_all_at_the_same_fractions(self):
        assert nearest_indices([400, 600, 700], 701, 768) == [400, 600, 700]
        assert nearest_indices([400, 600, 700], 512, 768) == [266, 400, 466]


class TestLayers:
    def test_principal_components_are_those_of_the_standardised_columns(self, arrays):
        """By singular values; each component's largest loading is positive."""
        assert arrays["pca-variance"]["layers"].tolist() == arrays["pca-scatter"]["layers"].tolist() == ENDS
        for index, layer in enumerate(ENDS):
            matrix = wide(layer)
            standardised = (matrix - matrix.mean(axis=0)) / matrix.std(axis=0)
            left, sigma, loadings = np.linalg.svd(standardised, full_matrices=False)
            share = sigma**2 / (sigma**2).sum()
            signs = [np.sign(each[np.abs(each).argmax()]) for each in loadings[:2]]
            np.testing.assert_allclose(arrays["pca-variance"]["explained"][index], np.cumsum(share), atol=2e-6)
            assert arrays["pca-scatter"]["explained"][index] == pytest.approx(share[0], abs=1e-6)
            assert relative_error(arrays["pca-scatter"]["scores"][index], left[:, :2] * sigma[:2] * signs) < 2e-4

    def test_statistics(self, arrays):
        for layer in range(LAYERS):
            matrix = wide(layer)
            for name, function in (("mean", np.mean), ("std", np.std), ("max", np.max), ("min", np.min)):
                assert arrays["layer-statistics"][name][layer] == pytest.approx(function(matrix), abs=1e-7, rel=1e-6)

    def test_variance_of_rows(self, arrays):
        expected = [wide(layer).var(axis=1) for layer in range(LAYERS)]
        np.testing.assert_allclose(arrays["row-variance"]["variance"], expected, rtol=1e-5)

    def test_signature(self, arrays):
        signature = arrays["training-signature"]
        assert {array.shape for array in signature.values()} == {(LAYERS, 3)}
        for layer in range(LAYERS):
            for index, matrix in enumerate(np.split(wide(layer), 3, axis=1)):
                test = stats.kstest(matrix.ravel(), "norm", args=(matrix.mean(), matrix.std()), method="asymp")
                expected = signature_of(matrix) | {"ks": test.statistic}
                for name, value in expected.items():
                    # The kurtosis is a difference from 3, so float32 leaves it some ten units of 3e-7.
                    error = 1.5e-5 if name == "kurtosis" else 2e-6
                    assert signature[name][layer, index] == pytest.approx(value, rel=1e-5, abs=error), name


class TestHeads:
    """The two places where the seed cuts the matrix wrongly: each against its own definition."""

    def test_query_heads(self, arrays):
        rows = [wide(0)[:, head * 11 : (head + 1) * 11].ravel() for head in range(HEADS)]
        np.testing.assert_array_equal(arrays["query-heads"]["heads"], rows)

    def test_query_heads_as_published(self, tmp_path):
        config = changed(GPT2, n_embd=30, n_layer=1)
        folder = write_folder(tmp_path / "thirds", config)
        again = figures_of("weight-tour", tmp_path, folder, "query-heads", "--as-published")
        seed = wide(0, config).reshape(3, -1, 90)[0].reshape(5, -1)
        np.testing.assert_array_equal(again["query-heads"]["heads"], seed)

    def test_query_heads_as_published_where_the_width_is_no_multiple_of_three(self, published):
        np.testing.assert_array_equal(published["query-heads"]["heads"], wide(0)[: WIDTH // 3].reshape(HEADS, -1))

    @pytest.mark.parametrize("as_published", [False, True])
    def test_clusters(self, arrays, published, as_published):
        ours = (published if as_published else arrays)["head-clusters"]
        assert ours["layers"].tolist() == ENDS
        width = 3 * 11 if as_published else 11
        for index, layer in enumerate(ENDS):
            vectors = [wide(layer)[:, head * width : (head + 1) * width].mean(axis=1) for head in range(HEADS)]
            np.testing.assert_allclose(ours["linkage"][index], linkage(vectors, "ward"), rtol=1e-6)

    def test_the_caption_says_which_it_is(self, arrays, published, base, published_base):
        for id in published:
            assert "as published" not in caption_of(base, id)
            assert "as published" in caption_of(published_base, id)

    def test_nothing_else_differs(self, alone, folders, tmp_path):
        as_published = figures_of("weight-tour", tmp_path, folders["small"], "--as-published")
        for id in set(alone) - {"query-heads", "head-clusters"}:
            for name, array in alone[id].items():
                np.testing.assert_array_equal(as_published[id][name], array, err_msg=f"{id} {name}")

    def test_one_head_has_no_clusters(self, tmp_path, capsys):
        folder = write_folder(tmp_path / "single", changed(SMALL, n_layer=1, n_head=1))
        line = ["--arrays-only", "--out", str(tmp_path / "out"), "--model", str(folder)]
        assert main(["figures", "weight-tour", "query-heads", "head-clusters", *line]) == 2
        assert [path.stem for path in (tmp_path / "out" / "weight-tour").glob("*.npz")] == ["query-heads"]
        assert "head-clusters needs two heads, and single has one" in capsys.readouterr().err

    def test_one_head_beside_others_is_left_out_and_said(self, folders, tmp_path):
        single = write_folder(tmp_path / "single", changed(SMALL, n_layer=1, n_head=1))
        again = figures_of("weight-tour", tmp_path, folders["large"], "head-clusters", "--compare", str(single))
        assert set(again["head-clusters"]) == {"layers", "linkage"}
        said = "(Not drawn: head-clusters needs two heads, and single has one.)"
        assert said in caption_of(tmp_path, "head-clusters")


class TestCompare:
    def test_the_first_checkpoints_arrays_keep_their_names(self, arrays, alone):
        assert {id: set(each) for id, each in arrays.items()} == {id: set(each) for id, each in alone.items()}

    def test_the_others_have_their_own(self, compared, alone):
        for id, expected in alone.items():
            own = {
                name.removesuffix("_small"): array for name, array in compared[id].items() if name.endswith("_small")
            }
            assert set(own) == set(expected), id
            for name, array in expected.items():
                np.testing.assert_array_equal(own[name], array, err_msg=f"{id} {name}")

    def test_another_layer_or_the_last_where_there_are_fewer(self, folders, tmp_path):
        options = ["weights", "--layer", "5", "--compare", str(folders["small"])]
        again = figures_of("weight-tour", tmp_path, folders["large"], *options)["weights"]
        np.testing.assert_array_equal(again["weights"], wide(5))
        np.testing.assert_array_equal(again["weights_small"], wide(1, SMALL))

    def test_qkv_weights_in_figures_2b_to_2d_and_in_no_other(self, folders, tmp_path):
        ids, layer = ("2b", "2c", "2d"), ("--layer", "1")
        large = write_folder(tmp_path / "large", changed(SMALL, n_layer=3))
        more = ["--compare", str(folders["small"]), f"random:{folders['small']}"]
        together = figures_of("qkv-weights", tmp_path / "together", large, *layer, *more)
        large = figures_of("qkv-weights", tmp_path / "alone", large, *layer)
        small = figures_of("qkv-weights", tmp_path / "small", folders["small"], *layer)
        for alone, suffix in ((large, ""), (small, "_small")):
            for id in ids:
                for array in set(alone[id]) - {"edges"}:
                    np.testing.assert_array_equal(together[id][f"{array}{suffix}"], alone[id][array], err_msg=array)
        assert together["2d"]["mean_random:small"].shape == (2, 3)
        assert set(together) == set(large)
        for id in set(large) - set(ids):
            assert set(together[id]) == set(large[id])
            for name, array in large[id].items():
                np.testing.assert_array_equal(together[id][name], array, err_msg=f"{id} {name}")


def test_bert_has_the_same_tour(tmp_path):
    config = changed(BERT, n_layer=2, n_embd=22, n_head=2)
    arrays = figures_of("weight-tour", tmp_path, write_folder(tmp_path / "bert", config))
    assert set(arrays) == set(study("weight-tour").figures)
    tensors = random_tensors(config)
    parts = [tensors[f"encoder.layer.0.attention.self.{name}.weight"].T for name in ("query", "key", "value")]
    np.testing.assert_array_equal(arrays["weights"]["weights"], np.concatenate(parts, axis=1))
    np.testing.assert_array_equal(arrays["positions"]["positions"], tensors["embeddings.position_embeddings.weight"])
    categories = dict(zip(arrays["architecture"]["name"], arrays["architecture"]["category"], strict=True))
    assert categories["embeddings.token_type_embeddings.weight"] == "Token Type Embedding"
    assert categories["encoder.layer.1.attention.output.LayerNorm.bias"] == "Layer Norm"
    assert "total_with_tied" not in arrays["architecture"]


def test_demo_compares_trained_and_fresh_weights_which_differ(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["figures", "weight-tour", "position-dimension", "--demo", "--arrays-only", "--out", str(out)]) == 0
    names = set(arrays_of(out / "weight-tour" / "position-dimension.npz"))
    assert names == {"values", "dimension", "values_random:demo-gpt2", "dimension_random:demo-gpt2"}
    assert capsys.readouterr().out.count("demo-gpt2, random:demo-gpt2") == 1

    def mean_signature(spec):
        weights = jaxqkv.load(spec).weights
        layers = [np.split(weights.W_QKV(layer), 3, axis=1) for layer in (0, weights.config.n_layer - 1)]
        each = [[list(signature_of(matrix).values()) for matrix in three] for three in layers]
        return np.mean(each, axis=0)

    trained, fresh = mean_signature("demo-gpt2"), mean_signature("random:demo-gpt2")
    kurtosis, effective_rank, largest_singular_value = (trained > fresh).T
    assert kurtosis.all()
    assert largest_singular_value.all()
    assert not effective_rank.any()


def test_p_values():
    for statistic, n in ((0.3, 10), (0.02, 5000), (0.0037, 49_152), (0.0485, 49_152)):
        assert _ks_p(statistic, n) == pytest.approx(stats.kstwo.sf(statistic, n), rel=1e-9)
    assert _ks_p(0.0908, 768 * 2304) == stats.kstwo.sf(0.0908, 768 * 2304) == 0
    assert (_p(0.0), _p(1e-301), _p(9.3e-101), _p(0.4961)) == ("< 1e-300", "< 1e-300", "9.3e-101", "0.496")


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    """A checkpoint of one layer with constant weights."""
    config = changed(SMALL, n_layer=1)
    tensors = random_tensors(config)
    tensors["h.0.attn.c_attn.weight"][:] = 0
    tensors["wpe.weight"][:2] = 0
    return write_folder(tmp_path_factory.mktemp("model") / "zero", config, tensors)


def assert_drawn(out, ids, *arguments):
    """Returns the arrays."""
    line = ["figures", "weight-tour", *ids, "--dpi", "20", "--out", str(out), "--model", *map(str, arguments)]
    assert main(line) == 0
    for id in ids:
        pixels = matplotlib.image.imread(out / "weight-tour" / f"{id}.png")
        assert pixels[..., :3].std() > 0.02, id
    return {id: arrays_of(out / "weight-tour" / f"{id}.npz") for id in ids}


def test_every_figure_is_drawn_without_a_warning_beside_constant_weights(folders, zero, tmp_path):
    """The tables, of which the other test draws one, are as they are of all weights."""
    ids = [id for id in study("weight-tour").figures if id != "architecture"]
    with without_layout():
        arrays = assert_drawn(tmp_path, ids, folders["small"], "--compare", zero)
    assert np.isnan(arrays["position-correlation"]["r_zero"][:2]).all()
    assert (arrays["training-signature"]["effective_rank_zero"][0] == 0).all()


def test_constant_weights_alone_are_drawn_without_a_warning(zero, tmp_path):
    """Where a picture has limits that all checkpoints share."""
    ids = ["architecture", "weight-histogram", "weights", "pca-scatter", "row-variance", "query-heads", "head-clusters"]
    arrays = assert_drawn(tmp_path, ids, zero)
    histogram = arrays["weight-histogram"]
    assert (histogram["std"], histogram["ks"]) == (0, 1)
    assert np.isnan(histogram["skewness"])
    assert (arrays["pca-scatter"]["scores"][0] == 0).all()


def test_a_whole_run_with_weights_that_are_not_finite(tmp_path):
    """Which leave out the figures that cannot be."""
    left_out, compare = {"weight-histogram", "head-clusters"}, ("--compare", "random:./model")
    warnings = check_spoilt_run(
        tmp_path, "weight-tour", SMALL, (), *compare, not_drawn=left_out, bars={"layers": 2 * 2}, layer=0
    )
    error = "\n".join(warnings)
    assert "weight-histogram is not drawn: weight-histogram: 3 weights of layer 0 of model are NaN or infinite" in error
    assert "head-clusters: weights of model are NaN or infinite" in error
    signature = arrays_of(tmp_path / "out" / "weight-tour" / "training-signature.npz")
    assert np.isnan(signature["kurtosis"][0, 0])
    assert np.isfinite(signature["kurtosis"][1:]).all()
