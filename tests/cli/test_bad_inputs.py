"""Bad inputs of every command: one clear line, exit status 2, nothing half-written, nothing lost that was there."""

import gc
import itertools
import json
import shutil
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
from conftest import GPT2, arrays_of, write_folder, write_word_tokenizer
from helpers.broken import CHECKPOINTS, TOKENIZERS, WORDS

import jaxqkv
from jaxqkv.cli.main import main
from jaxqkv.errors import JaxqkvError
from jaxqkv.studies.registry import names, study

PAIR = ["--clean", "a cat saw her", "--donor", "a her cat her", "--answers", " her", " cat"]
# What each study takes besides the checkpoint, to run in a moment.
STIMULI = {
    "qkv-weights": [],
    "attention-scores": ["--text", "I saw her cat word1 word2"],
    "token-frequency": ["--corpus", "texts", "--tokens", "50", "--batch", "2", "--length", "7", "--no-cache"],
    "weight-tour": [],
    "token-similarity": ["--sentences", "sentences.txt"],
    "qkv-activations": ["--corpus", "texts", "--target", " her", "--context", "2", "--permutations", "19"],
    "adjustment-magnitudes": ["--corpus", "texts", "--batch", "3"],
    "prediction-divergence": ["--text-file", "texts/0.txt", "--permutations", "19"],
    "category-selectivity": ["--words", "words.txt", "--permutations", "19"],
    "head-silencing": ["--text", "a cat saw her", "--fact", "a cat", "--answer", " saw", "--against", " her"],
    "head-patching": PAIR,
    "heads": [*PAIR, "--text", "a cat saw her", "--null", "1"],
}
OF_TEXT = ("attention-scores", "token-frequency", "token-similarity", "view")
COMMANDS = (*names(), "info", "view", "verify")


def line_of(command, spec, *more, options=None):
    """The command line that runs a command on a checkpoint."""
    if command in names():
        options = STIMULI[command] if options is None else options
        return ["figures", command, *more, "--model", spec, "--out", "out", "--arrays-only", *options]
    own = {"view": ["--text", "I saw her cat", "--out", "out/attention.html"], "verify": ["--out", "out/verify.json"]}
    return [command, spec, *own.get(command, []), *more]


@pytest.fixture(scope="session")  # so that the tests need not stay in one worker
def template(tmp_path_factory):
    """Makes what `place` copies."""
    base = tmp_path_factory.mktemp("template")
    write_word_tokenizer(write_folder(base / "model", GPT2), WORDS)
    (base / "texts").mkdir()
    for number in range(3):
        words = np.random.default_rng(number).choice(WORDS[1:], 30)
        (base / "texts" / f"{number}.txt").write_text("I" + "".join(words))
    (base / "sentences.txt").write_text("I saw her cat\nI told her word1\nI saw word2 her word3\n")
    (base / "words.txt").write_text("a word1\na word2\na cat\nb word3\nb word4\n")
    for name in names():
        folder = base / "out" / name
        folder.mkdir(parents=True)
        first = next(iter(study(name).figures))
        for kind in ("npz", "png", "svg"):
            (folder / f"{first}.{kind}").write_bytes(b"earlier")
        (folder / "manifest.json").write_text(json.dumps({"figures": {first: {"title": "earlier"}}}))
    for name in ("index.html", "attention.html", "verify.json"):
        (base / "out" / name).write_text("earlier")
    return base


@pytest.fixture
def place(template, tmp_path, monkeypatch):
    """A folder to be in: a checkpoint named `model`, texts, and in `out` what an earlier run left."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error_of(capsys):
    """The one line on stderr."""
    err = capsys.readouterr().err
    assert err.startswith("jaxqkv: error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert err[:-1].isprintable()
    return err


def refuse(place, capsys, line, message):
    """Runs a command that has to fail, and looks at what it leaves."""
    before = contents(place / "out")
    try:
        status = main(line)
    except SystemExit as stop:  # of arguments
        status = stop.code
    assert status == 2
    assert message in error_of(capsys)
    assert contents(place / "out") == before


def in_turn(one, *others):
    """Pairs of each of the first values with one of the others, each of which comes up."""
    return list(zip(one, itertools.cycle(others)))


# --- broken checkpoints: one of two through each command, and all of them in checkpoints/test_broken.py ---


@pytest.mark.parametrize(("command", "what"), in_turn(COMMANDS, "one byte short", "heads that do not divide"))
def test_broken_checkpoint(place, capsys, command, what):
    damage, message = CHECKPOINTS[what]
    damage(place / "model")
    refuse(place, capsys, line_of(command, "./model"), message)


# --- tokenizers and texts, for what reads text; all the tokenizers in checkpoints/test_broken.py ---


@pytest.mark.parametrize("what", ["none", "half of one"])
@pytest.mark.parametrize("command", OF_TEXT)
def test_broken_tokenizer(place, capsys, command, what):
    damage, message = TOKENIZERS[what]
    damage(place / "model")
    refuse(place, capsys, line_of(command, "./model"), message)


@pytest.mark.parametrize("what", ["another model's", "one without the word for all others"])
def test_verify_takes_no_broken_tokenizer_for_none(place, capsys, what):
    damage, message = TOKENIZERS[what]
    damage(place / "model")
    refuse(place, capsys, line_of("verify", "./model"), message)


def long_text(place):
    return ["--text", "I" + " her" * 100_000]


def half_a_character(place):
    return ["--text", "I saw her", "her\udcff"]


def in_a_file(content):
    def arguments(place):
        (place / "text.txt").write_bytes(content)
        return ["--text-file", "text.txt"]

    return arguments


TEXTS = {
    "empty": (lambda place: ["--text", ""], "text 0 is empty: it gives no token"),
    "empty, of several": (lambda place: ["--text", "I", ""], "text 1 is empty"),
    "enormous": (long_text, "text 0 has 100001 tokens, more than the model's 17 positions"),
    "far too long": (in_a_file(bytes(5_000_001)), "text.txt: has more than 5 MB"),
    "half a character": (half_a_character, "text 1 is not valid Unicode: character 3 is half of one"),
    "no such file": (lambda place: ["--text-file", "nowhere.txt"], "nowhere.txt: cannot be read (No such file"),
    "a folder": (lambda place: ["--text-file", "model"], "model: cannot be read (Is a directory)"),
    "an empty file": (in_a_file(b""), "text.txt: is empty; give a file with text in it"),
    "no text": (in_a_file(b"I saw \xff\xfe"), "text.txt: not UTF-8 text (byte 6)"),
}


@pytest.mark.parametrize("what", TEXTS)
def test_bad_text(place, capsys, what):
    arguments, message = TEXTS[what]
    refuse(place, capsys, line_of("attention-scores", "./model", options=arguments(place)), message)


SENTENCES = {
    "empty": ("", "sentences.txt: no sentence in it"),
    "without the target": ("I saw her\nI saw word1\n", "sentence 1 ('I saw word1') lacks the target ' her'"),
    "beginning with the target": ("I saw her\n her cat\n", "has nothing before the target"),
    "one alone": ("I saw her cat\n", "two or more sentences with the target ' her' are needed, not 1"),
}


@pytest.mark.parametrize("what", SENTENCES)
def test_bad_sentences(place, capsys, what):
    content, message = SENTENCES[what]
    (place / "sentences.txt").write_text(content)
    refuse(place, capsys, line_of("token-similarity", "./model"), message)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (" her", "sentence 1 ('I saw word1') lacks the target ' her' (and 1 more); --skip-missing"),
        ("her", "sentence 0 ('I saw her') lacks the target 'her' (and 2 more); did you mean ' her', with"),
        ("", "'' is not one token of ./model but 0: nothing"),
    ],
)
def test_a_target_that_is_not_there(place, capsys, target, message):
    write_word_tokenizer(place / "model", [*WORDS[:-1], "her"])
    (place / "sentences.txt").write_text("I saw her\nI saw word1\nI saw word2\n")
    refuse(place, capsys, [*line_of("token-similarity", "./model"), "--target", target], message)


@pytest.mark.parametrize("name", ["demo-gpt2", "demo-bert"])
def test_any_script_and_any_character_is_text(place, capsys, name):
    texts = ["日本語 🙂 <b>&amp;</b>", "مرحبا e\u0301 \u200b", "$\\frac{1}{0}$ \x00\x1b[31m {0} %s", "👩\u200d👧"]
    line = ["figures", "attention-scores", "3", "--model", name, "--out", "out", "--dpi", "40"]
    assert main([*line, "--text", *texts]) == 0
    assert capsys.readouterr().err == ""
    manifest = json.loads((place / "out/attention-scores/manifest.json").read_text())
    assert manifest["text"] == texts
    assert manifest["figures"]["3"]["files"] == ["3.npz", "3.png"]


def test_a_checkpoint_may_have_any_name(place, capsys, monkeypatch):
    """Titles show it as far as the fonts go; what none has is named in one line, of several figures too."""
    monkeypatch.setattr("jaxqkv.figures.fonts._families", lambda: ["DejaVu Sans"])
    name = "модель 模型 🙂 $\\bad$ <i>"
    (place / "model").rename(place / name)
    line = ["figures", "qkv-weights", "1", "2b", "2d", "--model", name, "--out", "out", "--dpi", "40"]
    assert main(line) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    missing = "型 (U+578B), 模 (U+6A21), 🙂 (U+1F642)"
    assert warning.startswith(f"jaxqkv: warning: no font on this machine has {missing}: boxes are drawn in their place")
    assert json.loads((place / "out/qkv-weights/manifest.json").read_text())["checkpoint"][0]["checkpoint"] == name


def test_a_checkpoints_name_moves_no_cursor(place, capsys):
    """Escape sequences and line breaks are shown as such, on the terminal and in every picture."""
    name = "a\x1b[31mred\nx"
    (place / "model").rename(place / name)
    assert main(["figures", "qkv-weights", "1", "2b", "--model", name, "--out", "out", "--format", "svg"]) == 0
    assert main(["info", name]) == 0
    for line in capsys.readouterr().out.splitlines():
        assert line.isprintable()
    for id in ("1", "2b"):
        picture = ElementTree.parse(place / f"out/qkv-weights/{id}.svg")
        assert r"a\x1b[31mred\nx" in "".join(picture.getroot().itertext())


@pytest.mark.parametrize("ids", [[[1, 43]], [[-1, 2]], [[2**40]]])
def test_ids_that_the_vocabulary_does_not_have(place, ids):
    with pytest.raises(JaxqkvError, match=r"token ids reach from .*; the model's are 0 to 42"):
        jaxqkv.load("./model").run(ids)


# --- arguments ---


@pytest.mark.parametrize("name", names())
def test_unknown_figure(place, capsys, name):
    known = list(study(name).figures)[-1]
    refuse(place, capsys, line_of(name, "./model", known + "z"), f"{name} has no figure {known}z; did you mean ")


# The last study has a check of its own, all others the same one.
LAYERS = {*in_turn(names(), "3", "-1", "1000000"), *((names()[-1], layer) for layer in ("3", "-1", "1000000"))}


@pytest.mark.parametrize(("name", "layer"), sorted(LAYERS))
def test_unknown_layer(place, capsys, name, layer):
    message = f"--layer {layer}: the layers of model are 0 to 2"
    refuse(place, capsys, line_of(name, "./model", f"--layer={layer}"), message)


def test_unknown_layer_in_the_library(place):
    with pytest.raises(JaxqkvError, match="no layer 3; the model's layers are 0 to 2"):
        jaxqkv.load("./model").run([[1]], layers=[0, 3])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["figures", "qkv-weigths"], "no study qkv-weigths; did you mean qkv-weights? See jaxqkv figures --help"),
        (["figures", "attention"], "no study attention; did you mean attention-scores"),
        (["figures", "xyz"], "no study xyz; there is qkv-weights, attention-scores"),
        (["figures", "qkv-weights", "7x"], "qkv-weights has no figure 7x"),
        (["figures", "qkv-weights", "2C"], "qkv-weights has no figure 2C; did you mean 2c?"),
        (["info", ""], "the name of the checkpoint is empty; give a hub id, a folder or demo-gpt2"),
        (["info", "demo-gtp2"], "need no download; did you mean demo-gpt2?"),
        (["figures", "qkv-weights", "--demo", "--model", "gpt2"], "--demo and --model exclude each other"),
        (
            ["figures", "qkv-weights", "--demo", "--text", "x"],
            "unrecognized arguments: --text; --text is an option of attention-scores, head-silencing, heads; see",
        ),
        (["figures", "weight-tour", "--demo", "--compare", "./nowhere"], "./nowhere: no such folder"),
        (["info", "random:" + 9000 * "x"], "xxx: neither a folder here nor a valid hub id"),
        (["info", "~nobody-of-that-name/x"], "~nobody-of-that-name/x: no such folder"),
        (["info", "model.safetensors"], "model.safetensors: no such folder"),
        (["info", "random:"], "expected a checkpoint after 'random:'"),
        (["info", "a\x1b[31m\nb"], r"a\x1b[31m\nb: neither a folder here nor a valid hub id"),
        (["figures", "token-frequency", "--model", "./model", "--corpus", "./no"], "no: no such file or folder"),
        (["figures", "token-frequency", "--model", "./model", "--corpus", "model"], "has no .txt, .jsonl, .parquet"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_what_there_is_not(place, capsys, line, message):
    refuse(place, capsys, line + ["--out", "out"] * (line[0] == "figures"), message)


def test_a_run_that_fails_leaves_no_folder_behind(place, capsys):
    """But one that was there."""
    (place / "mine").mkdir()
    for out in ("new", "mine"):
        assert main(["figures", "qkv-weights", "--model", "./nowhere", "--out", out]) == 2
    assert "./nowhere: no such folder" in capsys.readouterr().err
    assert not (place / "new").exists()
    assert list((place / "mine").iterdir()) == []


# --- places that cannot be written ---


@pytest.fixture
def no_pictures(monkeypatch):
    """Pictures are a few bytes, drawn at once."""
    monkeypatch.setattr("jaxqkv.figures.drawers.pictures", lambda display, formats, *look: [b"picture"] * len(formats))


@pytest.mark.parametrize(("name", "out"), in_turn(names(), "sentences.txt", "sentences.txt/deeper", "/proc/nowhere"))
def test_a_folder_that_cannot_be_made(place, capsys, name, out):
    line = [word if word != "out" else out for word in line_of(name, "./model")]
    refuse(place, capsys, line, f"{out}/{name}: cannot be written (")


@pytest.mark.parametrize("out", ["sentences.txt/verify.json", "/proc/nowhere/verify.json", "out"])
def test_a_report_that_cannot_be_written(place, capsys, out):
    refuse(place, capsys, ["verify", "./model", "--out", out], f"{out}: cannot be written (")


@pytest.mark.parametrize("kind", ["npz", "png", "svg"])
@pytest.mark.usefixtures("no_pictures")
def test_a_folder_where_a_figure_is_to_be(place, capsys, kind):
    """Nothing takes the place of a folder, and then the other files of the figure do not take theirs either."""
    path = place / "out/qkv-weights" / f"1.{kind}"
    path.unlink()
    path.mkdir()
    line = ["figures", "qkv-weights", "1", "--model", "./model", "--out", "out", "--format", "svg", "--dpi", "40"]
    refuse(place, capsys, line, "out/qkv-weights/1: cannot be written (Is a directory); choose another folder with")


# Older versions of NumPy leave the archive open that they could not write.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <function ZipFile.__del__")
@pytest.mark.usefixtures("no_pictures")
def test_a_full_disk(place, capsys, fill_disk):
    """Whichever file is the one for which there is no room: all of the figure and its listing, or nothing."""
    line = ["figures", "qkv-weights", "2d", "--model", "./model", "--out", "out", "--format", "svg", "--dpi", "40"]
    for full in ("2d.npz", "2d.png", "2d.svg", "manifest.json"):
        fill_disk(full)
        refuse(place, capsys, line, "out/qkv-weights/2d: cannot be written (No space left on device); choose another")
        gc.collect(1)  # the archive is young


def test_a_disk_that_is_full_for_the_page_alone(place, capsys, fill_disk):
    fill_disk("index.html")
    assert main(line_of("qkv-weights", "./model", "1", "2d")) == 2
    assert "out/index.html: cannot be written (No space left on device)" in error_of(capsys)
    figures = json.loads((place / "out/qkv-weights/manifest.json").read_text())["figures"]
    assert set(figures) == {"1", "2d"}
    assert all(arrays_of(place / "out/qkv-weights" / f"{id}.npz") for id in figures)
    assert (place / "out/index.html").read_text() == "earlier"


def test_a_disk_that_is_full_for_a_report(place, capsys, fill_disk, monkeypatch):
    monkeypatch.setattr("jaxqkv.model.comparison.report", lambda *arguments: {"passed": True})
    fill_disk("verify.json")
    refuse(place, capsys, line_of("verify", "./model"), "out/verify.json: cannot be written (No space left on device)")


@pytest.fixture
def fill_disk(monkeypatch):
    """From a call on, the file of a name is written to the device that is always full."""
    from pathlib import Path

    opened = Path.open

    def fill(name):
        def open_(self, mode="r", *arguments, **options):
            full = self.name.startswith(f".{name}.") and "x" in mode
            return opened(Path("/dev/full"), "wb") if full else opened(self, mode, *arguments, **options)

        monkeypatch.setattr(Path, "open", open_)

    return fill


def test_a_cache_that_cannot_be_written(place, capsys, monkeypatch):
    """It is said, and nothing else is different."""
    monkeypatch.setenv("JAXQKV_CACHE", str(place / "sentences.txt" / "cache"))
    kept = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        line = [word for word in line_of("token-frequency", "./model", "1", "2") if word != "--no-cache"]
        assert main(line) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in lines] == [
        " compiled programs are not kept",
        " the counts of tokens are not kept",
        " the batch of tokens are not kept",
    ]
    assert arrays_of(place / "out/token-frequency/2.npz")
