"""Study 12, what heads attend to, move and say: against PyTorch with hooks in float64, and a model made by hand."""

import json

import jax
import numpy as np
import pytest
import scipy.special
from conftest import BERT, CONFIGS, GPT2, changed, figures_of, random_tensors, write_folder
from helpers.checkpoints import MANY_TEXT, MANY_WORDS, write_checkpoint_of_words
from helpers.induction import FEW_TEXTS, INDUCTION, PREVIOUS, write_induction
from helpers.spoilt import check_spoilt_run
from helpers.studies import displayed

import jaxqkv
from jaxqkv.checkpoints.checkpoint import BUNDLED
from jaxqkv.cli.main import main
from jaxqkv.errors import JaxqkvError, JaxqkvWarning, NotDrawable
from jaxqkv.kernels import HeadTypes
from jaxqkv.studies import heads
from jaxqkv.studies.heads import null, summary, types
from jaxqkv.studies.heads.attribution import contributions
from jaxqkv.studies.heads.types import REPEATING, measure_types, repeated_texts
from jaxqkv.studies.pairs import DEMO_PAIR

KINDS = ("previous", "duplicate", "induction")
TINY = {"gpt2": changed(GPT2, initializer_range=0.2), "bert": changed(BERT, initializer_range=0.2)}
SHAPE, TEXTS, N, NULL = (3, 5), 32, 8, 3
CLEAN, DONOR = (" ".join(["", *words.split()]) for words in ("w3 w5 w7 w5 w11 w13", "w3 w5 w7 w3 w11 w13"))
ANSWERS = (" w3", " w5")


@pytest.fixture(autouse=True, scope="module")
def _together():
    """In one worker: most tests run the same programs."""


@pytest.fixture(scope="module", params=["gpt2", "bert"])
def drawn(request, tmp_path_factory):
    """A config, its folder, and the arrays of its figures but those of weights."""
    base, config = tmp_path_factory.mktemp(request.param), TINY[request.param]
    folder = write_checkpoint_of_words(base / "tiny", config)
    text = MANY_TEXT.strip()
    ids = ["types", "norms", *(["attribution", "lens"] if config.has_final_norm else [])]
    # The null is made alike for every architecture, so that one of them is compared with it.
    null = NULL if config.causal else 0
    line = ["--text", text, "--clean", CLEAN, "--donor", DONOR, "--answers", *ANSWERS, "--null", str(null)]
    return config, folder, figures_of("heads", base, folder, *ids, *line)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """The folder of a small GPT-2."""
    return write_checkpoint_of_words(tmp_path_factory.mktemp("gpt2") / "tiny", TINY["gpt2"])


def values_of(config, tensors, ids):
    """Every field of every layer `[layer, batch, …]`, and the logits, by PyTorch in float64."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    pytest.importorskip("transformers", exc_type=ImportError)
    from helpers.hooks import hooked

    from jaxqkv.model import torch_reference

    theirs = torch_reference.build(config, seed=0)
    backbone = torch_reference._module(theirs, config.counterpart.backbone)
    given = {key: torch.tensor(np.asarray(x)) for key, x in tensors.items()}
    assert not backbone.load_state_dict(given, strict=False).unexpected_keys
    found = {}

    def record(field, layer, value):
        found.setdefault(field, []).append(value.copy())

    output = hooked(torch_reference.double(theirs), config, ids, np.ones(ids.shape, bool), record)
    return {field: np.stack(values) for field, values in found.items()} | output


def fresh_tensors(config, seed):
    """Those of a freshly initialised checkpoint."""
    checkpoint = null.FreshCheckpoint("fresh", config, seed)
    return {key: checkpoint.tensor(key) for key in checkpoint.shapes}


def types_by_loops(pattern):
    """Means over queries of `[layer, text, head, query, key]`, from the definitions."""
    n = pattern.shape[-1] // 2
    second, later = range(n + 1, 2 * n), range(1, 2 * n)
    return {
        "previous": np.mean([pattern[..., t, t - 1] for t in range(2, 2 * n)], axis=0),
        "duplicate": np.mean([pattern[..., t, t - n] for t in second], axis=0),
        "induction": np.mean([pattern[..., t, t - n + 1] for t in second], axis=0),
        "first": np.mean([pattern[..., t, 0] for t in later], axis=0),
        "entropy": np.mean([scipy.special.entr(pattern[..., t, :]).sum(-1) for t in later], axis=0),
    }


# --- types ---


def test_texts_are_said_twice(drawn):
    config, folder, arrays = drawn
    ids, model = arrays["types"]["ids"], jaxqkv.load(folder)
    given = repeated_texts(model, 0)
    np.testing.assert_array_equal(ids, given.texts)
    assert ids.shape == (TEXTS, 2 * N)
    ordinary = set(model.tokenizer.ordinary_ids.tolist())
    special = {"gpt2": set(), "bert": {0, 1, 2, 3, 4}}[config.model_type]
    assert ordinary == set(range(config.vocab_size)) - special
    for text, control in zip(ids, given.control, strict=True):
        np.testing.assert_array_equal(text[:N], text[N:])
        np.testing.assert_array_equal(control[N:], text[N:])
        assert len(set(control.tolist())) == 2 * N
        assert set(control.tolist()) <= ordinary
    assert len({tuple(text) for text in ids.tolist()}) == TEXTS
    assert (repeated_texts(model, 1).texts != ids).any()


def test_types(drawn):
    config, folder, arrays = drawn
    given = repeated_texts(jaxqkv.load(folder), 0)
    tensors, found = random_tensors(config), arrays["types"]
    pattern = values_of(config, tensors, np.concatenate([given.texts, given.control]))["pattern"]
    both = [types_by_loops(pattern[:, part]) for part in (slice(TEXTS), slice(TEXTS, None))]
    for kind, values in both[0].items():
        np.testing.assert_allclose(found[kind], values.mean(1), atol=2e-5, err_msg=kind)
    for kind in KINDS:
        np.testing.assert_allclose(found[f"control_{kind}"], both[1][kind].mean(1), atol=2e-5)
    keys = jax.random.split(jax.random.key(0), 1000)
    taken = np.asarray(jax.vmap(lambda key: jax.random.randint(key, (TEXTS,), 0, TEXTS))(keys))
    for kind in REPEATING:
        means = (both[0][kind] - both[1][kind])[:, taken].mean(axis=2)  # [layer, resample, head]
        low, high = np.percentile(means, (2.5, 97.5), axis=1)
        np.testing.assert_allclose(found[f"low_{kind}"], low, atol=4e-5)
        np.testing.assert_allclose(found[f"high_{kind}"], high, atol=4e-5)


def benjamini_hochberg(p):
    """By the definition: the smallest p · m / rank of all that are as large."""
    flat = np.ravel(p)
    order = np.argsort(flat)
    adjusted = flat[order] * flat.size / np.arange(1, flat.size + 1)
    q = np.empty_like(flat)
    q[order] = np.minimum.accumulate(adjusted[::-1])[::-1]
    return q.reshape(np.shape(p))


@pytest.mark.parametrize("drawn", ["gpt2"], indirect=True)
def test_q_values_are_those_of_fresh_checkpoints(drawn):
    config, _, arrays = drawn
    found = arrays["types"]
    fresh = [
        types_by_loops(values_of(config, fresh_tensors(config, seed), found["ids"])["pattern"]) for seed in range(NULL)
    ]
    for kind in KINDS:
        values = np.stack([each[kind].mean(1) for each in fresh])
        assert values.shape == (NULL, *SHAPE)
        p = np.empty(SHAPE)
        for layer, head in np.ndindex(SHAPE):
            p[layer, head] = (1 + (values >= found[kind][layer, head]).sum()) / (1 + values.size)
        np.testing.assert_allclose(found[f"q_value_{kind}"], benjamini_hochberg(p), rtol=1e-6)


def test_a_model_made_by_hand(tmp_path, monkeypatch):
    """`types` finds its two heads, and no other; in fewer texts than it has otherwise, and in twenty fresh models."""
    monkeypatch.setattr(types, "TEXTS", FEW_TEXTS)
    found = measure_types(jaxqkv.load(write_induction(tmp_path / "made")), seed=0, null=20)
    for kind, place in (("previous", PREVIOUS), ("induction", INDUCTION)):
        values = found.mean(kind)
        assert values[place] >= 0.99
        assert np.delete(values.ravel(), np.ravel_multi_index(place, values.shape)).max() < 0.1
        assert np.argwhere(found.marked(kind)).tolist() == [list(place)]
        assert found.q_value[kind][place] < 0.05
    assert found.control_mean("induction")[INDUCTION] < 0.1
    assert found.low["induction"][INDUCTION] > 0.9
    assert found.control_mean("previous")[PREVIOUS] >= 0.99  # which needs no repetition
    assert not found.marked("duplicate").any()


def test_types_without_a_null(gpt2):
    figure = displayed(heads.STUDY, "types", model=gpt2, null=0)
    assert not [name for name in figure.arrays if name.startswith("q_value")]
    assert "fresh checkpoints" not in figure.caption
    found = measure_types(jaxqkv.load(gpt2), seed=0, null=0)
    assert not found.marked("previous").any()
    np.testing.assert_array_equal(found.marked("induction"), figure.arrays["low_induction"] > 0)


def test_types_without_a_tokenizer(tmp_path, capsys):
    """All tokens may be drawn, and the caption does not say that none is special; figures of a text are left out."""
    folder = write_folder(tmp_path / "tiny", TINY["gpt2"])
    warning = r"tiny has no tokenizer .* drawn from all 43 ids, special ones too; --tokenizer FOLDER names them"
    with pytest.warns(JaxqkvWarning, match=warning):
        figure = displayed(heads.STUDY, "types", model=folder, null=0)
    assert "none of them special" not in figure.caption
    assert "random tokens, special ones too, said twice" in figure.caption
    with pytest.warns(JaxqkvWarning, match=warning):
        assert repeated_texts(jaxqkv.load(folder), 0).all_ids
    assert main(["info", str(folder), "--heads"]) == 0
    assert "jaxqkv: warning: tiny has no tokenizer" in capsys.readouterr().err
    for id in ("lens", "norms", "attribution"):
        with pytest.raises(NotDrawable, match=r"has no tokenizer\.json"):
            heads.figure(id, model=folder)
    line = ["figures", "heads", "--model", str(folder), "--arrays-only", "--out", str(tmp_path / "out"), "--null", "0"]
    assert main([*line, "--text", " w3 w5"]) == 2  # which nothing can read
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"jaxqkv: error: --text: {folder}: has no tokenizer.json")


def test_a_model_of_few_positions(tmp_path):
    folder = write_checkpoint_of_words(tmp_path / "tiny", changed(GPT2, n_positions=3))
    with pytest.raises(NotDrawable, match=r"needs 4 positions and 4 tokens; .* has 3 and 43"):
        heads.figure("types", model=folder)


# --- the null ---


class TestNull:
    @pytest.fixture
    def asked(self, monkeypatch, tmp_path):
        """A function for null values, and the seeds of the checkpoints that it has made."""
        monkeypatch.setenv("JAXQKV_CACHE", str(tmp_path))
        seeds = []

        def statistics(checkpoint):
            seeds.append(checkpoint.seed)
            return {"mean": np.full((2, 3), checkpoint.tensor("wte.weight").mean(), np.float32)}

        def ask(count, config=GPT2, **about):
            return null.null_values(config, count, statistics, statistics="mean", **about)["mean"]

        return ask, seeds, tmp_path / "nulls"

    def test_what_is_kept(self, asked):
        ask, seeds, folder = asked
        five = ask(5)
        expected = [null.FreshCheckpoint("", GPT2, seed).tensor("wte.weight").mean() for seed in range(5)]
        np.testing.assert_array_equal(five, np.broadcast_to(np.float32(expected)[:, None, None], (5, 2, 3)))
        np.testing.assert_array_equal(ask(3), five[:3])
        assert seeds == [0, 1, 2, 3, 4]
        np.testing.assert_array_equal(ask(7)[:5], five)
        assert seeds == [0, 1, 2, 3, 4, 5, 6]
        (path,) = folder.iterdir()
        path.write_bytes(path.read_bytes()[:-9])
        np.testing.assert_array_equal(ask(5), five)  # a file that is not whole is as good as none

    def test_what_it_depends_on(self, asked):
        ask, seeds, _ = asked
        ask(1)
        ask(1, ids="a")
        ask(1, changed(GPT2, n_inner=31))
        ask(1, ids="a")
        assert seeds == [0, 0, 0]

    def test_nothing_is_kept_of_what_is_interrupted(self, monkeypatch, tmp_path):
        monkeypatch.setenv("JAXQKV_CACHE", str(tmp_path))

        def statistics(checkpoint):
            if checkpoint.seed:
                raise KeyboardInterrupt
            return {"mean": np.zeros((1, 1))}

        with pytest.raises(KeyboardInterrupt):
            null.null_values(GPT2, 2, statistics, statistics="mean")
        assert not list(tmp_path.rglob("*.npz"))

    def test_a_cache_that_cannot_be_written_is_said(self, monkeypatch, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("JAXQKV_CACHE", str(tmp_path / "file"))
        found = null.null_values(GPT2, 1, lambda checkpoint: {"mean": np.ones((1, 1))}, statistics="mean")
        assert found["mean"].tolist() == [[[1]]]
        assert "the values of fresh checkpoints are not kept" in capsys.readouterr().err

    def test_p(self):
        values = np.arange(8.0).reshape(2, 2, 2)
        p = null.null_p(np.array([[7.0, 6.5], [-1, np.nan]]), values)
        np.testing.assert_array_equal(p, [[2 / 9, 2 / 9], [1, np.nan]])
        assert (null.null_p(np.full((2, 2), 8.0), values) == 1 / 9).all()
        q = null.null_q(np.array([[7.0, 7.0], [-1, np.nan]]), values)
        np.testing.assert_allclose(q, [[3 / 9, 3 / 9], [1, np.nan]], rtol=1e-6)

    def test_a_config_that_does_not_say_how(self):
        with pytest.raises(NotDrawable, match=r"initializer_range is missing; add .*; or give --null 0"):
            null.null_values(changed(GPT2, initializer_range=None), 1, lambda checkpoint: {}, statistics="mean")


# --- attribution ---


@pytest.mark.parametrize("drawn", ["gpt2"], indirect=True)
def test_attribution(drawn):
    """Contributions by the definition, in float64."""
    config, _, arrays = drawn
    found, tensors = arrays["attribution"], {key: x.astype(np.float64) for key, x in random_tensors(config).items()}
    a, b = (MANY_WORDS.index(word) for word in ANSWERS)
    u = tensors["wte.weight"][a] - tensors["wte.weight"][b]
    ids = np.array([[MANY_WORDS.index(f" {word}") for word in text.split()] for text in (CLEAN, DONOR)])
    values = values_of(config, random_tensors(config), ids)
    for text in range(2):
        residual = values["resid_post"][-1, text, -1]
        sigma = np.sqrt(residual.var() + config.layer_norm_epsilon)

        def part(r, sigma=sigma):
            return ((r - r.mean()) / sigma) @ (tensors["ln_f.weight"] * u)

        bias = tensors["ln_f.bias"] @ u
        for layer in range(SHAPE[0]):
            output = tensors[f"h.{layer}.attn.c_proj.weight"].reshape(5, 7, 35)
            for head in range(SHAPE[1]):
                expected = part(values["z"][layer, text, head, -1] @ output[head])
                assert found["head"][text, layer, head] == pytest.approx(expected, abs=1e-5)
            assert found["mlp"][text, layer] == pytest.approx(part(values["mlp_out"][layer, text, -1]), abs=1e-5)
            bias += part(tensors[f"h.{layer}.attn.c_proj.bias"])
        assert found["embedding"][text] == pytest.approx(part(values["resid_pre"][0, text, -1]), abs=1e-5)
        assert found["bias"][text] == pytest.approx(bias, abs=1e-5)
        logits = values["logits"][text, -1]
        assert found["total"][text] == pytest.approx(logits[a] - logits[b], abs=1e-5)


# Of GPT-2 also what `drawn` has not: an output embedding of its own, and scores that are scaled by layer.
OTHERWISE = changed(TINY["gpt2"], tie_word_embeddings=False, scale_attn_by_inverse_layer_idx=True)
MODELS = CONFIGS | {"gpt2": OTHERWISE}


def sum_of(head, mlp, embedding, bias):
    return np.sum([head.sum(axis=(1, 2)), mlp.sum(axis=1), embedding, bias], axis=0, dtype=np.float64)


@pytest.mark.parametrize("name", MODELS)
def test_parts_add_up_to_the_logit_difference(tmp_path, name):
    """Of every architecture whose logits follow from one final norm of a sum; the others are refused by name."""
    config = MODELS[name]
    tensors = random_tensors(config)
    if name == "gpt2":
        tensors["lm_head.weight"] = tensors["wte.weight"][::-1] * 0.7
    model = jaxqkv.load(write_folder(tmp_path / name, config, tensors))
    batch = jaxqkv.Batch.of([[3, 5, 7, 11, 2, 9, 4], [13, 17, 19]])
    if not config.has_final_norm:
        with pytest.raises(NotDrawable, match=f"^{config.model_type} normalises"):
            contributions(model, batch, (1, 2))
        return
    found = contributions(model, batch, (23, 29))
    logits = np.asarray(model.logits(batch))[[0, 1], np.asarray(batch.last)]
    np.testing.assert_allclose(found.total, logits[:, 23] - logits[:, 29], atol=1e-5)
    np.testing.assert_allclose(sum_of(*found[:4]), found.total, atol=1e-5)


def test_the_bundled_checkpoint_has_its_own_pair_however_it_is_named():
    """Whose parts add up to the logit difference too, as those of every GPT-2 do."""
    specs = [{"demo": True}, {"model": "demo-gpt2"}, {"model": str(BUNDLED["demo-gpt2"])}]
    specs.append({"model": "demo-gpt2", **DEMO_PAIR._asdict()})
    asked, *others = (displayed(heads.STUDY, "attribution", **given) for given in specs)
    for named in others:
        assert "' John' minus that of ' Mary'" in named.caption
        for key, values in asked.arrays.items():
            np.testing.assert_array_equal(named.arrays[key], values)
    found = asked.arrays
    parts = sum_of(*(found[name] for name in ("head", "mlp", "embedding", "bias")))
    np.testing.assert_allclose(parts, found["total"], atol=1e-5)


# --- lens and norms ---


@pytest.mark.parametrize("drawn", ["gpt2"], indirect=True)
def test_lens(drawn):
    config, folder, arrays = drawn
    found, tensors, model = arrays["lens"], random_tensors(config), jaxqkv.load(folder)
    batch = model.tokenize(MANY_TEXT.strip())
    values = values_of(config, tensors, np.asarray(batch.ids))
    streams = np.concatenate([values["resid_pre"], values["resid_post"][-1:]])[:, 0]
    assert found["token"].shape == (SHAPE[0] + 1, batch.ids.shape[1])
    for row, stream in enumerate(streams):
        normed = (stream - stream.mean(-1, keepdims=True)) / np.sqrt(stream.var(-1, keepdims=True) + 1e-5)
        logits = (normed * tensors["ln_f.weight"] + tensors["ln_f.bias"]) @ tensors["wte.weight"].T.astype(np.float64)
        np.testing.assert_array_equal(found["token"][row], logits.argmax(-1))
        np.testing.assert_allclose(found["probability"][row], scipy.special.softmax(logits, -1).max(-1), rtol=1e-4)
    own = np.asarray(model.logits(batch), np.float64)[0]
    np.testing.assert_array_equal(found["token"][-1], own.argmax(-1))
    np.testing.assert_allclose(found["probability"][-1], scipy.special.softmax(own, -1).max(-1), rtol=1e-5)


def test_norms(drawn):
    config, folder, arrays = drawn
    found, model = arrays["norms"], jaxqkv.load(folder)
    batch = model.tokenize(MANY_TEXT.strip(), special_tokens=not config.causal)
    values = values_of(config, random_tensors(config), np.asarray(batch.ids))
    assert found["norm"].shape == (3, batch.ids.shape[1], batch.ids.shape[1])
    for layer in range(SHAPE[0]):
        output = model.weights.W_O(layer, by_head=True).astype(np.float64)
        pattern, v = values["pattern"][layer, 0], values["v"][layer, 0]
        norm = np.linalg.norm(np.einsum("hqk,hkd,hde->hqke", pattern, v, output), axis=-1)
        np.testing.assert_allclose(found["weight"][layer], pattern.mean(0), atol=1e-5)
        np.testing.assert_allclose(found["norm"][layer], norm.mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found["first_weight"][layer], pattern[:, 1:, 0].mean(1), atol=1e-5)
        share = [np.mean([row[0] / row.sum() for row in head[1:]]) for head in norm]
        np.testing.assert_allclose(found["first_norm"][layer], share, atol=1e-5)


# --- what is refused and said ---


def test_figures_that_make_no_sense_are_named(tmp_path, capsys):
    """And the rest is drawn."""
    folder = write_checkpoint_of_words(tmp_path / "tiny", TINY["bert"])
    line = ["figures", "heads", "--model", str(folder), "--arrays-only", "--out", str(tmp_path / "out"), "--null", "0"]
    assert main([*line, "lens", "types", "norms", "attribution", "--text", MANY_TEXT.strip()]) == 2
    error = capsys.readouterr().err
    for id in ("lens", "attribution"):
        assert f"{id} is not drawn: bert normalises the residual stream after every block" in error
    assert {path.stem for path in (tmp_path / "out" / "heads").glob("*.npz")} == {"types", "norms"}


def test_a_whole_run_with_weights_that_are_not_finite(tmp_path):
    """Of the figures of texts; `test_heads_circuits.py` has the others."""
    line = ("--text", MANY_TEXT.strip(), "--clean", CLEAN, "--donor", DONOR, "--answers", *ANSWERS, "--null", "1")
    # The lens has no description.
    bars = {"": 3, "layers": 3, "fresh checkpoints": 1}
    ids = ("types", "norms", "attribution", "lens")
    check_spoilt_run(tmp_path, "heads", TINY["gpt2"], MANY_WORDS, *line, not_drawn=(), bars=bars, ids=ids)


def test_stimuli_of_the_study_that_do_not_fit_leave_figures_out(gpt2):
    """An error about what the user has given is an error."""
    with pytest.raises(NotDrawable, match=r"the model's 17 positions; .*; choose --text"):
        heads.figure("norms", model=gpt2)
    with pytest.raises(NotDrawable, match=r"' Mike' and ' Emma' are the same token.*; choose --answers"):
        heads.figure("attribution", model=gpt2, clean=CLEAN, donor=DONOR)  # whose unknown words are one
    with pytest.raises(JaxqkvError, match="--answers: ' Mikes' is not one token"):
        heads.figure("attribution", model="demo-gpt2", answers=(" Mikes", " Emma"))
    with pytest.raises(JaxqkvError, match="the model's 17 positions") as caught:
        heads.figure("norms", model=gpt2, text=" w1" * 18)
    assert not isinstance(caught.value, NotDrawable)
    with pytest.raises(NotDrawable, match="2 tokens or more; choose a longer one with --text"):
        heads.figure("norms", model=gpt2, text=" w1")
    pair = {"clean": CLEAN, "donor": DONOR, "answers": ANSWERS}
    for id, given, message in (
        ("norms", {"text": ""}, "--text: text 0 is empty"),
        ("attribution", {"clean": ""}, "--clean is empty; give a text, or leave it out"),
        ("attribution", {"donor": ""}, "--donor is empty; give a text, or leave it out"),
        ("attribution", {"answers": (" w3", " w3")}, "--answers: the answers ' w3' and ' w3' are the same token"),
        ("attribution", {"answers": (" w3", "")}, "--answers: '' is not one token"),
    ):
        with pytest.raises(JaxqkvError, match=message) as caught:
            heads.figure(id, model=gpt2, **pair | given)
        assert not isinstance(caught.value, NotDrawable)
    with pytest.raises(JaxqkvError, match="--answers are two words, not 1"):
        heads.figure("attribution", model=gpt2, answers=[" w1"])
    with pytest.raises(JaxqkvError, match="--layer 3: the layers of tiny are 0 to 2"):
        heads.figure("norms", model=gpt2, layer=3)


def test_an_unusable_text_that_is_given_ends_the_command(gpt2, tmp_path, capsys):
    """With nothing written, though other figures could be drawn."""
    line = ["figures", "heads", "attribution", "norms", "--model", str(gpt2), "--arrays-only"]
    for given, message in (
        (["--text", ""], "--text: text 0 is empty: it gives no token"),
        (["--clean", ""], "--clean is empty; give a text, or leave it out for the study's own"),
        (["--answers", " w3", " w3"], "the answers ' w3' and ' w3' are the same token; they must be two"),
    ):
        text = [] if given[0] == "--text" else ["--text", MANY_TEXT.strip()]
        assert main([*line, *text, "--clean", CLEAN, "--donor", DONOR, *given, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.rglob("*.npz"))


def test_parts_add_up_whatever_the_dtype_of_the_model(gpt2):
    """They are computed in float32, and the caption says so."""
    given = {"clean": CLEAN, "donor": DONOR, "answers": ANSWERS}
    narrow, wide = (
        displayed(heads.STUDY, "attribution", model=gpt2, dtype=dtype, **given) for dtype in ("bfloat16", "float32")
    )
    for name, values in wide.arrays.items():
        np.testing.assert_array_equal(narrow.arrays[name], values)
    assert "all in float32, for in bfloat16 they would not" in narrow.caption
    assert "bfloat16" not in wide.caption


def test_heads_that_write_nothing_have_no_share_of_the_norms(tmp_path):
    tensors = random_tensors(TINY["gpt2"])
    tensors["h.1.attn.c_proj.weight"][14:21] = 0  # W_O of head 2
    folder = write_checkpoint_of_words(tmp_path / "tiny", TINY["gpt2"], tensors)
    figure = displayed(heads.STUDY, "norms", model=folder, text=MANY_TEXT.strip())
    assert np.argwhere(np.isnan(figure.arrays["first_norm"])).tolist() == [[1, 2]]
    assert np.isfinite(figure.arrays["first_weight"]).all()
    assert "A head that writes nothing has no share of the norms (NaN)." in figure.caption


def test_weights_are_not_read_before_they_are_needed(gpt2, monkeypatch):
    """Opening a run reads headers alone."""
    from jaxqkv.checkpoints.folder import FolderCheckpoint

    monkeypatch.setattr(FolderCheckpoint, "tensor", lambda self, key: pytest.fail(f"{key} is read"))
    with heads.STUDY.start(heads.HeadsOptions(model=(str(gpt2),))) as run:
        assert run.describe()["null"] == 20


def test_heads_without_a_value_are_of_no_kind(tmp_path, capsys):
    """With W_O of 0 in all heads but two, which alone have a copying score; or in all."""
    for nothing, expected in ((13, 2), (15, 0)):
        tensors = random_tensors(TINY["gpt2"])
        for layer, head in list(np.ndindex(SHAPE))[:nothing]:
            tensors[f"h.{layer}.attn.c_proj.weight"][7 * head : 7 * head + 7] = 0
        folder = write_checkpoint_of_words(tmp_path / f"tiny{nothing}", TINY["gpt2"], tensors)
        assert main(["info", str(folder), "--heads", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["heads"]
        copying = [row for row in rows if row["kind"] == "copying"]
        assert sorted((row["layer"], row["head"]) for row in copying) == [(2, 3), (2, 4)][:expected]
        assert all(np.isfinite(row["value"]) for row in rows)
        assert len(rows) == 15 + expected


def test_typical_heads(gpt2, capsys):
    found = measure_types(jaxqkv.load(gpt2), 0, null=0)
    assert main(["info", str(gpt2), "--heads", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["heads"]
    copying = displayed(heads.STUDY, "copying", model=gpt2, null=0).arrays["copying"]
    assert {row["kind"] for row in rows} == summary.KINDS.keys() == {*HeadTypes._fields, "copying"}
    for kind in summary.KINDS:
        values, control = (copying, None) if kind == "copying" else (found.mean(kind), found.control_mean(kind))
        by = values - control if kind in REPEATING else values
        own = [row for row in rows if row["kind"] == kind]
        places = [(row["layer"], row["head"]) for row in own]
        assert [by[place] for place in places] == sorted(by.ravel(), reverse=True)[:3]
        assert [row["value"] for row in own] == pytest.approx([values[place] for place in places])
        expected = [None] * 3 if control is None else pytest.approx([control[place] for place in places])
        assert [row["control"] for row in own] == expected
    assert main(["info", str(gpt2), "--heads"]) == 0
    first = rows[0]
    words = f"attends to the token before {first['layer']} {first['head']} {first['value']:.3f} {first['control']:.3f}"
    assert words.split() in [line.split() for line in capsys.readouterr().out.splitlines()]
