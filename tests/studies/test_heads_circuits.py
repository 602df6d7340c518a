"""Study 12, the circuits of the heads: against whole matrices in NumPy's float64, and a model made by hand."""

import numpy as np
import pytest
from conftest import CONFIGS, GPT2, arrays_of, changed, figures_of, random_tensors, write_folder
from helpers.checkpoints import MANY_TEXT, MANY_WORDS, write_checkpoint_of_words
from helpers.induction import INDUCTION, PREVIOUS, write_induction
from helpers.oracles import attention_of
from helpers.spoilt import check_spoilt_run
from helpers.studies import displayed, without_layout
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import jensenshannon, squareform
from scipy.stats import false_discovery_control

import jaxqkv
from jaxqkv.architectures import open_checkpoint
from jaxqkv.checkpoints.fresh import FreshCheckpoint
from jaxqkv.checkpoints.weights import Weights
from jaxqkv.cli.main import main
from jaxqkv.errors import NotDrawable
from jaxqkv.studies import heads
from jaxqkv.studies.heads.layers import Layers, pairs_of_layers
from jaxqkv.studies.heads.pairs_of_heads import compositions, divergences, similarities
from jaxqkv.studies.heads.similarity import ward_order

FIGURES = ("copying", "spectra", "composition", "similarity")
LAYERS, HEADS, EMBED, DIM = GPT2.n_layer, GPT2.n_head, GPT2.n_embd, GPT2.head_dim
NULL = 3
# Float32 against float64: rounding of sums of some hundreds of terms of both signs.
LIMIT = 1e-5


class Whole:
    """The circuits of a checkpoint as whole matrices in float64, from the definitions, `[layer · head]` of each."""

    def __init__(self, checkpoint, raw=False):
        weights, config = Weights(checkpoint), checkpoint.config
        folded = config.model_type == "gpt2" and not raw
        n = config.n_embd
        centre = np.eye(n) - np.ones((n, n)) / n if folded else np.eye(n)
        self.qk, self.ov, self.copied, self.w_q = ([] for _ in range(4))
        for layer in range(config.n_layer):
            q, k, v, o = (getattr(weights, f"W_{name}")(layer).astype(np.float64) for name in "QKVO")
            gamma = np.asarray(weights[f"h.{layer}.ln_1.weight"], np.float64) if folded else np.ones(n)
            for head in range(config.n_head):
                part = slice(head * config.head_dim, (head + 1) * config.head_dim)
                read_q, read_k, read_v = (centre @ np.diag(gamma) @ each[:, part] for each in (q, k, v))
                self.w_q.append(read_q)
                self.qk.append(read_q @ read_k.T / np.sqrt(config.head_dim))
                self.ov.append(read_v @ o[part] @ centre)
                self.copied.append(read_v @ o[part])
        if config.has_logits:
            final = np.diag(np.asarray(weights["ln_f.weight"], np.float64)) if folded else np.eye(n)
            tokens, logits = weights.W_E.astype(np.float64), weights.W_U.astype(np.float64)
            values = [np.linalg.eigvals(tokens @ each @ final @ logits) for each in self.copied]
            self.copying = np.array([each.real.sum() / np.abs(each).sum() for each in values])


@pytest.fixture(autouse=True, scope="module")
def _together():
    """In one worker: most tests run the same programs."""


@pytest.fixture(scope="module", params=["gpt2", "gpt2 raw", "bert"])
def drawn(request, tmp_path_factory):
    """The checkpoint, its whole matrices, the arrays of its figures, and the names of its pictures."""
    name, _, raw = request.param.partition(" ")
    base = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    config = changed(CONFIGS[name], **({"tie_word_embeddings": False} if name == "gpt2" and raw else {}))
    folder = write_checkpoint_of_words(base / "tiny", config)
    ids = FIGURES if config.has_logits else set(FIGURES) - {"copying"}
    line = ["figures", "heads", *ids, "--text", MANY_TEXT.strip(), "--null", "0", *(["--raw"] if raw else [])]
    line += ["--dpi", "40"] if request.param == "gpt2" else ["--arrays-only"]
    with without_layout():
        assert main([*line, "--model", str(folder), "--out", str(base / "out")]) == 0
    arrays = {path.stem: arrays_of(path) for path in (base / "out" / "heads").glob("*.npz")}
    pictures = {path.stem for path in (base / "out" / "heads").glob("*.png")}
    checkpoint = open_checkpoint(str(folder))
    return checkpoint, Whole(checkpoint, bool(raw)), arrays, pictures


def close(actual, expected):
    assert actual.dtype == np.float32
    assert actual.shape == np.shape(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=LIMIT * np.nanmax(np.abs(expected)))


def assert_spectra(whole, arrays):
    for name, matrices in (("qk", whole.qk), ("ov", whole.ov)):
        values = np.stack([np.linalg.svd(each, compute_uv=False)[:DIM] for each in matrices])
        shares = values / values.sum(1, keepdims=True)
        close(arrays["spectra"][f"{name}_largest"], values[:, 0].reshape(LAYERS, HEADS))
        close(arrays["spectra"][f"{name}_rank"], np.exp(-(shares * np.log(shares)).sum(1)).reshape(LAYERS, HEADS))


def test_spectra(drawn):
    _, whole, arrays, _ = drawn
    assert_spectra(whole, arrays)


@pytest.mark.parametrize("name", ["roberta", "distilbert"])
def test_spectra_of_other_architectures(name, tmp_path):
    """Whose weights have other names."""
    folder = write_folder(tmp_path / "tiny", CONFIGS[name])
    assert_spectra(Whole(open_checkpoint(str(folder))), figures_of("heads", tmp_path, folder, "spectra"))


def test_composition(drawn):
    checkpoint, whole, arrays, _ = drawn
    found = arrays["composition"]
    kinds = {"q": whole.qk, "k": [each.T for each in whole.qk], "v": whole.ov}
    for name, readers in kinds.items():
        expected = np.full((LAYERS, HEADS, LAYERS, HEADS), np.nan)
        for a, b in np.ndindex(LAYERS * HEADS, LAYERS * HEADS):
            if a // HEADS < b // HEADS:
                one, two = whole.ov[a], readers[b]
                size = np.linalg.norm(one @ two) / np.linalg.norm(one) / np.linalg.norm(two)
                expected[a // HEADS, a % HEADS, b // HEADS, b % HEADS] = size
        close(found[name], expected)
    assert found["baseline"].shape == ()
    folded = checkpoint.config.model_type == "gpt2" and Weights(checkpoint).tied
    assert found["baseline"] == pytest.approx((EMBED - folded) ** -0.5)


_patterns = {}


def pattern_of(checkpoint):
    """The pattern of the text; that of another checkpoint with the same blocks if there was one."""
    key = checkpoint.config.model_type
    if key not in _patterns:
        _, _patterns[key], _ = attention_of(jaxqkv.load(checkpoint), MANY_TEXT.strip())
    return _patterns[key]


def test_similarity(drawn):
    checkpoint, whole, arrays, _ = drawn
    found = arrays["similarity"]
    for name, matrices in (("qk", whole.qk), ("ov", whole.ov)):
        units = np.stack([each.ravel() / np.linalg.norm(each) for each in matrices])
        close(found[name], units @ units.T)
    bases = [np.linalg.svd(each, full_matrices=False)[0] for each in whole.w_q]
    close(found["overlap"], [[np.linalg.norm(a.T @ b) ** 2 / DIM for b in bases] for a in bases])
    pattern = pattern_of(checkpoint)
    flat = pattern.reshape(-1, *pattern.shape[2:])[:, 1:]
    expected = (jensenshannon(flat[:, None], flat[None], axis=-1) ** 2).mean(axis=-1)
    np.testing.assert_allclose(found["divergence"], expected, rtol=0, atol=1e-5)
    for name in ("qk", "ov", "overlap", "divergence"):
        np.testing.assert_array_equal(found[name], found[name].T)
    distances = squareform(np.sqrt(np.maximum(2 - 2 * found["qk"].astype(np.float64), 0)), checks=False)
    np.testing.assert_array_equal(found["order"], leaves_list(linkage(distances, "ward")))


def test_copying(drawn):
    checkpoint, whole, arrays, _ = drawn
    if checkpoint.config.has_logits:
        assert set(arrays["copying"]) == {"copying"}
        np.testing.assert_allclose(arrays["copying"]["copying"].ravel(), whole.copying, rtol=0, atol=1e-4)
        return
    refusal = f"copying needs next-token logits .*, which {checkpoint.config.model_type} does not have; take a GPT-2"
    with pytest.raises(NotDrawable, match=refusal):
        heads.figure("copying", model=checkpoint)


def test_pictures_are_drawn_unless_arrays_alone_are_asked_for(drawn):
    checkpoint, _, arrays, pictures = drawn
    assert set(arrays) == (set(FIGURES) if checkpoint.config.has_logits else set(FIGURES) - {"copying"})
    assert pictures == (set(FIGURES) if checkpoint.config.has_logits and Weights(checkpoint).tied else set())


def test_a_whole_run_with_weights_that_are_not_finite(tmp_path):
    """Of the figures of weights; `test_heads.py` has the others."""
    line = ("--text", MANY_TEXT.strip(), "--null", "1")
    # Six are the pairs of layers; copying scores are also of fresh weights.
    bars = {"spectra": 3, "copying": [3, 3], "fresh checkpoints": 1}
    bars |= dict.fromkeys(("similarity", "composition", "divergence"), 6)
    check_spoilt_run(tmp_path, "heads", GPT2, MANY_WORDS, *line, not_drawn=(), bars=bars, ids=FIGURES)


def test_q_values_of_copying_come_from_fresh_checkpoints(tmp_path):
    config = changed(GPT2, initializer_range=0.2)
    folder = write_folder(tmp_path / "tiny", config)
    figure = heads.figure("copying", model=folder, null=NULL).arrays
    fresh = [Whole(FreshCheckpoint("fresh", config, seed)).copying for seed in range(NULL)]
    null = np.concatenate(fresh)
    p = [(1 + (null >= value).sum()) / (1 + null.size) for value in figure["copying"].ravel()]
    close(figure["q_value"], false_discovery_control(p).reshape(LAYERS, HEADS))


def test_heads_made_by_hand_are_found(tmp_path):
    base, folder = tmp_path, write_induction(tmp_path / "induction")
    found = figures_of("heads", base, folder, "copying", "composition", "spectra", "--null", str(NULL))
    k, baseline = found["composition"]["k"], found["composition"]["baseline"]
    assert np.nanargmax(k) == np.ravel_multi_index((*PREVIOUS, *INDUCTION), k.shape)
    assert k[(*PREVIOUS, *INDUCTION)] > 0.99 * 59**-0.5  # two maps of 59 equal singular values
    others = np.delete(k[0, :, 1].ravel(), PREVIOUS[1] * 6 + INDUCTION[1])
    assert others.max() < 1.1 * baseline < 0.5 * k[(*PREVIOUS, *INDUCTION)]
    copying = found["copying"]["copying"]
    assert copying[INDUCTION] > 0.99
    others = copying.size - 1  # than the one that has no score
    assert found["copying"]["q_value"][INDUCTION] == pytest.approx(others / (1 + NULL * copying.size))  # the least
    assert np.isnan(copying[PREVIOUS])  # what it writes is no part of any logit
    assert np.nanmax(np.delete(copying.ravel(), 6 + INDUCTION[1])) < 0.2
    assert found["spectra"]["qk_rank"][INDUCTION] == pytest.approx(59, rel=0.02)


def changed_basis(config, tensors, seed=7):
    """The same model: W_Q R and W_K R⁻ᵀ, W_V R and R⁻¹ W_O in every head, biases too; and another b_K."""
    generator, result, inner = np.random.default_rng(seed), dict(tensors), config.n_head * config.head_dim
    for layer in range(config.n_layer):
        name = f"h.{layer}.attn."
        wide = tensors[f"{name}c_attn.weight"].astype(np.float64)
        bias = tensors[f"{name}c_attn.bias"].astype(np.float64)
        out = tensors[f"{name}c_proj.weight"].astype(np.float64)
        for head in range(config.n_head):
            turn = generator.normal(size=(config.head_dim,) * 2) + 3 * np.eye(config.head_dim)
            back = np.linalg.inv(turn)
            q, k, v = (slice(start + head * config.head_dim, start + (head + 1) * config.head_dim)
                       for start in (0, inner, 2 * inner))  # fmt: skip
            for part, change in ((q, turn), (k, back.T), (v, turn)):
                wide[:, part], bias[part] = wide[:, part] @ change, bias[part] @ change
            out[q] = back @ out[q]
        result[f"{name}c_attn.weight"] = wide.astype(np.float32)
        result[f"{name}c_attn.bias"] = bias.astype(np.float32)
        result[f"{name}c_proj.weight"] = out.astype(np.float32)
    return result


def test_the_basis_inside_heads_moves_nothing_but_the_cosines_of_columns(tmp_path):
    tensors = random_tensors(GPT2)
    turned = changed_basis(GPT2, tensors)
    for layer in range(LAYERS):
        turned[f"h.{layer}.attn.c_attn.bias"][EMBED : 2 * EMBED] += 3  # b_K
    folders = [write_checkpoint_of_words(tmp_path / name, GPT2, each) for name, each in
               (("stored", tensors), ("turned", turned))]  # fmt: skip
    text = ["--text", MANY_TEXT.strip(), "--null", "0"]
    one, two = (figures_of("heads", tmp_path / f"of-{each.name}", each, *FIGURES, *text) for each in folders)
    for id in FIGURES:
        for name in one[id].keys() - {"order"}:
            scale = np.nanmax(np.abs(one[id][name]))
            np.testing.assert_allclose(two[id][name], one[id][name], rtol=0, atol=1e-4 * scale, err_msg=f"{id} {name}")
    columns = [displayed(jaxqkv.studies.qkv_weights.STUDY, "4b", model=each).arrays["similarity"] for each in folders]
    assert np.abs(columns[0] - columns[1]).max() > 0.3


def test_less_memory_gives_the_same_numbers(gpt2_model):
    """Groups of one layer, and one query at a time."""
    layers, batch = Layers(gpt2_model.weights), jaxqkv.Batch.of(np.arange(11, dtype=np.int32)[None])
    for several in (compositions, similarities):
        for one, other in zip(several(layers), several(layers, limit=1), strict=True):
            np.testing.assert_array_equal(one, other)
    whole, parts = divergences(gpt2_model, batch), divergences(gpt2_model, batch, limit=1)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("limit", [1, 8, 20, 1 << 20])
def test_every_pair_of_layers_comes_once(limit):
    class Bar:
        count = 0

        def update(self):
            self.count += 1

    bar, made = Bar(), []

    def make(layer):
        made.append(layer)
        return np.full(1, layer, np.float64), layer

    pairs = [(a, b) for a, b, kept, passing in pairs_of_layers(5, make, bar, limit) if (kept == a and passing == b)]
    assert sorted(pairs) == [(a, b) for a in range(5) for b in range(a, 5)]
    assert bar.count == 15
    assert len(made) == {1: 15, 8: 15, 20: 9, 1 << 20: 5}[limit]


def test_scores_are_scaled_as_the_config_says(tmp_path):
    config = changed(GPT2, scale_attn_by_inverse_layer_idx=True)
    plain, scaled = (
        displayed(heads.STUDY, "spectra", model=write_folder(tmp_path / name, each)).arrays["qk_largest"]
        for name, each in (("plain", GPT2), ("scaled", config))
    )
    np.testing.assert_allclose(scaled, plain / np.arange(1, LAYERS + 1)[:, None], rtol=1e-6)


def test_heads_of_zeros_have_no_direction(tmp_path):
    tensors = random_tensors(GPT2)
    tensors["h.1.attn.c_attn.weight"][:, :DIM] = 0  # W_Q of one head
    tensors["h.0.attn.c_proj.weight"][:DIM] = 0  # W_O of another
    folder = write_checkpoint_of_words(tmp_path / "tiny", GPT2, tensors)
    found = figures_of("heads", tmp_path, folder, *FIGURES, "--text", MANY_TEXT.strip(), "--null", "2")
    assert found["spectra"]["qk_rank"][1, 0] == found["spectra"]["ov_rank"][0, 0] == 0
    copying = found["copying"]
    assert np.argwhere(np.isnan(copying["copying"])).tolist() == np.argwhere(np.isnan(copying["q_value"])).tolist()
    assert np.argwhere(np.isnan(copying["copying"])).tolist() == [[0, 0]]
    assert np.isnan(found["composition"]["q"][0, :, 1, 0]).all()
    assert np.isnan(found["composition"]["k"][0, 0, 1:]).all()
    assert np.isfinite(found["composition"]["v"][0, 1:, 1:]).all()
    assert np.isnan(found["similarity"]["qk"][HEADS]).all()
    assert sorted(found["similarity"]["order"]) == list(range(LAYERS * HEADS))


def test_models_of_one_layer_or_one_head(tmp_path):
    folder = write_checkpoint_of_words(tmp_path / "tiny", changed(GPT2, n_layer=1, n_head=1))
    with pytest.raises(NotDrawable, match="composition is between two layers, and tiny has one"):
        heads.figure("composition", model=folder)
    similar = displayed(heads.STUDY, "similarity", model=folder, text=MANY_TEXT.strip()).arrays
    assert similar["order"].tolist() == [0]
    # Folded W_Q of as many columns as rows has not full rank, and is all of itself still.
    for name in ("qk", "ov", "overlap"):
        close(similar[name], [[1.0]])
    with pytest.raises(NotDrawable, match=r"divergence of patterns, .* needs a text of 2 tokens or more; .* --text"):
        heads.figure("similarity", model=folder, text=" w3")


def test_order_puts_like_beside_like():
    groups = np.array([0, 1, 0, 2, 1, 2, 0])
    cosine = np.where(groups[:, None] == groups, 0.9, 0.0).astype(np.float32)
    ordered = groups[ward_order(cosine)]
    assert (np.diff(ordered) != 0).sum() == 2
