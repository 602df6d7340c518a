"""Study 5: every array of every figure against PyTorch in float64, and NumPy from the definitions."""

from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import GPT2, changed, figures_of, write_folder, write_word_tokenizer
from helpers import pytorch
from helpers.checkpoints import WORDS
from helpers.oracles import cosine
from helpers.spoilt import check_spoilt_run

import jaxqkv
from jaxqkv import kernels
from jaxqkv.cli.main import main
from jaxqkv.errors import JaxqkvError
from jaxqkv.studies import token_similarity
from jaxqkv.studies.options import from_keywords
from jaxqkv.studies.registry import study
from jaxqkv.studies.stimuli import stimuli
from jaxqkv.studies.token_similarity import STUDY, TokenSimilarityOptions

CONFIG = changed(GPT2, initializer_range=0.2)
SENTENCES = [
    "a cat saw her run home",
    "her cat saw her",
    "a cat saw her home",
    "home run her a her",
    "a a a her cat",
    "run home saw her a cat her",
    "a her",
]
LAYER, EMBED = 1, 35
EDGES = np.linspace(-1, 1, 101)
ORDER = ("QQ", "KK", "VV", "QK", "QV", "KV")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_word_tokenizer(write_folder(tmp_path_factory.mktemp("model") / "tiny", CONFIG), WORDS)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    path = tmp_path_factory.mktemp("sentences") / "sentences.txt"
    path.write_text("\n".join(SENTENCES) + "\n\n")
    return str(path)


@pytest.fixture(scope="module")
def arrays(folder, sentences, tmp_path_factory):
    return figures_of("token-similarity", tmp_path_factory.mktemp("study"), folder, "--sentences", sentences)


@pytest.fixture(scope="module")
def samples(folder):
    """Target and token before it, `[layer, sentence, 3·embed]`, each sentence run alone by PyTorch."""
    model, tokenizer = pytorch.load(folder), jaxqkv.load(folder).tokenizer
    rows = []
    for sentence in SENTENCES:
        words = sentence.split()
        place = words.index("her", 1 if words[0] == "her" else 0)
        # A sentence that begins with the target holds its word without a space: another token.
        found = pytorch.activations(model, tokenizer.encode([sentence])[0])
        wide = np.concatenate([found[name] for name in "qkv"], axis=-1)
        rows.append((wide[:, place], wide[:, place - 1]))
    target, non_target = (np.stack(column, axis=1) for column in zip(*rows, strict=True))
    return target, non_target


def correlation(x):
    return cosine(x - x.mean(axis=0))


def group(similarity, name):
    """The values of one group, pair by pair above the diagonal."""
    one, other = np.triu_indices(len(similarity), 1)
    third = np.arange(len(similarity)) // (len(similarity) // 3)
    thirds = np.sort([third[one], third[other]], axis=0).T
    return similarity[one, other][(thirds == sorted("QKV".index(letter) for letter in name)).all(axis=1)]


def test_all_figures_of_the_table_are_there(arrays):
    expected = ["pairs", "cosine", "correlation", "mask", "distributions", "means", "pair-order", "laminar"]
    assert sorted(arrays) == sorted(expected) == sorted(study("token-similarity").figures)


def test_pairs_and_means(arrays, samples):
    assert arrays["pairs"]["target"].shape == (7, 3 * EMBED)
    np.testing.assert_allclose(arrays["pairs"]["target"], samples[0][LAYER], atol=1e-5)
    np.testing.assert_allclose(arrays["means"]["mean"], samples[0][LAYER].mean(axis=0), atol=1e-5)


@pytest.mark.parametrize(("name", "measure"), [("cosine", cosine), ("correlation", correlation)])
def test_matrices(arrays, samples, name, measure):
    figure = arrays[name]
    assert figure["similarity"].dtype == np.float32
    np.testing.assert_allclose(figure["similarity"], measure(samples[0][LAYER]), atol=1e-4)
    values = figure["similarity"][np.triu_indices(3 * EMBED, 1)]
    np.testing.assert_array_equal(figure["values"], values)
    counts, edges = np.histogram(values, bins=100)
    np.testing.assert_array_equal(figure["counts"], counts)
    np.testing.assert_array_equal(figure["edges"], edges)


def test_mask(arrays):
    vector, matrix = arrays["mask"]["vector"], arrays["mask"]["matrix"]
    assert vector.tolist() == [1] * EMBED + [2] * EMBED + [3] * EMBED
    assert sorted(np.unique(matrix)) == [0, 1, 2, 3, 4, 6, 9]
    for i, j in ((0, 1), (1, 0), (3, 3), (5, 40), (5, 80), (40, 41), (40, 80), (80, 81)):
        assert matrix[i, j] == (vector[i] * vector[j] if j > i else 0)


@pytest.mark.parametrize("measure", ["correlation", "cosine"])
def test_distributions(arrays, samples, folder, sentences, tmp_path, measure):
    if measure == "correlation":
        figure = arrays["distributions"]
    else:
        options = ("--sentences", sentences, "--measure", "cosine")
        figure = figures_of("token-similarity", tmp_path, folder, "distributions", *options)["distributions"]
    np.testing.assert_array_equal(figure["edges"], EDGES)
    for name, sample in zip(("target", "non_target"), samples, strict=True):
        similarity = {"cosine": cosine, "correlation": correlation}[measure](sample[LAYER])
        for index, pair in enumerate(ORDER):
            values = group(similarity, pair)
            expected = np.histogram(values, EDGES, density=True)[0]
            # A similarity that rounds to the other side of an edge moves one count.
            one = 1 / (values.size * 0.02)
            np.testing.assert_allclose(figure[name][index], expected, atol=1.05 * one, err_msg=pair)
            assert figure[name][index].sum() * 0.02 == pytest.approx(1, rel=1e-3)


def test_shuffled_control_has_no_group_structure(arrays, samples):
    """Entries drawn from the same values: a density like that of independent columns, whatever the group."""
    target = samples[0][LAYER]
    shuffled = np.random.default_rng(5).permutation(target.ravel()).reshape(target.shape)
    expected = np.histogram(cosine(shuffled)[np.triu_indices(3 * EMBED, 1)], EDGES, density=True)[0]
    found = arrays["distributions"]["random"]
    assert found.sum() * 0.02 == pytest.approx(1, rel=1e-3)
    assert np.abs(np.cumsum(found - expected) * 0.02).max() < 0.05


def test_pair_order(arrays):
    qq = arrays["correlation"]["similarity"][:EMBED, :EMBED]
    np.testing.assert_allclose(arrays["pair-order"]["values"], qq[np.triu_indices(EMBED, 1)], atol=1e-6)


def test_laminar(arrays, samples):
    figure = arrays["laminar"]
    assert figure["target"].shape == figure["non_target"].shape == (3, 6, 100)
    np.testing.assert_allclose(figure["target"][LAYER], arrays["distributions"]["target"], atol=1e-6)
    np.testing.assert_allclose(figure["non_target"][LAYER], arrays["distributions"]["non_target"], atol=1e-6)
    for layer in range(3):
        for index, third in enumerate(np.split(samples[0][layer], 3, axis=1)):
            assert figure["mean"][layer, index] == pytest.approx(third.mean(), abs=1e-5)
            assert figure["variance"][layer, index] == pytest.approx(third.var(), rel=1e-4)


def test_permuted_control_keeps_the_entries_and_nothing_else():
    x = np.repeat(np.arange(13.0, dtype=np.float32)[:, None], 7, axis=1) + np.arange(7, dtype=np.float32) / 10
    permuted = np.asarray(kernels.permute_entries(x, jax.random.key(3)))
    assert permuted.shape == x.shape
    np.testing.assert_array_equal(np.sort(permuted.ravel()), np.sort(x.ravel()))
    similarity = np.corrcoef(x.T)[np.triu_indices(7, 1)], np.corrcoef(permuted.T)[np.triu_indices(7, 1)]
    assert similarity[0].min() > 0.999
    assert np.abs(similarity[1]).mean() < 0.4
    np.testing.assert_array_equal(permuted, kernels.permute_entries(x, jax.random.key(3)))
    assert (permuted != np.asarray(kernels.permute_entries(x, jax.random.key(4)))).any()


def test_kernels_by_group():
    x = np.random.default_rng(0).normal(size=(11, 3 * 5)).astype(np.float32)
    correlations = np.asarray(kernels.column_correlation(x))
    np.testing.assert_allclose(correlations, np.corrcoef(x.astype(np.float64).T), atol=1e-6)
    assert tuple(kernels.GROUPS) == ORDER
    edges = np.linspace(-0.9, 0.9, 8)
    for centred, measure in ((False, cosine), (True, correlation)):
        densities = np.asarray(kernels.group_densities(x, edges, centred=centred))
        for index, name in enumerate(ORDER):
            expected = np.histogram(group(measure(x), name), edges, density=True)[0]
            np.testing.assert_allclose(densities[index], expected, rtol=1e-4)
    expected = np.histogram(cosine(x)[np.triu_indices(15, 1)], edges, density=True)[0]
    upper_density = jax.jit(lambda x: kernels.upper_density(x, edges))
    np.testing.assert_allclose(np.asarray(upper_density(x)), expected, rtol=1e-4)


def test_sentences_without_the_target(folder, tmp_path, capsys):
    path = tmp_path / "sentences.txt"
    path.write_text("a cat saw her\n her cat\na cat run\na her home\n")
    line = ["figures", "token-similarity", "means", "--arrays-only", "--sentences", str(path), "--model", str(folder)]
    line += ["--out", str(tmp_path / "out")]
    assert main(line) == 2
    err = capsys.readouterr().err
    assert "sentence 1 (' her cat') has nothing before the target ' her' (and 1 more); --skip-missing" in err
    with STUDY.start(TokenSimilarityOptions(model=(str(folder),), sentences=path, skip_missing=True)) as run:
        assert run.describe()["skipped"] == [" her cat", "a cat run"]
    samples = {"target": np.zeros((2, 3 * EMBED)), "non_target": np.zeros((2, 3 * EMBED))}
    caption = STUDY.figures["means"].display(run, {"samples": samples}).caption
    assert "2 sentences without the target were left out" in caption
    path.write_text("a cat\n")
    assert main([*line, "--skip-missing"]) == 2
    assert "two or more sentences with the target" in capsys.readouterr().err
    path.write_text("\n")
    assert main(line) == 2
    assert "no sentence in it" in capsys.readouterr().err


def test_a_target_of_several_tokens_is_refused_with_its_pieces(capsys, tmp_path):
    line = ["figures", "token-similarity", "--demo", "--target", " unquestionably", "--out", str(tmp_path)]
    assert main(line) == 2
    err = capsys.readouterr().err
    assert "' unquestionably' is not one token of" in err
    assert "' un" in err


@pytest.mark.parametrize("kind", [list, tuple, iter, np.array])
def test_sentences_from_python(folder, sentences, kind):
    """Those of the file."""
    runs = []
    for given in (Path(sentences), kind([*SENTENCES, " "])):
        options = from_keywords(TokenSimilarityOptions, {"model": folder, "sentences": given}, STUDY.name)
        with STUDY.start(options) as run:
            runs.append((run.sentences, run.positions.tolist()))
    assert runs[0] == runs[1]
    assert runs[1][0] == SENTENCES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sentences": []}, "sentences: no sentence in it"),
        ({"sentences": ["", " "]}, "sentences: no sentence in it"),
        ({"sentences": ["a her", 3]}, "sentences must be a file or texts, and sentence 1 is 3"),
        ({"sentences": "./nowhere.txt"}, "nowhere.txt: cannot be read"),
        ({"measure": "distance"}, "measure is one of correlation, cosine, not 'distance'"),
        ({"target": 3}, "target cannot be 3"),
        ({"skip_missing": 1}, "skip_missing is True or False, not 1"),
    ],
)
def test_bad_options_from_python(folder, options, message):
    with pytest.raises(JaxqkvError) as error:
        token_similarity.figure("pairs", model=folder, **options)
    assert message in str(error.value)


def test_the_studys_own_sentences():
    sentences = stimuli("token_similarity/her.txt")
    assert len(sentences) == 54
    assert all(" her" in sentence for sentence in sentences)
    with STUDY.start(TokenSimilarityOptions(demo=True)) as run:
        assert run.sentences == sentences
        display = STUDY.figures["pairs"].display(run, {"samples": {"target": np.zeros((54, 3 * 128))}})
    assert "in sentences 1 and 40" in display.caption
    assert "Q dimensions 123 and 116 over 54 sentences; layer 6 of demo-gpt2." in display.caption


def test_a_whole_run_with_weights_that_are_not_finite(sentences, tmp_path):
    check_spoilt_run(
        tmp_path,
        "token-similarity",
        CONFIG,
        WORDS,
        "--sentences",
        sentences,
        not_drawn={"cosine", "correlation"},
        bars={"layers": 3},
    )
