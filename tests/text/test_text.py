"""Text files: one text, however it is written, is the same tokens in every command; what is no text is told."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conftest import arrays_of

import jaxqkv
from jaxqkv.cli.main import main
from jaxqkv.errors import CorpusError
from jaxqkv.studies.stimuli import stimuli
from jaxqkv.text.corpora import open_corpus
from jaxqkv.text.reading import read_lines, read_sentences, read_text

MARK = b"\xef\xbb\xbf"
# Line ends are LF, CR LF and CR; a form feed, a line separator and such are characters.
LINES = [
    "I saw her at the market.",
    "She gave her\u2028the\x0cbook.\x85",
    "They asked\x1c her for \u2029advice, café 猫",
]
TEXT = "\n".join(LINES)
WRITTEN = {
    "plain": TEXT.encode(),
    "with a mark": MARK + TEXT.encode(),
    "with a final line end": TEXT.encode() + b"\n",
    "with CR LF": TEXT.replace("\n", "\r\n").encode(),
    "with CR": TEXT.replace("\n", "\r").encode(),
    "with CR, also at the end": TEXT.replace("\n", "\r").encode() + b"\r",
    "with all": MARK + TEXT.replace("\n", "\r\n").encode() + b"\r\n",
}


@pytest.mark.parametrize("written", WRITTEN)
def test_however_it_is_written_a_text_is_the_same(written, tmp_path):
    """In each of the functions that commands and corpora read with."""
    path = tmp_path / "text.txt"
    path.write_bytes(WRITTEN[written])
    assert read_text(path) == TEXT
    assert read_sentences(path) == list(read_lines(path)) == LINES
    assert list(open_corpus(path)) == [TEXT]
    assert list(open_corpus(path, documents="paragraphs")) == [TEXT]


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The text with a mark, and other line ends, of which one is the last."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "text.txt"
    path.write_bytes(WRITTEN["with all"])
    return path


def test_attention_scores(file, tmp_path):
    """From the command and from Python, beside the same text given as such."""
    line = ["figures", "attention-scores", "1", "--demo", "--arrays-only", "--quiet", "--out", str(tmp_path)]
    assert main([*line, "--text-file", str(file)]) == 0
    assert json.loads((tmp_path / "attention-scores/manifest.json").read_text())["text"] == [TEXT]
    figure = jaxqkv.studies.attention_scores.figure
    given, read = (figure("1", model="demo-gpt2", **text) for text in ({"text": TEXT}, {"text_file": str(file)}))
    for arrays in (read.arrays, arrays_of(tmp_path / "attention-scores/1.npz")):
        assert arrays.keys() == given.arrays.keys()
        for name, array in given.arrays.items():
            np.testing.assert_array_equal(arrays[name], array)


def test_view(file, tmp_path, monkeypatch):
    """What the page then shows is in test_view.py."""
    texts = []
    monkeypatch.setattr(jaxqkv.pages.view, "write_view", lambda path, model, text, *others, **more: texts.append(text))
    main(["view", "demo-gpt2", "--text-file", str(file), "--quiet", "--out", str(tmp_path / "page.html")])
    assert texts == [TEXT]


def test_sentences(file, tmp_path):
    """A sentence is a line of the file, whatever is in it."""
    line = ["figures", "token-similarity", "pairs", "--demo", "--arrays-only", "--quiet", "--out", str(tmp_path)]
    assert main([*line, "--sentences", str(file)]) == 0
    assert json.loads((tmp_path / "token-similarity/manifest.json").read_text())["sentences"] == LINES


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_paragraphs(tmp_path, end):
    text = "\n\none,\ntwo.\n \t\n\nthree\u2028\n\x0c\nfour\n\n"
    (tmp_path / "a.txt").write_bytes(MARK + text.replace("\n", end).encode())
    assert list(open_corpus(tmp_path / "a.txt", documents="paragraphs")) == ["one,\ntwo.", "three\u2028", "four"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
def test_json_lines(tmp_path, end, last):
    """What a string holds is the text, line ends and all; U+2028 may stand in it as it is."""
    texts = ["one\r\n", "two\u2028three", "\ufefffour\n"]
    lines = end.join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "a.jsonl").write_bytes(MARK + (lines + end * last).encode())
    assert list(open_corpus(tmp_path / "a.jsonl")) == texts


@pytest.mark.parametrize(("content", "text"), [(b"a\n\n", "a\n"), (b"\na", "\na"), (b"a\r\n\r\n", "a\n"), (b" ", " ")])
def test_one_final_line_end_is_left_out_and_nothing_else(tmp_path, content, text):
    (tmp_path / "a.txt").write_bytes(content)
    assert list(open_corpus(tmp_path / "a.txt")) == [text]


def test_a_mark_within_a_text_is_a_character(tmp_path):
    (tmp_path / "a.txt").write_bytes(MARK + MARK + b"a\n" + MARK + b"b")
    assert list(open_corpus(tmp_path / "a.txt")) == ["\ufeffa\n\ufeffb"]
    assert list(read_lines(tmp_path / "a.txt")) == ["\ufeffa", "\ufeffb"]


@pytest.mark.parametrize("content", [b"", b"\n", b"a", b"a\n", b"a\r\rb\n\r\nc\r", b"\r\n\r", MARK + b"a\rb\r\n"])
def test_lines_are_those_of_the_whole_text(tmp_path, content):
    """As Python's own text files have them."""
    (tmp_path / "a.txt").write_bytes(content)
    with (tmp_path / "a.txt").open(encoding="utf-8-sig") as file:
        assert list(read_lines(tmp_path / "a.txt")) == file.read().removesuffix("\n").split("\n") * bool(content)


def test_the_package_s_own_sentences():
    assert len(stimuli("token_similarity/her.txt")) == 54
    assert len(stimuli("attention_scores/purple.txt")) == 1


def test_lines_are_read_as_they_are_used(tmp_path):
    with (tmp_path / "a.jsonl").open("w") as file:
        file.writelines(f'{{"text": "{number:0100000d}"}}\n' for number in range(200))
    tracemalloc.start()
    try:
        assert sum(len(text) for text in open_corpus(tmp_path / "a.jsonl")) == 200 * 100_000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


# --- what is no text ---

SAVE = "save it as UTF-8"
BROKEN = {
    "another encoding": ("café".encode("latin-1"), f"not UTF-8 text (byte 3); {SAVE}"),
    "after a mark": (MARK + b"a\r\n\xff", f"not UTF-8 text (byte 6); {SAVE}"),
    "half a character at the end": ("caf猫".encode()[:-1], f"not UTF-8 text (byte 3); {SAVE}"),
    "half a character at a line end": ("猫".encode()[:2] + b"\na", f"not UTF-8 text (byte 0); {SAVE}"),
    "UTF-16": ("a b".encode("utf-16"), f"UTF-16 text, as its byte-order mark says; {SAVE}"),
    "UTF-16, the other way round": (b"\xfe\xff\0a", f"UTF-16 text, as its byte-order mark says; {SAVE}"),
    "UTF-32": ("a b".encode("utf-32"), f"UTF-32 text, as its byte-order mark says; {SAVE}"),
}
NOTHING = {"nothing": b"", "a mark": MARK, "a line end": b"\n", "CR LF": b"\r\n", "a mark and a line end": MARK + b"\n"}
OF_A_CORPUS = ["figures", "token-frequency", "--demo", "--no-cache", "--out", "out"]
COMMANDS = {
    "attention-scores": ["figures", "attention-scores", "--demo", "--out", "out", "--text-file"],
    "view": ["view", "demo-gpt2", "--out", "out/page.html", "--text-file"],
    "sentences": ["figures", "token-similarity", "--demo", "--out", "out", "--sentences"],
    "corpus": [*OF_A_CORPUS, "--corpus"],
    "paragraphs": [*OF_A_CORPUS, "--documents", "paragraphs", "--corpus"],
}


def error_of(arguments, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err.removeprefix("jaxqkv: error: ").rstrip("\n")


READERS = {
    "text": read_text,
    "sentences": read_sentences,
    "corpus": lambda path: list(open_corpus(path)),
    "paragraphs": lambda path: list(open_corpus(path, documents="paragraphs")),
}
NO_DOCUMENT = "no document in it: the file is empty; give files with text in them"
EMPTY = {
    "text": "is empty; give a file with text in it",
    "sentences": "no sentence in it; give a file with a sentence a line",
    "corpus": NO_DOCUMENT,
    "paragraphs": NO_DOCUMENT,
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("reader", READERS)
def test_what_cannot_be_decoded(tmp_path, monkeypatch, reader, what):
    monkeypatch.chdir(tmp_path)
    content, message = BROKEN[what]
    Path("text.txt").write_bytes(content)
    with pytest.raises(CorpusError) as caught:
        READERS[reader](Path("text.txt"))
    assert str(caught.value).startswith("text.txt")
    assert str(caught.value).endswith(f": {message}")


@pytest.mark.parametrize("what", NOTHING)
@pytest.mark.parametrize("reader", READERS)
def test_a_file_without_text(tmp_path, monkeypatch, reader, what):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_bytes(NOTHING[what])
    with pytest.raises(CorpusError) as caught:
        READERS[reader](Path("text.txt"))
    assert str(caught.value) == f"text.txt: {EMPTY[reader]}"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_say_what_is_no_text(tmp_path, monkeypatch, capsys, command):
    """In one line, and as their reader does."""
    monkeypatch.chdir(tmp_path)
    content, message = BROKEN["after a mark"]
    Path("text.txt").write_bytes(content)
    error = error_of([*COMMANDS[command], "text.txt"], capsys)
    assert error.startswith("text.txt")
    assert error.endswith(f": {message}")
    Path("text.txt").write_bytes(NOTHING["a mark and a line end"])
    assert error_of([*COMMANDS[command], "text.txt"], capsys) == f"text.txt: {EMPTY.get(command, EMPTY['text'])}"


@pytest.mark.parametrize(
    ("content", "line", "byte"),
    [
        (b'{"text": "a"}\n\n{"text": "\xff"}', 3, 25),
        (MARK + b'{"text": "\xff"}', 1, 13),
        (b'{"text": "a"}\r{"text": "\xe7\x8c"}\r', 2, 24),
        (b'{"text": "a"}\r\n{"text": "\xff"}\r\n', 2, 25),
    ],
)
def test_json_lines_that_cannot_be_decoded(tmp_path, content, line, byte):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(CorpusError) as caught:
        list(open_corpus(tmp_path / "a.jsonl"))
    assert str(caught.value) == f"{tmp_path}/a.jsonl, line {line}: not UTF-8 text (byte {byte}); {SAVE}"


def test_an_empty_file_among_others_is_left_out(tmp_path):
    for name, content in zip("abcdef", [*NOTHING.values(), b"text"], strict=True):
        (tmp_path / f"{name}.txt").write_bytes(content)
        (tmp_path / f"{name}.jsonl").write_bytes(content if content != b"text" else b'{"text": "line"}')
    assert list(open_corpus(tmp_path)) == ["line", "text"]
