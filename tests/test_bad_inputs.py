"""Bad inputs of every command: one clear line, exit status 2, nothing half-written, nothing lost that was there."""

import gc
import json
import os
import struct
from xml.etree import ElementTree

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import GPT2, arrays_of, random_tensors, write_folder, write_word_tokenizer
from safetensors.numpy import save_file

import jaxqkv
from jaxqkv.checkpoints.weights import count_broken
from jaxqkv.cli.main import main
from jaxqkv.errors import JaxqkvError, JaxqkvWarning
from jaxqkv.studies.registry import names, study

WORDS = ["<unk>", " her", " saw", " told", "I", " cat", *(f" word{number}" for number in range(37))]
# What each study takes besides the checkpoint, to run in a moment.
STIMULI = {
    "qkv-weights": [],
    "attention-scores": ["--text", "I saw her cat word1 word2"],
    "token-frequency": ["--corpus", "texts", "--tokens", "50", "--batch", "2", "--length", "7", "--no-cache"],
    "weight-tour": [],
    "token-similarity": ["--sentences", "sentences.txt"],
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


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to be in: a checkpoint named `model`, texts, and in `out` what an earlier run left."""
    write_word_tokenizer(write_folder(tmp_path / "model", GPT2), WORDS)
    (tmp_path / "texts").mkdir()
    for number in range(3):
        words = np.random.default_rng(number).choice(WORDS[1:], 30)
        (tmp_path / "texts" / f"{number}.txt").write_text("I" + "".join(words))
    (tmp_path / "sentences.txt").write_text("I saw her cat\nI told her word1\nI saw word2 her word3\n")
    for name in names():
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True)
        first = next(iter(study(name).figures))
        for kind in ("npz", "png", "svg"):
            (folder / f"{first}.{kind}").write_bytes(b"earlier")
        (folder / "manifest.json").write_text(json.dumps({"figures": {first: {"title": "earlier"}}}))
    for name in ("index.html", "attention.html", "verify.json"):
        (tmp_path / "out" / name).write_text("earlier")
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
    assert main(line) == 2
    assert message in error_of(capsys)
    assert contents(place / "out") == before


# --- broken checkpoints, for every command and the library ---


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def weights(content):
    """Damage: other contents of model.safetensors, or a function of the present ones."""

    def damage(folder):
        path = folder / "model.safetensors"
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)

    return damage


def offsets(*pairs, shape=(2,)):
    """A file with a tensor for each pair of offsets."""
    return safetensors(
        {f"t{i}": {"dtype": "F32", "shape": list(shape), "data_offsets": list(pair)} for i, pair in enumerate(pairs)},
        bytes(16),
    )


def config(**changes):
    """Damage: other values in config.json; None takes a key out."""

    def damage(folder):
        path = folder / "config.json"
        data = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))

    return damage


def text(name, content):
    """Damage: a file with other contents; None takes it away."""

    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_text(content)

    return damage


def tensors(change):
    """Damage: a change of the tensors."""

    def damage(folder):
        changed = random_tensors(GPT2)
        change(changed)
        write_folder(folder, GPT2, changed)

    return damage


def replace(key, make):
    return tensors(lambda t: t.update({key: make(t[key])}))


def stored_as(dtype):
    """Damage: wte.weight said to be of another dtype of as many bytes."""

    def change(content):
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        entry = header["wte.weight"]
        entry["dtype"] = dtype
        entry["shape"] = [43, 35 * 4] if dtype.startswith("F8") else [43, 35]
        return safetensors(header, content[8 + length :])

    return weights(change)


def index(keep=True, **places):
    """Damage: an index in the place of model.safetensors, with the token embedding or without."""

    def damage(folder):
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        if not keep:
            kept = {key: values for key, values in random_tensors(GPT2).items() if key != "wte.weight"}
            save_file(kept, folder / "part.safetensors")
        whole = dict.fromkeys(random_tensors(GPT2), "part.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"tables": whole | places}))

    return damage


def enlarged(name, size):
    """Damage: a file of that many bytes, most of which the disk need not have."""

    def damage(folder):
        with (folder / name).open("ab") as file:
            file.truncate(size)

    return damage


def pipe(name):
    """Damage: in the place of a file a pipe that nobody writes to."""

    def damage(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def gone(folder):
    folder.rename(folder.with_name("elsewhere"))


def emptied(folder):
    gone(folder)
    folder.mkdir()


def only_a_file(folder):
    gone(folder)
    folder.write_text("no folder")


NOT_WHOLE = "model.safetensors: not a whole safetensors file"
NO_FIT = "model.safetensors: tensors do not fit config.json: "
CHECKPOINTS = {
    "missing folder": (gone, "./model: no such folder"),
    "a file for a folder": (only_a_file, "./model: no such folder"),
    "empty folder": (emptied, "model/config.json: no such file"),
    "only pickles": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "only pytorch_model.bin, and pickles are never opened",
    ),
    "empty file": (weights(b""), NOT_WHOLE),
    "one byte": (weights(b"\x01"), NOT_WHOLE),
    "half a file": (weights(lambda content: content[: len(content) // 2]), NOT_WHOLE),
    "one byte short": (weights(lambda content: content[:-1]), NOT_WHOLE),
    "one byte more": (weights(lambda content: content + b"x"), NOT_WHOLE),
    "header longer than the file": (weights(safetensors(b"{}", length=1000)), NOT_WHOLE),
    "header of 2**62 bytes": (weights(safetensors(b"{}", length=2**62)), NOT_WHOLE),
    "header is a list": (weights(safetensors(b"[1, 2]")), NOT_WHOLE),
    "header is no text": (weights(safetensors(b"\xff\xfe{}")), NOT_WHOLE),
    "header of 40 MB": (weights(safetensors(b"{}", length=40_000_000)), "(header of 40,000,000 bytes)"),
    "a tensor described by a list": (weights(safetensors({"wte.weight": ["F32", [2], [0, 8]]}, bytes(8))), NOT_WHOLE),
    "a pipe for weights": (pipe("model.safetensors"), NOT_WHOLE + " (it is no regular file)"),
    "overlapping offsets": (weights(offsets((0, 8), (4, 12))), NOT_WHOLE),
    "offsets with a gap": (weights(offsets((0, 4), (8, 16))), NOT_WHOLE),
    "offsets past the end": (weights(offsets((0, 8), (8, 1 << 40))), NOT_WHOLE),
    "offsets backwards": (weights(offsets((16, 0))), NOT_WHOLE),
    "shape without its bytes": (weights(offsets((0, 16), shape=(3,))), NOT_WHOLE),
    "shape whose product overflows": (weights(offsets((0, 16), shape=(2**32, 2**32))), NOT_WHOLE),
    "a tensor too few": (tensors(lambda t: t.pop("h.1.ln_1.bias")), NO_FIT + "missing h.1.ln_1.bias [35]"),
    "a tensor too many": (
        tensors(lambda t: t.update({"h.7.ln\x1b[31m\n": np.zeros(2, np.float32)})),
        NO_FIT + r"unexpected h.7.ln\x1b[31m\n [2]",
    ),
    "a transposed tensor": (replace("h.0.mlp.c_fc.weight", lambda x: x.T), NO_FIT + "wrong shape h.0.mlp.c_fc.weight"),
    "integer weights": (stored_as("I32"), "model.safetensors: wte.weight is I32, expected one of F64, F32, F16, BF16"),
    "weights of 8 bits": (stored_as("F8_E4M3"), "wrong shape wte.weight [43, 140]"),
    "config is no JSON": (text("config.json", "{"), "model/config.json: not readable as JSON"),
    "config nested too deep": (text("config.json", "[" * 100_000), "model/config.json: not readable as JSON"),
    "config with a number too long": (
        text("config.json", '{"n_layer": ' + "9" * 9999 + "}"),
        "config.json: not readable as JSON",
    ),
    "config of a gigabyte": (enlarged("config.json", 10**9), "config.json: cannot be read (it is larger than 10 MB)"),
    "config is a pipe": (pipe("config.json"), "model/config.json: cannot be read (it is no regular file)"),
    "config is a list": (text("config.json", "[]"), "model/config.json: expected a JSON object, found list"),
    "another architecture": (config(model_type="llama"), "model_type is 'llama'; supported are 'gpt2' and 'bert'"),
    "no head count": (config(n_head=None), "model/config.json: n_head is missing"),
    "two head counts": (config(num_attention_heads=7), "num_attention_heads = 7 contradicts n_head = 5, which means"),
    "two depths": (config(num_hidden_layers=2), "config.json: num_hidden_layers = 2 contradicts n_layer = 3"),
    "heads that do not divide": (config(n_head=4), "n_embd = 35 is not a multiple of n_head = 4"),
    "a width that is not the tensors'": (config(n_embd=40), NO_FIT + "wrong shape h.0.attn.c_attn.bias [105], config"),
    "an inner width that is not": (config(n_inner=31), "h.0.mlp.c_fc.bias [29], config says [31]"),
    "more layers than there are": (config(n_layer=4), NO_FIT + "missing h.3.attn.c_attn.bias [105]"),
    "fewer layers than there are": (config(n_layer=2), NO_FIT + "unexpected h.2.attn.c_attn.bias [105]"),
    "10**12 layers": (config(n_layer=10**12), "n_layer = 1000000000000 is more than 10,000"),
    "fewer tokens than there are": (config(vocab_size=40), "wrong shape wte.weight [43, 35], config says [40, 35]"),
    "more positions than there are": (config(n_positions=18), "wrong shape wpe.weight [17, 35], config says [18, 35]"),
    "index out of its folder": (index(x="../part.safetensors"), "names a file outside its folder"),
    "index to nowhere": (
        index(keep=False, **{"wte.weight": "n.safetensors"}),
        "missing wte.weight [43, 35] (the index places it in n.safetensors, which is not there)",
    ),
    "index to nowhere alone": (
        index(**dict.fromkeys(random_tensors(GPT2), "n.safetensors")),
        "names files that are not there: n.safetensors",
    ),
    "index to a name too long": (
        index(**dict.fromkeys(random_tensors(GPT2), "n" * 5000 + ".safetensors")),
        "names files that are not there",
    ),
    "index to no name": (index(x=""), "names what is no safetensors file: ''"),
    "index to a pickle": (index(x="pytorch_model.bin"), "names what is no safetensors file: 'pytorch_model.bin'"),
    "index to a pattern": (index(x="*.safetensors"), "names what is no safetensors file: '*.safetensors'"),
    "index to a pointer of Git LFS": (
        lambda f: (index()(f), text("part.safetensors", "version https://git-lfs.github.com/spec/v1\noid x\n")(f)),
        "model/part.safetensors: a Git LFS pointer instead of the file; run `git lfs pull` in its folder",
    ),
}


@pytest.mark.parametrize("what", CHECKPOINTS)
@pytest.mark.parametrize("command", COMMANDS)
def test_broken_checkpoint(place, capsys, command, what):
    damage, message = CHECKPOINTS[what]
    damage(place / "model")
    refuse(place, capsys, line_of(command, "./model"), message)


@pytest.mark.parametrize("what", CHECKPOINTS)
def test_broken_checkpoint_in_the_library(place, what):
    damage, message = CHECKPOINTS[what]
    damage(place / "model")
    with pytest.raises(JaxqkvError) as error:
        jaxqkv.load("./model").run([[1, 2]])
    assert message in str(error.value)
    assert str(error.value).isprintable()


# --- tokenizers and texts, for what reads text ---


def tokenizer(**changes):
    """Damage: other entries in tokenizer.json, and in its parts."""

    def damage(folder):
        path = folder / "tokenizer.json"
        data = json.loads(path.read_text())
        for key, value in changes.items():
            data[key] = data[key] | value if isinstance(data[key], dict) else value
        path.write_text(json.dumps(data))

    return damage


TOKENIZERS = {
    "none": (text("tokenizer.json", None), "./model: has no tokenizer.json, vocab.json with merges.txt, or vocab.txt"),
    "another model's": (
        tokenizer(model={"vocab": {word: 43 + index for index, word in enumerate(WORDS)}}),
        ", the model has 43; they do not belong together",
    ),
    "no JSON": (text("tokenizer.json", "{"), "model: tokenizer files cannot be read"),
    "half of one": (text("tokenizer.json", '{"version": "1.0", "model": {"type": "WordLevel"'), "cannot be read"),
    "one that panics when it is read": (
        tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": ""}),
        "model: tokenizer files cannot be read",
    ),
    "a pointer of Git LFS": (
        text("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1355256\n"),
        "model/tokenizer.json: a Git LFS pointer instead of the file; run `git lfs pull` in its folder",
    ),
    "one without the word for all others": (
        tokenizer(model={"unk_token": "?", "vocab": {" her": 1, "I": 4}}),
        "model: the tokenizer fails (",
    ),
}


@pytest.mark.parametrize("what", TOKENIZERS)
@pytest.mark.parametrize("command", OF_TEXT)
def test_broken_tokenizer(place, capsys, command, what):
    damage, message = TOKENIZERS[what]
    damage(place / "model")
    refuse(place, capsys, line_of(command, "./model"), message)


@pytest.mark.parametrize("what", [what for what in TOKENIZERS if what != "none"])
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
        (" her", "sentence 1 ('I saw word1') lacks the target ' her', and so it is with 1 more; --skip-missing"),
        ("her", "sentence 0 ('I saw her') lacks the target 'her', and so it is with 2 more; did you mean ' her', with"),
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


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("layer", ["3", "-1", "1000000"])
def test_unknown_layer(place, capsys, name, layer):
    message = f"--layer {layer}: the layers of model are 0 to 2"
    refuse(place, capsys, line_of(name, "./model", f"--layer={layer}"), message)


def test_unknown_layer_in_the_library(place):
    with pytest.raises(JaxqkvError, match="no layer 3; the model's layers are 0 to 2"):
        jaxqkv.load("./model").run([[1]], layers=[0, 3])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["figures", "qkv-weigths"], "no study qkv-weigths; did you mean qkv-weights?"),
        (["figures", "attention"], "no study attention; did you mean attention-scores"),
        (["figures", "xyz"], "no study xyz; there is qkv-weights, attention-scores"),
        (["figures", "qkv-weights", "7x"], "qkv-weights has no figure 7x"),
        (["figures", "qkv-weights", "2C"], "qkv-weights has no figure 2C; did you mean 2c?"),
        (["info", ""], "the name of the checkpoint is empty; give a hub id, a folder or demo-gpt2"),
        (["info", "demo-gtp2"], "need no download; did you mean demo-gpt2?"),
        (["figures", "qkv-weights", "--demo", "--model", "gpt2"], "--demo and --model exclude each other"),
        (["figures", "qkv-weights", "--demo", "--text", "x"], "qkv-weights takes no --text"),
        (["figures", "weight-tour", "--demo", "--compare", "./nowhere"], "./nowhere: no such folder"),
        (["info", "random:" + 9000 * "x"], "xxx: neither a folder here nor a valid hub id"),
        (["info", "~nobody-of-that-name/x"], "~nobody-of-that-name/x: no such folder"),
        (["info", "random:"], "expected a checkpoint after 'random:'"),
        (["info", "a\x1b[31m\nb"], r"a\x1b[31m\nb: neither a folder here nor a valid hub id"),
        (["figures", "token-frequency", "--model", "./model", "--corpus", "./no"], "no: no such file or folder"),
        (["figures", "token-frequency", "--model", "./model", "--corpus", "model"], "has no .txt, .jsonl, .parquet"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_what_there_is_not(place, capsys, line, message):
    refuse(place, capsys, line + ["--out", "out"] * (line[0] == "figures"), message)


# --- places that cannot be written ---


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("out", ["sentences.txt", "sentences.txt/deeper", "/proc/nowhere"])
def test_a_folder_that_cannot_be_made(place, capsys, name, out):
    line = [word if word != "out" else out for word in line_of(name, "./model")]
    refuse(place, capsys, line, f"{out}/{name}: cannot be written (")


@pytest.mark.parametrize("out", ["sentences.txt/verify.json", "/proc/nowhere/verify.json", "out"])
def test_a_report_that_cannot_be_written(place, capsys, out):
    refuse(place, capsys, ["verify", "./model", "--out", out], f"{out}: cannot be written (")


@pytest.mark.parametrize("kind", ["npz", "png", "svg"])
def test_a_folder_where_a_figure_is_to_be(place, capsys, kind):
    """Nothing takes the place of a folder, and then the other files of the figure do not take theirs either."""
    path = place / "out/qkv-weights" / f"1.{kind}"
    path.unlink()
    path.mkdir()
    line = ["figures", "qkv-weights", "1", "--model", "./model", "--out", "out", "--format", "svg", "--dpi", "40"]
    refuse(place, capsys, line, "out/qkv-weights/1: cannot be written (Is a directory); choose another folder with")


# Older versions of NumPy leave the archive open that they could not write.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <function ZipFile.__del__")
@pytest.mark.parametrize("full", ["2d.npz", "2d.png", "2d.svg", "manifest.json"])
def test_a_full_disk(place, capsys, fill_disk, full):
    """Whichever file is the one for which there is no room: all of the figure and its listing, or nothing."""
    line = ["figures", "qkv-weights", "2d", "--model", "./model", "--out", "out", "--format", "svg", "--dpi", "40"]
    fill_disk(full)
    refuse(place, capsys, line, "out/qkv-weights/2d: cannot be written (No space left on device); choose another")
    gc.collect()


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


# --- weights that are NaN or infinite ---


def spoil(t):
    t["h.1.attn.c_attn.weight"][3, 5] = np.nan
    t["h.1.attn.c_attn.weight"][4, 40:42] = -np.inf


SPOILT = "model/model.safetensors: NaN or infinite values in h.1.attn.c_attn.weight (3 of 3,675)"
NOT_DRAWN = {
    "qkv-weights": {"2b", "4b", "5a"},
    "attention-scores": {"4"},
    "token-frequency": set(),
    "weight-tour": {"head-clusters"},
    "token-similarity": {"cosine", "correlation"},
}


@pytest.mark.parametrize("name", names())
def test_weights_that_are_not_finite_are_computed_and_named(place, capsys, name):
    tensors(spoil)(place / "model")
    write_word_tokenizer(place / "model", WORDS)
    assert main(line_of(name, "./model")) == 0
    warning, *others = capsys.readouterr().err.splitlines()
    assert warning == f"jaxqkv: warning: {SPOILT}"
    assert all("are NaN or infinite" in line for line in others)
    assert {line.split()[1] for line in others} == NOT_DRAWN[name]
    figures = json.loads((place / "out" / name / "manifest.json").read_text())["figures"]
    assert NOT_DRAWN[name] == set(study(name).figures) - set(figures)


def test_verify_fails_weights_that_are_not_finite(place, capsys):
    pytest.importorskip("torch", exc_type=ImportError)
    tensors(spoil)(place / "model")
    write_word_tokenizer(place / "model", WORDS)
    assert main(["verify", "./model", "--out", "out/verify.json"]) == 1
    out, err = capsys.readouterr()
    assert err == f"jaxqkv: warning: {SPOILT}\n"
    assert "FAILED" in out


class TestNotFinite:
    """The library's warnings: of what was used, once, and with the right results beside."""

    def test_what_comes_before_is_as_it_was(self, place):
        clean = jaxqkv.load("./model").run([[1, 2, 3]], capture={"q"})
        tensors(spoil)(place / "model")
        with pytest.warns(JaxqkvWarning) as caught:
            spoilt = jaxqkv.load("./model").run([[1, 2, 3]], capture={"q"})
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
            model.run([[1, 7]], layers=0)
        with pytest.warns(JaxqkvWarning, match=r"in h.1.attn.c_attn.weight \(1 of"):
            model.hidden([[1, 2]])

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
        result = jaxqkv.load("./model").run([[1, 2]], reduce=lambda a, mask: jax.numpy.log(0 * a.q.sum()))
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
            jaxqkv.load("./model").run([[1]])

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
