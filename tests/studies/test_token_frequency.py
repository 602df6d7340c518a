"""Study 3: every array of every figure against loops from the definitions, with NumPy, SciPy and PyTorch."""

import contextlib
import json
from math import sqrt

import jax
import matplotlib.image
import numpy as np
import pytest
from conftest import BERT, GPT2, ROUNDING, arrays_of, changed, figures_of, write_folder, write_word_tokenizer
from helpers import pytorch
from helpers.spoilt import check_spoilt_run
from helpers.studies import without_layout
from scipy.stats import binned_statistic

import jaxqkv
from jaxqkv.architectures.activations import Attention
from jaxqkv.cli.main import main
from jaxqkv.runtime.sizes import size_in_bytes
from jaxqkv.studies.registry import study
from jaxqkv.studies.token_frequency import reductions
from jaxqkv.studies.token_frequency import scores as score_figures

CONFIG = changed(BERT, initializer_range=0.2, n_positions=31)
WORDS = ["[UNK]", *(f" w{n}" for n in range(36))]
BATCH, LENGTH, TOKENS, BINS = 7, 29, 200, 40


# Numbers that captions and titles quote, beside the figures' arrays.
SAID = {"left_out", "left_out_pairs", "layer", "layers", "documents"}


def texts():
    """Documents of 5 to 45 words, most of them frequent ones; the later ones have words the first have not."""
    generator = np.random.default_rng(3)
    words = []
    for number in range(19):
        reach = 19 if number < 9 else 36
        words.append("".join(f" w{int(reach * u**2)}" for u in generator.random(generator.integers(5, 46))))
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_word_tokenizer(write_folder(tmp_path_factory.mktemp("model") / "tiny", CONFIG), WORDS)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()))
    return path


def sizes(corpus):
    return ["--corpus", str(corpus), "--batch", str(BATCH), "--length", str(LENGTH), "--tokens", str(TOKENS)]


@pytest.fixture(scope="module")
def arrays(folder, corpus, tmp_path_factory):
    return figures_of("token-frequency", tmp_path_factory.mktemp("study"), folder, "--no-cache", *sizes(corpus))


@pytest.fixture(scope="module")
def counted(folder):
    """Counts by token and the batch, by loops."""
    tokenizer = jaxqkv.load(folder).tokenizer
    rows = [tokenizer.encode([text], special_tokens=False)[0] for text in texts()]
    counts, total = np.zeros(CONFIG.vocab_size, int), 0
    for row in rows:
        for i in row:
            counts[i] += 1
        total += len(row)
        if total >= TOKENS:
            break
    return counts, np.array([row[:LENGTH] for row in rows if len(row) >= LENGTH][:BATCH])


@pytest.fixture(scope="module")
def log_frequency(counted):
    counts, ids = counted
    with np.errstate(divide="ignore"):
        values = np.log(counts / counts.sum())[ids]
    return np.where(np.isinf(values), np.nan, values)


@pytest.fixture(scope="module")
def torch_layers(folder, counted):
    """Scores averaged over heads `[layer, batch, query, key]` and adjustments `[layer, batch, pos]`, with hooks."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel.from_pretrained(folder, attn_implementation="eager", add_pooling_layer=False).eval()
    scores, adjustments = [], []

    def split(x):
        return x.view(BATCH, LENGTH, CONFIG.n_head, -1).transpose(1, 2)

    def score_hook(module, inputs, output):
        q, k = split(module.query(inputs[0])), split(module.key(inputs[0]))
        scores.append((q @ k.transpose(-1, -2) / sqrt(q.shape[-1])).mean(dim=1))

    for layer in model.encoder.layer:
        layer.attention.self.register_forward_hook(score_hook)
        layer.attention.output.dense.register_forward_hook(
            lambda module, inputs, output: adjustments.append(torch.log(torch.linalg.norm(output, dim=-1)))
        )
    with torch.no_grad():
        model(torch.tensor(counted[1]))
    return torch.stack(scores).double().numpy(), torch.stack(adjustments).double().numpy()


def pair_sums(row):
    return np.array([[a + b for b in row] for a in row])


def binned(row, score):
    """Centres, means and standard deviations by loops; an empty bin is NaN."""
    sums = pair_sums(row)
    known = ~np.isnan(sums)
    edges = np.percentile(sums[known], np.linspace(0, 100, BINS + 1))
    mean, std = np.full(BINS, np.nan), np.full(BINS, np.nan)
    for b in range(BINS):
        inside = (sums >= edges[b]) & ((sums < edges[b + 1]) | ((b == BINS - 1) & (sums == edges[-1])))
        if inside.any():
            mean[b], std[b] = score[inside].mean(), score[inside].std()
    return (edges[:-1] + edges[1:]) / 2, mean, std


def correlation(x, y):
    known = ~np.isnan(x) & ~np.isnan(y)
    return np.corrcoef(x[known], y[known])[0, 1]


def test_every_figure_is_there_with_the_shapes_of_the_table(arrays):
    assert set(arrays) == set(study("token-frequency").figures)
    layer, pair = CONFIG.n_layer, BATCH * (LENGTH**2 // 500 + 1)
    shapes = {
        "1": {"counts": (CONFIG.vocab_size,), "log_frequency": (CONFIG.vocab_size,)},
        "2": {"ids": (BATCH, LENGTH)},
        "4a": {"log_frequency": (BATCH, LENGTH), "adjustment": (3, BATCH, LENGTH), "r": (3,)},
        "4b": {"r": (layer,)},
        "5a": {"pair_log_frequency": (LENGTH, LENGTH)},
        "5-edges": {"percentile_edges": (BINS + 1,), "linear_edges": (BINS + 1,)},
        "5c": {"centres": (BATCH, BINS), "mean": (BATCH, BINS), "std": (BATCH, BINS)},
        "5d": {"r_mean": (BATCH,), "r_std": (BATCH,)},
        "6": {"centres": (layer, BINS), "mean": (layer, BINS), "std": (layer, BINS)}
        | dict.fromkeys(("r_mean", "r_std"), (layer,)),
    }
    for id, expected in shapes.items():
        assert {name: array.shape for name, array in arrays[id].items() if name not in SAID} == expected, id
    assert arrays["5b"]["score"].shape == arrays["5b"]["pair_log_frequency"].shape
    assert arrays["4a"]["layers"].tolist() == [0, 1, 2]
    assert {int(arrays[id]["layer"]) for id in ("5b", "5c", "5d")} == {1}
    assert arrays["5b"]["score"].shape == (pair,)


class TestCorpus:
    def test_counts(self, arrays, counted):
        counts, _ = counted
        assert 0 < (counts == 0).sum() < counts.size - 5
        np.testing.assert_array_equal(arrays["1"]["counts"], counts)
        seen = counts > 0
        np.testing.assert_allclose(arrays["1"]["log_frequency"][seen], np.log(counts[seen] / counts.sum()), rtol=1e-12)
        assert np.isnan(arrays["1"]["log_frequency"][~seen]).all()

    def test_batch(self, arrays, counted):
        np.testing.assert_array_equal(arrays["2"]["ids"], counted[1])

    def test_tokens_never_counted_are_left_out_and_their_number_saved(self, arrays, log_frequency):
        left_out = np.isnan(log_frequency).sum()
        assert left_out > 0
        for id in ("4a", "4b", "5a", "5b", "5-edges", "5c", "5d", "6"):
            assert arrays[id]["left_out"] == left_out
        np.testing.assert_array_equal(np.isnan(arrays["4a"]["log_frequency"]), np.isnan(log_frequency))


class TestAgainstPyTorch:
    def test_adjustments(self, arrays, log_frequency, torch_layers):
        _, adjustments = torch_layers
        np.testing.assert_allclose(arrays["4a"]["log_frequency"], log_frequency, rtol=1e-12)
        np.testing.assert_allclose(arrays["4a"]["adjustment"], adjustments[[0, 1, 2]], atol=2e-6)
        r = [correlation(log_frequency[:, 1:].ravel(), a[:, 1:].ravel()) for a in adjustments]
        np.testing.assert_allclose(arrays["4a"]["r"], np.array(r)[[0, 1, 2]], atol=2e-6)
        np.testing.assert_allclose(arrays["4b"]["r"], r, atol=2e-6)

    def test_pairs(self, arrays, log_frequency, torch_layers):
        scores, _ = torch_layers
        np.testing.assert_allclose(arrays["5a"]["pair_log_frequency"], pair_sums(log_frequency[0]), rtol=1e-12)
        sums = np.concatenate([pair_sums(row).ravel()[::500] for row in log_frequency])
        values = np.concatenate([each.ravel()[::500] for each in scores[1]])  # layer 5 of 3 layers: the middle
        known = ~np.isnan(sums)
        np.testing.assert_allclose(arrays["5b"]["pair_log_frequency"], sums[known], rtol=1e-12)
        np.testing.assert_allclose(arrays["5b"]["score"], values[known], atol=1e-5)

    def test_edges(self, arrays, log_frequency):
        sums = pair_sums(log_frequency[-1])
        sums = sums[~np.isnan(sums)]
        np.testing.assert_allclose(
            arrays["5-edges"]["percentile_edges"], np.percentile(sums, np.linspace(0, 100, BINS + 1)), rtol=1e-12
        )
        np.testing.assert_allclose(arrays["5-edges"]["linear_edges"], np.linspace(sums.min(), sums.max(), BINS + 1))

    def test_one_layer_binned(self, arrays, log_frequency, torch_layers):
        expected = [binned(row, score) for row, score in zip(log_frequency, torch_layers[0][1], strict=True)]
        assert any(np.isnan(mean).any() for _, mean, _ in expected)  # repeated edges do occur
        for name, column in zip(("centres", "mean", "std"), zip(*expected, strict=True), strict=True):
            np.testing.assert_allclose(arrays["5c"][name], column, atol=3e-6, err_msg=name)
        for index, name in ((1, "r_mean"), (2, "r_std")):
            r = [correlation(each[0], each[index]) for each in expected]
            np.testing.assert_allclose(arrays["5d"][name], r, atol=2e-5)

    def test_every_layer_binned(self, arrays, log_frequency, torch_layers):
        for layer, scores in enumerate(torch_layers[0]):
            each = np.array([binned(row, score) for row, score in zip(log_frequency, scores, strict=True)])
            each[:, 0][np.isnan(each[:, 1])] = np.nan
            centres, mean, std = np.nanmean(each, axis=0)
            for name, expected in (("centres", centres), ("mean", mean), ("std", std)):
                np.testing.assert_allclose(arrays["6"][name][layer], expected, atol=3e-6, err_msg=name)
            assert arrays["6"]["r_mean"][layer] == pytest.approx(np.corrcoef(centres, mean)[0, 1], abs=2e-5)
            assert arrays["6"]["r_std"][layer] == pytest.approx(np.corrcoef(centres, std)[0, 1], abs=2e-5)

    def test_bins_are_scipys_where_it_does_not_raise(self, log_frequency, torch_layers):
        compared = 0
        for row, score in zip(log_frequency, torch_layers[0][1], strict=True):
            sums = pair_sums(row)
            known = ~np.isnan(sums)
            edges = np.percentile(sums[known], np.linspace(0, 100, 6))
            if len(set(edges)) == 6:
                index = np.full(sums.shape, -1)
                index[known] = jaxqkv.kernels.bin_index(sums[known], edges)
                _, mean, _ = jaxqkv.kernels.binned_moments(score.ravel().astype(np.float32), index.ravel(), n_bin=5)
                expected, *_ = binned_statistic(sums[known], score[known], "mean", bins=edges)
                np.testing.assert_allclose(mean, expected, atol=2e-6)
                compared += 1
        assert compared


def test_the_mean_over_heads_is_one_product_of_the_whole_width():
    q, k = np.random.default_rng(0).normal(size=(2, 3, 5, 11, 7)).astype(np.float32)
    ours = jax.jit(lambda q, k: reductions.mean_score(Attention(q=q, k=k)))(q, k)
    expected, size = (
        (a.astype(np.float64) @ b.swapaxes(-1, -2)).mean(axis=1) / sqrt(7) for a, b in ((q, k), (abs(q), abs(k)))
    )
    assert (np.abs(ours - expected) <= (5 * 7 + 2) * ROUNDING * size).all()


def test_neither_memory_nor_other_figures_change_a_number(arrays, folder, corpus, tmp_path):
    ids = {"4a", "5b", "5c", "6"}
    again = figures_of("token-frequency", tmp_path, folder, *ids, "--memory", "1KB", *sizes(corpus))
    assert set(again) == ids
    for id in ids:
        for name, array in again[id].items():
            np.testing.assert_allclose(array, arrays[id][name], rtol=1e-5, atol=2e-6, err_msg=f"{id} {name}")


def layers_run(monkeypatch):
    """The layers of each run of a model, in a list that grows."""
    layers, run = [], jaxqkv.Model.run
    monkeypatch.setattr(
        jaxqkv.Model, "run", lambda *a, **options: layers.append(options["layers"]) or run(*a, **options)
    )
    return layers


def test_figures_of_tokens_run_no_layer(folder, corpus, tmp_path, monkeypatch):
    layers = layers_run(monkeypatch)
    figures_of("token-frequency", tmp_path, folder, "1", "2", "5a", "5-edges", *sizes(corpus))
    assert layers == []


def test_layer_overrides_both_and_is_run_alone_and_pairs_of_tokens_never_counted_are_left_out(
    folder, corpus, tmp_path, monkeypatch, torch_layers, log_frequency
):
    layers = layers_run(monkeypatch)
    for module in (reductions, score_figures):
        monkeypatch.setattr(module, "EVERY", 53)
    again = figures_of("token-frequency", tmp_path, folder, "5b", "5c", "--layer", "2", *sizes(corpus))
    assert layers == [[2]]
    expected = [binned(row, score)[1] for row, score in zip(log_frequency, torch_layers[0][2], strict=True)]
    np.testing.assert_allclose(again["5c"]["mean"], expected, atol=3e-6)
    sums = np.concatenate([pair_sums(row).ravel()[::53] for row in log_frequency])
    values = np.concatenate([each.ravel()[::53] for each in torch_layers[0][2]])
    known = ~np.isnan(sums)
    assert 0 < known.sum() < known.size
    assert again["5b"]["left_out_pairs"] == known.size - known.sum()
    np.testing.assert_allclose(again["5b"]["pair_log_frequency"], sums[known], rtol=1e-12)
    np.testing.assert_allclose(again["5b"]["score"], values[known], atol=1e-5)


def test_with_none_left_out_the_numbers_are_those_of_the_plain_definition(folder, corpus, tmp_path, torch_layers):
    everything = [*sizes(corpus)[:-1], "100000"]
    again = figures_of("token-frequency", tmp_path, folder, *everything)
    tokenizer = jaxqkv.load(folder).tokenizer
    counts = np.bincount(np.concatenate(tokenizer.encode(texts(), special_tokens=False)), minlength=CONFIG.vocab_size)
    ids = again["2"]["ids"]
    x = np.log(counts / counts.sum(), where=counts > 0, out=np.zeros(counts.size))[ids]
    assert again["4b"]["left_out"] == 0
    r = [np.corrcoef(x[:, 1:].ravel(), a[:, 1:].ravel())[0, 1] for a in torch_layers[1]]
    np.testing.assert_allclose(again["4b"]["r"], r, atol=2e-6)


GPT2_CONFIG = changed(GPT2, n_positions=31)


def test_gpt2_instead_of_bert(corpus, tmp_path):
    gpt2 = write_word_tokenizer(write_folder(tmp_path / "gpt2", GPT2_CONFIG), WORDS)
    again = figures_of("token-frequency", tmp_path, gpt2, *sizes(corpus))
    theirs = pytorch.load(gpt2)
    attn_out = np.stack([pytorch.activations(theirs, row)["attn_out"] for row in again["2"]["ids"]], axis=1)
    np.testing.assert_allclose(again["4a"]["adjustment"], np.log(np.linalg.norm(attn_out, axis=-1)), atol=2e-6)


def test_a_whole_run_with_weights_that_are_not_finite(corpus, tmp_path):
    bars = {"tokens": TOKENS, "sequences": BATCH}
    line = (*sizes(corpus), "--no-cache")
    check_spoilt_run(tmp_path, "token-frequency", GPT2_CONFIG, WORDS, *line, not_drawn=(), bars=bars)


def test_a_constant_adjustment_has_no_correlation_and_the_caption_says_so(corpus, tmp_path, capsys):
    tensors = write_zeroed(tmp_path / "zero")
    out = tmp_path / "out"
    line = ["figures", "token-frequency", "--arrays-only", "--out", str(out), "--model", str(tensors)]
    assert main([*line, *sizes(corpus)]) == 0
    r = arrays_of(out / "token-frequency" / "4b.npz")["r"]
    assert np.isnan(r[1])
    assert np.isfinite(r[[0, 2]]).all()
    manifest = json.loads((out / "token-frequency" / "manifest.json").read_text())
    assert "1 of 3 correlations undefined" in manifest["figures"]["4b"]["caption"]


def write_zeroed(path):
    """A checkpoint whose layer 1 adds the same vector everywhere."""
    from conftest import random_tensors

    tensors = random_tensors(CONFIG)
    tensors["encoder.layer.1.attention.output.dense.weight"][:] = 0
    return write_word_tokenizer(write_folder(path, CONFIG, tensors), WORDS)


@pytest.mark.parametrize("case", ["usual", "nothing counted"])
def test_every_figure_is_drawn(folder, corpus, tmp_path, case):
    more = sizes(corpus)
    if case == "nothing counted":  # the first document has none of the words of the long ones
        path = tmp_path / "several.jsonl"
        documents = [" w1 w2", *([" w7" * LENGTH] * BATCH)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        more = [*sizes(path)[:-1], "1"]
    line = ["figures", "token-frequency", "--model", str(folder), "--dpi", "20", "--out", str(tmp_path), *more]
    with contextlib.nullcontext() if case == "usual" else without_layout():
        assert main(line) == 0
    for id in study("token-frequency").figures:
        pixels = matplotlib.image.imread(tmp_path / "token-frequency" / f"{id}.png")
        assert pixels[..., :3].std() > 0.02, id


class TestCommand:
    def run(self, folder, corpus, tmp_path, *more):
        line = ["figures", "token-frequency", "--arrays-only", "--out", str(tmp_path / "out"), "--model", str(folder)]
        return main([*line, "--corpus", str(corpus), *more])

    def test_the_manifest_says_what_was_counted_and_left_out(self, folder, corpus, tmp_path, capsys, log_frequency):
        assert self.run(folder, corpus, tmp_path, *sizes(corpus)[2:], "5a") == 0
        manifest = json.loads((tmp_path / "out" / "token-frequency" / "manifest.json").read_text())
        assert manifest["corpus"]["files"].keys() == {str(corpus)}
        assert manifest["batch"] == [BATCH, LENGTH]
        assert manifest["left out"] == np.isnan(log_frequency).sum()
        assert f"{manifest['left out']} of the batch's {BATCH * LENGTH} tokens were never" in capsys.readouterr().out

    def test_a_corpus_shorter_than_asked_for_is_counted_whole_and_said(self, folder, corpus, tmp_path, capsys):
        assert self.run(folder, corpus, tmp_path, "1") == 0
        out = capsys.readouterr().out
        total = arrays_of(tmp_path / "out" / "token-frequency" / "1.npz")["counts"].sum()
        assert f"has {total} tokens, fewer than 1,000,000; all are counted" in out
        assert out.index("' w0'") < out.index("' w2'")  # the table of the most frequent tokens

    def test_unknown_words_are_counted_as_the_unknown_token(self, folder, tmp_path):
        path = tmp_path / "unknown.txt"
        path.write_text(" w1 never never w1 w1")
        assert self.run(folder, path, tmp_path, "1") == 0
        counts = arrays_of(tmp_path / "out" / "token-frequency" / "1.npz")["counts"]
        assert (counts[0], counts[2], counts.sum()) == (2, 3, 5)

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["--batch", "17", "--length", "29"], "documents have 29 tokens or more, and 17 are needed; --batch"),
            (["--length", "32"], "--length 32: tiny has 31 positions"),
            (["--memory", "much"], "much is not a size such as 2GB or 500MB"),
            (["--memory", "0"], "0 is not a size such as 2GB"),
            (["--tokens", "0"], "0 is not a whole number from 1 up"),
            (["--text-column", "body"], "line 1: no column 'body'; it has text"),
        ],
    )
    def test_refusals(self, folder, corpus, tmp_path, capsys, more, message):
        try:
            status = self.run(folder, corpus, tmp_path, *more)
        except SystemExit as exit:
            status = exit.code
        assert status == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in error

    def test_sizes_of_memory(self):
        sizes = {"2GB": 2 * 10**9, "500MB": 5 * 10**8, "1.5 GiB": 3 << 29, "64k": 64_000, "7": 7, "3KiB": 3072}
        assert {text: size_in_bytes(text) for text in sizes} == sizes
