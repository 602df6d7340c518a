"""Study 2: every array of every figure against NumPy loops from the definitions in the figure table."""

import json
from math import sqrt

import numpy as np
import pytest
from conftest import BERT, GPT2, changed, figures_of, write_folder, write_word_tokenizer
from helpers import pytorch
from helpers.checkpoints import WORDS
from helpers.spoilt import check_spoilt_run

import jaxqkv
from jaxqkv import kernels
from jaxqkv.cli.main import main
from jaxqkv.errors import NotDrawable
from jaxqkv.studies import attention_scores
from jaxqkv.studies.registry import study
from jaxqkv.studies.stimuli import stimuli

CONFIG = changed(GPT2, initializer_range=0.2)
TEXT = "a cat saw her run home a cat saw her run"  # eleven tokens
LAYER, HEADS, POS = 1, 5, 11


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_word_tokenizer(write_folder(tmp_path_factory.mktemp("model") / "tiny", CONFIG), WORDS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def arrays(folder, base):
    return figures_of("attention-scores", base, folder, "--text", TEXT)


def manifest_of(base):
    return json.loads((base / "out/attention-scores/manifest.json").read_text())


@pytest.fixture(scope="module")
def qk(folder):
    """Q and K in float64, `[layer, head, pos, head_dim]`."""
    model = jaxqkv.load(folder)
    activations = model.run(model.tokenize(TEXT), capture={"q", "k"})
    return np.asarray(activations.q[:, 0], np.float64), np.asarray(activations.k[:, 0], np.float64)


def last_token(q, k):
    """The seed's double loop over heads."""
    within, across = [], []
    for qi in range(len(q)):
        for ki in range(len(k)):
            products = q[qi, -1] @ k[ki].T / sqrt(q.shape[-1])
            (within if qi == ki else across).extend(products[1:-1])
    return np.array(within), np.array(across)


def scores(q, k):
    return np.stack([q[h] @ k[h].T / sqrt(q.shape[-1]) for h in range(HEADS)])


def softmax(x):
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def causal(q, k):
    hidden = np.triu(np.ones((q.shape[1], q.shape[1]), bool), 1)
    return softmax(np.where(hidden, -np.inf, scores(q, k)))


def pattern_samples(pattern):
    final = np.concatenate([each[-1, :-1] for each in pattern])
    diagonal = [np.diagonal(each) for each in pattern]
    return final, np.concatenate([d[1:] for d in diagonal]), np.array([d[0] for d in diagonal])


def test_all_figures_of_the_table_are_there(arrays):
    assert sorted(arrays) == sorted(["1", "3", "4", "5a", "5b", "6", "7a", "7b", "8", "9"])


def test_1(arrays):
    figure = arrays["1"]
    np.testing.assert_array_equal(figure["n"], np.arange(5, 101))
    np.testing.assert_allclose(figure["scaled"], figure["raw"] / np.sqrt(figure["n"]), rtol=1e-12)
    # A standard deviation over n² products of n terms scatters by about 1/n.
    assert (np.abs(figure["scaled"] - 1) < 5 / figure["n"]).all()


def test_3(arrays, qk):
    assert arrays["3"]["q"].shape == (HEADS, POS, 7)
    np.testing.assert_allclose(arrays["3"]["q"], qk[0][LAYER], atol=1e-6)


def test_4(arrays, qk):
    for name, sample in zip(("within", "across"), last_token(qk[0][LAYER], qk[1][LAYER]), strict=True):
        assert sample.size == {"within": HEADS * (POS - 2), "across": HEADS * (HEADS - 1) * (POS - 2)}[name]
        found = arrays["4"][name]
        np.testing.assert_allclose(found, sample, atol=1e-5)
        density, edges = np.histogram(found, bins="fd", density=True)
        np.testing.assert_allclose(arrays["4"][f"density_{name}"], density, rtol=1e-5)
        np.testing.assert_allclose(arrays["4"][f"edges_{name}"], edges)


def test_5a_and_5b(arrays, qk):
    edges = np.linspace(-20, 20, 101)
    np.testing.assert_array_equal(arrays["5a"]["edges"], edges)
    density = arrays["5a"]["density"]
    assert density.shape == (3, 2, 100)
    for layer in range(3):
        for group, sample in enumerate(last_token(qk[0][layer], qk[1][layer])):
            expected = np.histogram(sample, edges, density=True)[0]
            np.testing.assert_allclose(density[layer, group], expected, rtol=1e-4)
    np.testing.assert_allclose(arrays["5b"]["mean"], density.mean(axis=0), atol=1e-7)
    np.testing.assert_allclose(arrays["5b"]["std"], density.std(axis=0), atol=1e-7)


def test_6(arrays, qk):
    figure = arrays["6"]
    np.testing.assert_array_equal(figure["edges"], np.linspace(-15, 15, 201))
    assert figure["softmax_edges"].shape == (3, 202)
    for layer in range(3):
        raw = scores(qk[0][layer], qk[1][layer])
        assert figure["mean"][layer] == pytest.approx(raw.mean(), abs=1e-5)
        assert figure["std"][layer] == pytest.approx(raw.std(ddof=1), rel=1e-5)
        expected = np.histogram(raw, np.linspace(-15, 15, 201), density=True)[0]
        np.testing.assert_allclose(figure["density"][layer], expected, rtol=1e-4)
        shares = softmax(raw)
        edges = figure["softmax_edges"][layer]
        np.testing.assert_allclose(edges, np.linspace(shares.min(), shares.max(), 202), atol=1e-6)
        density = figure["softmax_density"][layer]
        assert (density * np.diff(edges)).sum() == pytest.approx(1, rel=1e-4)
        # A share that rounds to the other side of an edge moves one count.
        one = 1 / (shares.size * np.diff(edges).mean())
        expected = np.histogram(shares, np.linspace(shares.min(), shares.max(), 202), density=True)[0]
        np.testing.assert_allclose(density, expected, atol=1.05 * one)


def test_7a(arrays):
    for i, j in np.ndindex(5, 5):
        assert arrays["7a"]["mask"][i, j] == (j > i)
        assert arrays["7a"]["softmax"][i, j] == pytest.approx(0 if j > i else 1 / (i + 1))


def test_7b_and_8(arrays, qk):
    names = ("final_to_previous", "self_other", "self_first")
    for name, sample in zip(names, pattern_samples(causal(qk[0][LAYER], qk[1][LAYER])), strict=True):
        np.testing.assert_allclose(arrays["7b"][name], sample, atol=1e-6)
    assert (arrays["7b"]["self_first"] == 1).all()
    edges = np.linspace(0, 1, 91)
    np.testing.assert_array_equal(arrays["8"]["edges"], edges)
    assert arrays["8"]["density"].shape == (3, 3, 90)
    for layer in range(3):
        for index, sample in enumerate(pattern_samples(causal(qk[0][layer], qk[1][layer]))):
            expected = np.histogram(sample, edges, density=True)[0]
            np.testing.assert_allclose(arrays["8"]["density"][layer, index], expected, rtol=1e-4)


def test_9(arrays, qk):
    q, k = qk[0][LAYER], qk[1][LAYER]
    wide = [np.concatenate(list(x), axis=-1) for x in (q, k)]
    expected = wide[0] @ wide[1].T / (sqrt(7) * HEADS)
    np.testing.assert_allclose(arrays["9"]["all_heads"], expected, atol=1e-5)
    np.testing.assert_allclose(arrays["9"]["mean_of_heads"], scores(q, k).mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(arrays["9"]["all_heads"], arrays["9"]["mean_of_heads"], atol=1e-5)


def test_texts_of_a_batch_are_pooled_and_pads_never_counted(folder, tmp_path, base, arrays, qk):
    """Two texts of different length: each sample is the two texts' samples one after the other."""
    short = "a cat saw her run"
    acts = pytorch.activations(pytorch.load(folder), jaxqkv.load(folder).tokenizer.encode([short])[0])
    alone = [qk, [acts[name].reshape(3, 5, HEADS, 7).swapaxes(1, 2) for name in "qk"]]
    more = ["--text", TEXT, short, "--layer", str(LAYER)]
    together = figures_of("attention-scores", tmp_path, folder, "3", "4", "5a", "6", "7b", *more)
    of_layer = [(q[LAYER], k[LAYER]) for q, k in alone]
    within, across = zip(*(last_token(q, k) for q, k in of_layer), strict=True)
    final, self_other, _ = zip(*(pattern_samples(causal(q, k)) for q, k in of_layer), strict=True)
    samples = {("4", "within"): within, ("4", "across"): across}
    samples |= {("7b", "final_to_previous"): final, ("7b", "self_other"): self_other}
    for (id, name), expected in samples.items():
        expected = np.sort(np.concatenate(expected))
        np.testing.assert_allclose(np.sort(together[id][name]), expected, atol=1e-5, err_msg=f"{id} {name}")
    for layer in range(3):
        expected = np.concatenate([scores(q[layer], k[layer]).ravel() for q, k in alone]).mean()
        assert together["6"]["mean"][layer] == pytest.approx(expected, abs=1e-5)
    np.testing.assert_allclose(together["3"]["q"], arrays["3"]["q"], atol=1e-5)
    # How long the texts are, in captions of all and of the first.
    one, two = (manifest_of(each)["figures"] for each in (base, tmp_path))
    assert one["5a"]["caption"].endswith("colours from 0 to 0.15. 11 tokens.")
    assert "in the original.) 11 tokens." in one["3"]["caption"]
    assert two["5a"]["caption"].endswith("0.15. 2 texts of 5 to 11 tokens, pooled.")
    assert two["3"]["caption"].endswith(" 11 tokens, the first of 2 texts.")


@pytest.mark.parametrize("side", ["left", "right"])
def test_kernels_ignore_padding(side):
    """Samples of a padded batch are those of each sequence alone."""
    generator = np.random.default_rng(0)
    lengths, width = [7, 3, 1], 7
    q, k = (generator.normal(size=(3, 2, width, 5)).astype(np.float32) for _ in range(2))
    pattern = generator.random((3, 2, width, width)).astype(np.float32)
    mask = np.arange(width) < np.array(lengths)[:, None]
    mask = mask if side == "right" else mask[:, ::-1].copy()
    first, last = kernels.first_and_last(mask)
    assert first.tolist() == [0, 0, 0] if side == "right" else [0, 4, 6]
    assert last.tolist() == [6, 2, 0] if side == "right" else [6, 6, 6]
    padded = [*kernels.last_token_scores(q, k, mask), *kernels.causal_samples(pattern, mask)]
    for row, real in enumerate(mask):
        alone = [*last_token(q[row][:, real], k[row][:, real]), *pattern_samples(pattern[row][:, real][..., real])]
        for sample, expected in zip(padded, alone, strict=True):
            chosen = np.broadcast_to(sample.where, sample.values.shape)[row]
            # A sum rounds by its terms.
            np.testing.assert_allclose(np.asarray(sample.values)[row][chosen], expected, rtol=1e-5, atol=1e-6)


def test_only_the_layers_that_are_needed_are_run(folder, tmp_path, monkeypatch):
    read = []
    original = jaxqkv.Weights.layer
    monkeypatch.setattr(jaxqkv.Weights, "layer", lambda self, layer: read.append(layer) or original(self, layer))
    options = ["--arrays-only", "--out", str(tmp_path), "--model", str(folder), "--text", TEXT]
    for ids, layers in ((["3", "4", "9"], [0, 1]), (["1", "7a"], []), (["3", "5a", "6", "8"], [0, 1, 2])):
        read.clear()
        assert main(["figures", "attention-scores", *ids, *options]) == 0
        assert read == layers


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """A checkpoint of one layer, for which one program is compiled where others need two."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    return write_word_tokenizer(write_folder(path, changed(CONFIG, n_layer=1)), WORDS)


def test_one_token_is_too_few_for_most_figures(shallow, tmp_path, capsys):
    arrays = figures_of("attention-scores", tmp_path, shallow, "--text", "a")
    missing = {"4": 3, "5a": 3, "5b": 3, "7b": 2, "8": 2}
    assert set(study("attention-scores").figures) - set(arrays) == missing.keys()
    err = capsys.readouterr().err
    for id, count in missing.items():
        assert f"jaxqkv: {id} is not drawn: figure {id} needs a text of {count} tokens or more, not 1" in err


def test_two_tokens_are_enough_for_causal_patterns(shallow, tmp_path, capsys):
    line = ["figures", "attention-scores", "4", "7b", "8", "--arrays-only", "--model", str(shallow)]
    assert main([*line, "--text", "a cat", "--out", str(tmp_path)]) == 2
    assert {path.stem for path in (tmp_path / "attention-scores").glob("*.npz")} == {"7b", "8"}
    assert "figure 4 needs a text of 3 tokens or more, not 2" in capsys.readouterr().err


def test_bert_where_it_makes_sense(tmp_path, monkeypatch, capsys):
    folder = write_word_tokenizer(write_folder(tmp_path / "bert", changed(BERT, initializer_range=0.2)), WORDS)
    arrays = figures_of("attention-scores", tmp_path, folder, "--text", TEXT)
    assert set(study("attention-scores").figures) - set(arrays) == {"7b", "8"}
    assert "7b is not drawn: figure 7b is about causal attention, and bert attends to later tokens too" in (
        capsys.readouterr().err
    )
    model = jaxqkv.load(folder)
    acts = model.run(model.tokenize(TEXT), capture={"q", "k"})
    expected = np.asarray(acts.q) @ np.asarray(acts.k).swapaxes(-1, -2) / sqrt(7)
    np.testing.assert_allclose(arrays["6"]["mean"], expected.mean(axis=(1, 2, 3, 4)), atol=1e-5)
    read = []
    monkeypatch.setattr(jaxqkv.Weights, "layer", lambda self, layer: read.append(layer))
    with pytest.raises(NotDrawable, match="figure 8 is about causal attention, and bert attends to later tokens too"):
        attention_scores.figure("8", model=folder, text=TEXT)
    assert not read


def test_text_files_and_manifest(folder, tmp_path, arrays):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    again = figures_of("attention-scores", tmp_path, folder, "4", "--text-file", str(path))
    np.testing.assert_array_equal(again["4"]["within"], arrays["4"]["within"])
    manifest = manifest_of(tmp_path)
    assert manifest["text"] == [TEXT]
    assert manifest["layer"] == LAYER


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "a", "--text-file", "x"], "--text and --text-file exclude each other"),
        (["--text-file", "nowhere.txt"], "nowhere.txt: cannot be read (No such file or directory)"),
        (["--text", ""], "text 0 is empty"),
        (["--text", "a" + " cat" * 17], "text 0 has 18 tokens, more than the model's 17 positions"),
        (["--model", "a", "b"], "attention-scores draws one checkpoint at a time, not a, b"),
    ],
)
def test_bad_questions(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    model = [] if "--model" in arguments else ["--model", str(folder)]
    assert main(["figures", "attention-scores", *model, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_options_of_other_studies_are_unknown(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["figures", "attention-scores", "--demo", "--target", " her"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --target" in capsys.readouterr().err


def test_the_studys_own_text():
    """115 tokens of GPT-2's tokenizer in the original; here the bundled one's, and nothing but the text."""
    (text,) = stimuli("attention_scores/purple.txt")
    assert text.startswith("Purple is a color similar in appearance to violet light.")
    assert text.endswith("According to color theory, purple is considered a cool color.")
    assert jaxqkv.load("demo-gpt2").tokenize(text).ids.shape[0] == 1


def test_numbers_against_pytorch(folder, arrays):
    """The study's quantities straight from a PyTorch model with hooks and loops."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    pytest.importorskip("transformers", exc_type=ImportError)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    found = {}
    for index, block in enumerate(model.transformer.h):
        block.attn.c_attn.register_forward_hook(lambda m, a, out, index=index: found.update({index: out.detach()}))
    ids = torch.tensor(np.asarray(jaxqkv.load(folder).tokenize(TEXT).ids)).long()
    with torch.no_grad():
        patterns = model(ids, output_attentions=True).attentions
    for layer in range(3):
        q, k, _ = (x[0].unflatten(-1, (HEADS, 7)).transpose(0, 1) for x in found[layer].split(35, dim=-1))
        raw = q @ k.transpose(-1, -2) / sqrt(7)
        assert arrays["6"]["mean"][layer] == pytest.approx(raw.mean().item(), abs=1e-5)
        assert arrays["6"]["std"][layer] == pytest.approx(raw.std().item(), rel=1e-5)
        if layer == LAYER:
            final = patterns[layer][0, :, -1, :-1].flatten()
            np.testing.assert_allclose(arrays["7b"]["final_to_previous"], final, atol=1e-6)
            within = torch.cat([raw[h, -1, 1:-1] for h in range(HEADS)])
            np.testing.assert_allclose(arrays["4"]["within"], within, atol=1e-5)


def test_layerwise_is_run_one_layer_at_a_time(folder, qk):
    model = jaxqkv.load(folder)
    seen = []
    for layer, attention in model.layerwise(model.tokenize(TEXT), capture={"q", "k"}, layers=[0, 2]):
        np.testing.assert_allclose(np.asarray(attention.q)[0], qk[0][layer], atol=1e-5)
        np.testing.assert_allclose(np.asarray(attention.k)[0], qk[1][layer], atol=1e-5)
        assert attention.v is None
        seen.append(layer)
    assert seen == [0, 2]


def test_a_whole_run_with_weights_that_are_not_finite(tmp_path):
    check_spoilt_run(tmp_path, "attention-scores", CONFIG, WORDS, "--text", TEXT, not_drawn={"4"}, bars={"layers": 3})
