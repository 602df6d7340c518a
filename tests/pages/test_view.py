"""What `jaxqkv view` writes: the values in the page, the tokens as they are shown, what is refused."""

import base64
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from conftest import BERT, CONFIGS, GPT2, changed, random_tensors, write_folder, write_word_tokenizer
from helpers.checkpoints import HOSTILE, write_checkpoint_of_words
from helpers.checkpoints import MANY_TEXT as TEXT
from helpers.induction import FEW_TEXTS, INDUCTION, PREVIOUS, write_induction
from helpers.oracles import attention_of, vectors_of, weighted_of
from helpers.pages import TOGETHER, Blocks, decoded, vectors_in, vectors_levels

import jaxqkv
from jaxqkv.cli.main import main
from jaxqkv.errors import JaxqkvError
from jaxqkv.pages import embedding, view
from jaxqkv.studies.heads import summary
from jaxqkv.studies.heads import types as heads_types
from jaxqkv.studies.heads.circuits import copying_scores
from jaxqkv.studies.heads.types import REPEATING, measure_types

pytestmark = TOGETHER


@pytest.mark.parametrize(("name", "layers"), [("gpt2", None), ("bert", [2, 0])])
def test_the_embedded_values_are_the_model_s(name, layers, tmp_path):
    config = CONFIGS[name]
    model = jaxqkv.load(write_checkpoint_of_words(tmp_path / "tiny", config))
    view.write_view(tmp_path / "page.html", model, TEXT, layers)
    data = Blocks((tmp_path / "page.html").read_text()).data
    scores, pattern, seen = attention_of(model, TEXT)
    shown = [0, 1, 2] if layers is None else [0, 2]
    assert set(data) == {"page", *(f"{block}-{layer}" for layer in shown for block in ("layer", "vectors"))}
    expected = [f"·{word}" for word in TEXT.split()]
    if config.tokenizer_class in ("BertTokenizer", "DistilBertTokenizer"):
        expected = ["[CLS]", "[UNK]", *TEXT.split()[1:], "[SEP]"]  # the vocabulary begins at w5
    about = {"name": "tiny", "tokens": expected, "layers": shown, "heads": 5, "headDim": 7, "causal": config.causal}
    assert data["page"] == about | {"leftOut": "", "types": None}
    norms, vectors = weighted_of(model, TEXT), vectors_of(model, TEXT)
    for layer in shown:
        block = data[f"layer-{layer}"]
        assert len(block["scores"]) == len(block["pattern"]) == 5
        for head in range(5):
            truth = scores[layer, head][seen]
            assert block["scores"][head]["low"] == pytest.approx(truth.min(), abs=1e-5)
            assert block["scores"][head]["high"] == pytest.approx(truth.max(), abs=1e-5)
            # What the page states, and float32's rounding.
            limit = (truth.max() - truth.min()) / 131068 + 1e-5 * np.abs(truth).max()
            np.testing.assert_allclose(decoded(block["scores"][head]), truth, rtol=0, atol=limit)
            truth = pattern[layer, head][seen]
            np.testing.assert_allclose(decoded(block["pattern"][head]), truth, rtol=0, atol=1 / 131068 + 1e-5)
            assert (block["pattern"][head]["low"], block["pattern"][head]["high"]) == (0, 1)
            found = np.frombuffer(base64.b64decode(block["norms"][head]), "<f4")
            moved = pattern[layer, head] * found  # of every query and key
            np.testing.assert_allclose(moved, norms[layer, head], rtol=1e-5, atol=1e-5 * norms[layer, head].max())
            found = [vectors_in(data[f"vectors-{layer}"][name][head]) for name in ("q", "k")]
            for values, each in zip(found, vectors, strict=True):
                limit = np.ptp(each[layer, head], axis=0) / 131068 + 1e-6
                assert (np.abs(values - each[layer, head]) <= limit).all()
            q, k = found
            sums = data[f"vectors-{layer}"]["scale"] * q @ k.T
            np.testing.assert_allclose(sums, scores[layer, head], rtol=0, atol=1e-4 * np.abs(scores[layer, head]).max())
    kinds = [data[f"layer-{layer}"][kind] for layer in shown for kind in ("scores", "pattern")]
    embedded = sum(len(head["values"]) for kind in kinds for head in kind)
    embedded += sum(len(head) for layer in shown for head in data[f"layer-{layer}"]["norms"])
    assert embedded == embedding.pairs_bytes(config, len(shown), len(expected))
    embedded = sum(
        len(text)
        for layer in shown
        for name in "qk"
        for head in data[f"vectors-{layer}"][name]
        for text in head.values()
    )
    assert embedded == embedding.vectors_bytes(config, len(shown), len(expected))


def test_the_nearest_level_is_taken():
    values = np.random.default_rng(0).normal(0, 3, 1009).astype(np.float32)
    low, high = float(values.min()), float(values.max())
    levels = embedding.quantise(values, low, high)
    assert (levels.min(), levels.max()) == (0, 65534)
    error = np.abs(low + levels / 65534 * (high - low) - values)
    assert error.max() <= (high - low) / 131068 * (1 + 1e-9)
    assert not embedding.quantise(np.full(3, 2.5, np.float32), 2.5, 2.5).any()


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (0, "0"),
        (1e-4, "0.0001"),
        (1.01e-4, "0.0002"),
        (9.4e-5, "0.0001"),
        (0.96, "1"),
        (2.6e-7, "3e-07"),
        (31, "4e+01"),
    ],
)
def test_a_limit_is_rounded_up(error, shown):
    assert embedding.rounded_up(error) == shown


def test_every_dimension_has_a_range_of_its_own():
    """A dimension a thousand times larger than another costs that one nothing; NaN and infinity are kept apart."""
    values = np.random.default_rng(1).normal(size=(11, 7)).astype(np.float32) * 10.0 ** np.arange(
        -3, 4, dtype=np.float32
    )
    values[:, 5], values[3, 2], values[4, 1], values[:, 6] = 2.5, np.nan, np.inf, np.nan
    head = embedding.embedded_vectors(values)
    finite = np.isfinite(values)
    levels = np.frombuffer(base64.b64decode(head["values"]), "<u2").reshape(11, 7)
    np.testing.assert_array_equal(levels == embedding.BROKEN, ~finite)
    for dim in range(6):
        seen = finite[:, dim]
        of_dim = values[seen, dim].astype(float)
        assert np.abs(vectors_in(head)[seen, dim] - of_dim).max() <= np.ptp(of_dim) / 131068 * (1 + 1e-6)


def test_tokens_are_shown_with_all_that_is_in_them():
    tokenizer = jaxqkv.load("demo-gpt2").tokenizer
    text = "Ab  c\n\t🙂 क\u200b\u202e!"
    tokens = view.shown_tokens(tokenizer, tokenizer.encode([text])[0])
    shown = " ".join(tokens)
    assert tokens[:2] == ["A", "b"]
    assert "🙂 1/4 🙂 2/4 🙂 3/4 🙂 4/4" in shown
    assert "क 1/3 क 2/3 क 3/3" in shown
    assert "↵" in tokens
    assert "⇥" in tokens
    assert "U+200B 1/2 U+200B 2/2" in shown
    assert "U+202E 1/2 U+202E 2/2" in shown
    assert not set(shown) & set("\n\t\u200b\u202e\ufffd")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the", "·the"),
        ("a\r\nb", "a␍↵b"),
        ("\u00a0", "U+00A0"),
        ("\u0301", "◌\u0301"),
        ("e\u0301", "e\u0301"),
        ("\u200d", "U+200D"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("\x00\x1b[0m", "U+0000U+001B[0m"),
        ("<b>&", "<b>&"),
        ("", ""),
    ],
)
def test_what_does_not_show_is_named(text, shown):
    assert view.visible(text) == shown


def test_bytes_that_are_never_a_character_stay_as_they_are():
    tokenizer = jaxqkv.load("demo-gpt2").tokenizer
    ids = tokenizer.encode(["🙂 a"])[0]
    assert view.shown_tokens(tokenizer, ids[:2]) == ["\ufffd", "\ufffd"]
    assert view.shown_tokens(tokenizer, [ids[0], *ids[-1:]]) == ["\ufffd", "·a"]


def test_nothing_breaks_out_of_the_page(tmp_path):
    folder = write_checkpoint_of_words(tmp_path / "<script>hacked=1<")
    model = jaxqkv.load(folder, tokenizer=write_word_tokenizer(tmp_path, [" w0", HOSTILE.split(" ")[0], " <img"]))
    view.write_view(tmp_path / "page.html", model, HOSTILE + 5 * " w5", command=HOSTILE)
    page = Blocks((tmp_path / "page.html").read_text())
    assert page.data["page"]["tokens"][0] == "</script><script>hacked"
    assert page.tags.count("script") == 1 + 2 * 3 + 1  # the tokens, three layers in two blocks each, the page's own
    assert "img" not in page.tags
    assert len(page.scripts) == 1
    assert page.scripts[0] == "".join(view.part(f"{name}.js") for name in (*view.SCRIPTS, "attention"))


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = str(write_checkpoint_of_words(tmp_path / "tiny"))
    assert main(["view", folder, "--text", TEXT, "--layers", "2", "1"]) == 0
    assert capsys.readouterr().out.startswith("tiny: 11 tokens, 2 layers of 5 heads; 0.064 MB, see attention.html")
    page = (tmp_path / "attention.html").read_text()
    assert Blocks(page).data["page"]["layers"] == [1, 2]
    assert "<dd>1, 2 (of 3)</dd>" in page
    assert f"<code>jaxqkv view {folder} --text &#x27;{TEXT}&#x27; --layers 2 1</code>" in page
    Path("text.txt").write_text(TEXT)
    assert main(["view", f"random:{folder}", "--text-file", "text.txt", "--seed", "3", "--out", "b.html"]) == 0
    assert "<dd>random:tiny (random, seed 3)</dd>" in Path("b.html").read_text()
    assert "<dd>0 to 2 (all 3)</dd>" in Path("b.html").read_text()


@pytest.mark.parametrize(
    ("text", "layers", "said", "terms"),
    [
        (" w3", 1, "one: 1 token, 1 layer of 1 head", ["layer", "head", "token"]),
        (" w3", 2, "one: 1 token, 2 layers of 1 head", ["layers", "head", "token"]),
    ],
)
def test_one_of_a_kind_is_in_the_singular(text, layers, said, terms, tmp_path):
    config = changed(GPT2, n_layer=2, n_head=1, n_embd=7, n_positions=2)
    model = jaxqkv.load(write_checkpoint_of_words(tmp_path / "one", config))
    assert view.write_view(tmp_path / "page.html", model, text, range(layers)) == said
    page = (tmp_path / "page.html").read_text()
    assert re.findall(r"<dt>(.*?)</dt>", page) == ["checkpoint", *terms[:2], "text", terms[2]]


@pytest.mark.parametrize("command", ["a\x01b\u202ec\nd", "jaxqkv view x --text \x7f\r"])
def test_what_does_not_show_is_named_wherever_the_page_has_it(command, tmp_path):
    model = jaxqkv.load(write_checkpoint_of_words(tmp_path / "ti\x01ny\u202e"))
    view.write_view(tmp_path / "page.html", model, TEXT.replace(" w3", " w3\x02", 1), command=command)
    page = (tmp_path / "page.html").read_text()
    assert set(re.findall(r"[^\x20-\x7e\n]", page.partition("<script>")[0])) <= set("‖αO·_±√↵␍⇥…’“”←→ᵀ")
    assert page.count("tiU+0001nyU+202E") == 4  # the window's bar, heading, checkpoint, and the script's name
    assert f"<code>{command.translate({1: 'U+0001', 127: 'U+007F', 0x202E: 'U+202E', 13: None})}" in page
    assert " w3U+0002 w5" in page


def refused(tmp_path, capsys, *arguments, config=GPT2, tensors=None):
    """The one line of an error; no page is left behind."""
    folder = tmp_path / "tiny"
    if not folder.exists():
        write_checkpoint_of_words(folder, config, tensors)
    assert main(["view", str(folder), "--out", str(tmp_path / "out" / "page.html"), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("jaxqkv: error: ")
    assert err.count("\n") == 1
    assert list(tmp_path.glob("out/*")) == []
    return err.removeprefix("jaxqkv: error: ").strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", ""], "text 0 is empty: it gives no token"),
        (["--text", 18 * " w3"], "the text has 18 tokens, more than the 17 positions of tiny; shorten it"),
        (["--text", TEXT, "--layers", "1", "3"], "no layer 3; the model's layers are 0 to 2"),
        (["--text", TEXT, "--layers", "9", "--types"], "no layer 9; the model's layers are 0 to 2"),
        (["--text", "a\udcff"], "the text is not valid UTF-8"),
        (["--text-file", "./nowhere.txt"], "nowhere.txt: cannot be read (No such file or directory)"),
    ],
)
def test_an_error_leaves_no_page(arguments, message, tmp_path, capsys):
    assert refused(tmp_path, capsys, *arguments) == message


def test_weights_that_are_not_finite_are_computed_and_named(tmp_path, capsys):
    """One of W_Q, in a column of head 0: that head's scores are no numbers, nor is anything in later layers."""
    tensors = random_tensors(GPT2)
    tensors["h.1.attn.c_attn.weight"][3, 5] = np.nan
    folder = write_checkpoint_of_words(tmp_path / "tiny", tensors=tensors)
    assert main(["view", str(folder), "--text", TEXT, "--out", str(tmp_path / "page.html")]) == 0
    assert "NaN or infinite values in h.1.attn.c_attn.weight (1 of 3,675)" in capsys.readouterr().err
    page = (tmp_path / "page.html").read_text()
    blocks = Blocks(page).data

    def share(head):
        return (np.frombuffer(base64.b64decode(head["values"]), "<u2") == embedding.BROKEN).mean()

    layers = [blocks[f"layer-{layer}"] for layer in range(3)]
    broken = np.array([[[share(head) for head in layer[kind]] for kind in ("scores", "pattern")] for layer in layers])
    expected = np.zeros((3, 2, 5))
    expected[1, :, 0] = expected[2] = 1
    np.testing.assert_array_equal(broken, expected)
    pairs = 11 * 12 // 2
    assert f"{6 * pairs} scores and 55 norms ‖v W_O‖ are NaN or infinite" in page  # of all values in layer 2
    norms = [[np.frombuffer(base64.b64decode(head), "<f4") for head in layer["norms"]] for layer in layers]
    np.testing.assert_array_equal(np.isfinite(norms).all(axis=-1), [[True] * 5, [True] * 5, [False] * 5])
    assert (vectors_levels(blocks["vectors-1"]["q"][0]) == embedding.BROKEN).any()
    assert (vectors_levels(blocks["vectors-1"]["k"][0]) != embedding.BROKEN).all()


def test_a_page_that_would_be_too_large_is_refused_with_what_fits(tmp_path, capsys, monkeypatch):
    limit = embedding.pairs_bytes(GPT2, 2, 11) + 1
    monkeypatch.setattr(view, "LIMIT_BYTES", limit)
    message = refused(tmp_path, capsys, "--text", TEXT)
    assert message.startswith("11 tokens in 3 layers of 5 heads: 0 MB of values")
    assert message.endswith("shorten the text to 8 tokens, or choose 2 layers or fewer with --layers")
    assert embedding.pairs_bytes(GPT2, 3, 8) <= limit < embedding.pairs_bytes(GPT2, 3, 9)
    folder = str(tmp_path / "tiny")
    assert main(["view", folder, "--text", TEXT, "--layers", "0", "2", "--out", str(tmp_path / "page.html")]) == 0


def test_what_fits_in_a_page_of_published_sizes():
    gpt2 = changed(GPT2, n_layer=12, n_head=12, n_positions=1024)
    bert = changed(BERT, n_layer=24, n_head=16, n_positions=512)
    assert embedding.pairs_bytes(gpt2, 12, 128) == 144 * (2 * 4 * 5504 + 684)
    assert embedding.pairs_bytes(gpt2, 12, 400) < view.LIMIT_BYTES < embedding.pairs_bytes(gpt2, 12, 512)
    assert embedding.pairs_bytes(bert, 24, 128) < view.LIMIT_BYTES < embedding.pairs_bytes(bert, 24, 256)


def test_q_and_k_that_would_make_a_page_too_large_are_left_out_and_named(tmp_path, capsys, monkeypatch):
    def whole(layers, tokens):
        return sum(size(GPT2, layers, tokens) for size in (embedding.pairs_bytes, embedding.vectors_bytes))

    folder = str(write_checkpoint_of_words(tmp_path / "tiny"))
    monkeypatch.setattr(view, "LIMIT_BYTES", whole(2, 11))
    line = ["view", folder, "--text", TEXT, "--out", str(tmp_path / "page.html")]
    assert main(line) == 0
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "the page has no products q_i·k_i by dimension: q and k, 0 MB, do not fit beside the other 0 MB" in warning
    assert "shorten the text to 7 tokens, or choose 2 layers or fewer with --layers" in warning
    assert whole(3, 7) <= whole(2, 11) < whole(3, 8)
    data = Blocks((tmp_path / "page.html").read_text()).data
    assert set(data) == {"page", "layer-0", "layer-1", "layer-2"}
    assert data["page"]["leftOut"].startswith("The page has no products q_i·k_i by dimension: ")
    assert main([*line, "--layers", "0", "2"]) == 0
    assert capsys.readouterr().err == ""
    assert "vectors-2" in Blocks((tmp_path / "page.html").read_text()).data


def test_types_are_those_of_info(tmp_path, monkeypatch):
    """Values, controls and names of a model with one previous-token head and one induction head."""
    monkeypatch.setattr(heads_types, "TEXTS", FEW_TEXTS)
    folder = str(write_induction(tmp_path / "made"))
    line = ["view", folder, "--text", " w3 w5 w7 w3 w5", "--types", "--layers", "1"]
    assert main([*line, "--out", str(tmp_path / "page.html")]) == 0
    types = Blocks((tmp_path / "page.html").read_text()).data["page"]["types"]
    model = jaxqkv.load(folder)
    found = measure_types(model, 0, null=0)
    assert [kind["name"] for kind in types["kinds"]] == list(summary.KINDS)
    copying = types["kinds"].pop()
    scores = copying_scores(model.checkpoint)["copying"]
    np.testing.assert_allclose(copying["values"], scores[[1]], rtol=1e-5, atol=1e-6)
    assert copying["control"] is None
    for kind in types["kinds"]:
        np.testing.assert_allclose(kind["values"], found.mean(kind["name"])[[1]], rtol=1e-5, atol=1e-7)
        if kind["name"] in REPEATING:
            np.testing.assert_allclose(kind["control"], found.control_mean(kind["name"])[[1]], rtol=1e-5, atol=1e-7)
        else:
            assert kind["control"] is None
    assert INDUCTION[0] == 1
    expected = np.full(found.mean("previous").shape, "", object)
    expected[INDUCTION], expected[PREVIOUS] = "induction", "previous"
    assert types["names"] == [expected[1].tolist()]
    above = {kind: found.low[kind] > 0 for kind in REPEATING}
    assert summary.names_of({kind: found.mean(kind) for kind in summary.NAMES}, above) == expected.tolist()


def test_a_head_is_named_only_where_it_is_clear():
    """By the largest value, from 0.4 on; after a repetition only above the control."""
    values = {
        "previous": [0.5, 0.39, 0.1, np.nan, 0.2],
        "duplicate": [0.1, 0.1, 0.6, np.nan, 0.1],
        "induction": [0.4, 0.1, 0.1, np.nan, 0.7],
        "first": [0.1, 0.2, 0.41, np.nan, 0.1],
    }
    above = {"duplicate": [[True, True, False, False, True]], "induction": [[True, True, True, False, True]]}
    names = summary.names_of(
        {kind: np.array([each], np.float32) for kind, each in values.items()},
        {kind: np.array(each) for kind, each in above.items()},
    )
    assert names == [["previous", "", "first", "", "induction"]]


@pytest.mark.parametrize(
    ("names", "layers", "which"),
    [
        (["", "", ""], None, "this model"),
        (["", "first", ""], [2, 0], "these layers"),
        (["", "first", ""], [2], "this layer"),
        (["", "first", ""], None, None),
        (["", "first", ""], [1], None),
    ],
)
def test_a_page_without_a_named_head_says_so(names, layers, which, tmp_path):
    model = jaxqkv.load(write_checkpoint_of_words(tmp_path / "tiny"))
    kinds = [view.HeadKind("first", "attends to the first position", np.zeros((3, 5)))]
    types = view.TypedHeads("About.", kinds, [["", "", name, "", ""] for name in names])
    view.write_view(tmp_path / "page.html", model, TEXT, layers, types=lambda model: types)
    said = f"No head of {which} attends so much to one kind of token as to be named; order by a type to see those that "
    found = Blocks((tmp_path / "page.html").read_text()).data["page"]["types"]["unnamed"]
    assert found == (f"{said}come nearest." if which else "")


def test_layers_are_checked_before_anything_is_run(tmp_path, monkeypatch):
    model = jaxqkv.load(write_checkpoint_of_words(tmp_path / "tiny"))
    monkeypatch.setattr(model, "tokenize", lambda texts: pytest.fail("worked"))
    with pytest.raises(JaxqkvError, match=r"^no layer 3, 9; the model's layers are 0 to 2$"):
        view.write_view(tmp_path / "page.html", model, TEXT, [0, 9, 3], types=lambda model: pytest.fail("worked"))


def test_a_model_without_room_for_types_is_an_error(tmp_path, capsys):
    config = changed(GPT2, n_positions=3)
    message = refused(tmp_path, capsys, "--text", " w3", "--types", config=config)
    assert message.startswith("a text that is said twice needs 4 positions and 4 tokens; tiny has 3 and ")


@pytest.mark.parametrize("arguments", [["--text", "a", "--text-file", "b"], []])
def test_there_is_one_text(arguments, capsys):
    assert main(["view", "demo-gpt2", *arguments]) == 2
    assert capsys.readouterr().err == "jaxqkv: error: give exactly one of --text and --text-file\n"


def test_a_place_that_cannot_be_written_is_an_error_before_any_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(view, "write_view", lambda *arguments: pytest.fail("worked"))
    line = ["view", str(write_checkpoint_of_words(tmp_path / "tiny")), "--text", TEXT, "--out"]
    assert main([*line, str(tmp_path)]) == 2
    assert "cannot be written (Is a directory); choose another place with --out" in capsys.readouterr().err
    (tmp_path / "file").write_text("in the way")
    assert main([*line, str(tmp_path / "file" / "page.html")]) == 2
    assert "cannot be written (File exists)" in capsys.readouterr().err


def test_a_tokenizer_that_is_not_there_is_named(tmp_path):
    with pytest.raises(JaxqkvError, match=r"has no tokenizer\.json"):
        view.write_view(tmp_path / "page.html", jaxqkv.load(write_folder(tmp_path / "bare", GPT2)), TEXT)


def test_the_pages_parts_are_in_the_package():
    root = Path(__file__).parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["jaxqkv"]
    parts = [path.relative_to(root / "jaxqkv").as_posix() for path in (root / "jaxqkv/pages/web").iterdir()]
    assert {"pages/web/attention.html", "pages/web/attention.js", "pages/web/style.css"} <= set(parts)
    assert [part for part in parts if not any(fnmatch(part, pattern) for pattern in patterns)] == []
