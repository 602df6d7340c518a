"""Documents from files, from Python and from a stand-in for the hub."""

import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from test_hub import Hub

from jaxqkv.errors import CorpusError, JaxqkvError
from jaxqkv.text import corpora as corpus
from jaxqkv.text.corpora import open_corpus


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(*arguments, **options):
    with pytest.raises(CorpusError) as caught:
        list(open_corpus(*arguments, **options))
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestText:
    TEXT = "First line,\nsecond.\n\nNext one, café 猫 🙂\n \t\n\n\nLast."

    def test_a_file_is_a_document(self, tmp_path):
        assert list(open_corpus(write(tmp_path / "a.txt", self.TEXT))) == [self.TEXT]

    def test_paragraphs_are_separated_by_blank_lines(self, tmp_path):
        read = open_corpus(write(tmp_path / "a.txt", self.TEXT), documents="paragraphs")
        paragraphs = [text.strip() for text in read if text.strip()]
        assert paragraphs == ["First line,\nsecond.", "Next one, café 猫 🙂", "Last."]

    def test_a_corpus_can_be_read_again(self, tmp_path):
        read = open_corpus(write(tmp_path / "a.txt", self.TEXT))
        assert list(read) == list(read)

    def test_a_cache_of_the_hub_s_that_cannot_be_made(self, tmp_path):
        """As on a cluster whose home is read-only: files are read all the same."""
        path = write(tmp_path / "a.txt", self.TEXT)
        (tmp_path / "file").write_text("in the way")
        code = "import sys; from jaxqkv import corpus; sys.exit(list(corpus.open_corpus(sys.argv[1])) != [sys.argv[2]])"
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), self.TEXT],
            env=os.environ | {"HF_HOME": str(tmp_path / "file" / "cache")},
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_names_with_signs_of_patterns(self, tmp_path):
        assert list(open_corpus(write(tmp_path / "a [1]*?.txt", "text"))) == ["text"]

    def test_bytes_that_are_no_text(self, tmp_path):
        (tmp_path / "bad.txt").write_bytes(b"good \xff bad")
        assert refusal(tmp_path / "bad.txt").startswith(f"{tmp_path}/bad.txt: not UTF-8 text")


class TestTables:
    def test_jsonl_fields_beside_the_text_may_be_anything(self, tmp_path):
        lines = ['{"text": "one", "n": 1}', "", '{"n": "x", "text": "two\\nlines"}', '{"text": "", "n": [1]}']
        assert list(open_corpus(write(tmp_path / "a.jsonl", "\n".join(lines)))) == ["one", "two\nlines", ""]

    def test_half_an_emoji_is_replaced(self, tmp_path):
        path = write(tmp_path / "a.jsonl", '{"text": "x \\ud83d y"}\n{"text": "x \\ud83d\\ude42 é"}\n')
        assert list(open_corpus(path)) == ["x \ufffd y", "x 🙂 é"]

    def test_jsonl_text_column(self, tmp_path):
        path = write(tmp_path / "a.jsonl", '{"body": "one"}\n{"body": "two"}\n')
        assert list(open_corpus(path, text_column="body")) == ["one", "two"]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{not json", "line 3: not JSON"),
            (
                '{"body": "x", "title": "y"}',
                "line 3: no column 'text'; it has body, title; name the text's with --text",
            ),
            ('{"text": 7}', "line 3: 'text' is int, not text"),
            ('["text"]', "line 3: no column 'text'; it has no fields"),
            ("{}", "line 3: no column 'text'; it has no fields"),
            ("[" * 100_000, "line 3: not JSON"),
        ],
    )
    def test_jsonl_errors_name_file_and_line(self, tmp_path, line, message):
        path = write(tmp_path / "a.jsonl", f'{{"text": "one"}}\n\n{line}\n')
        assert refusal(path).startswith(f"{path}, {message}")

    def test_parquet(self, tmp_path):
        path = tmp_path / "a.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["one", "two"], "n": [7, None]}), path)
        assert list(open_corpus(path)) == ["one", "two"]
        assert refusal(path, text_column="body").startswith(f"{path}: no column 'body'; it has id, text, n")
        assert refusal(path, text_column="id") == f"{path}, row 0: 'id' is int, not text"

    def test_parquet_that_is_none(self, tmp_path):
        path = write(tmp_path / "a.parquet", "no table")
        assert refusal(path).startswith(f"{path}: not a readable parquet file")


class TestFolders:
    def test_files_in_the_order_of_their_paths_hidden_ones_left_out(self, tmp_path):
        write(tmp_path / "b.txt", "three")
        write(tmp_path / "a" / "two.jsonl", '{"text": "two"}')
        write(tmp_path / "a" / "one.TXT", "one")
        write(tmp_path / ".hidden" / "x.txt", "hidden")
        write(tmp_path / "notes.md", "not read")
        assert list(open_corpus(tmp_path)) == ["one", "two", "three"]
        assert list(open_corpus([tmp_path / "b.txt", tmp_path / "a"])) == ["three", "one", "two"]

    def test_a_file_given_twice_is_read_twice_and_is_another_corpus(self, tmp_path):
        path = write(tmp_path / "a.txt", "one")
        assert list(open_corpus([path, path])) == ["one", "one"]
        assert open_corpus([path, path]).fingerprint != open_corpus(path).fingerprint

    @pytest.mark.parametrize("other", ["python-docs", "owner/name"])
    def test_only_files_may_be_several(self, tmp_path, other):
        assert refusal([write(tmp_path / "a.txt", "one"), other]).startswith(f"{other}: of files and folders there may")

    def test_refusals(self, tmp_path):
        assert refusal("~nosuchuser/x.txt") == "~nosuchuser/x.txt: no such file or folder"
        (tmp_path / "empty").mkdir()
        assert refusal(tmp_path / "empty") == f"{tmp_path}/empty: has no .txt, .jsonl, .parquet file"
        assert refusal(tmp_path / "absent.txt") == f"{tmp_path}/absent.txt: no such file or folder"
        path = write(tmp_path / "a.md", "text")
        assert refusal(path) == f"{path}: of files, .txt, .jsonl, .parquet are read"
        assert "files or paragraphs" in refusal(path, documents="lines")

    def test_the_fingerprint_changes_with_what_is_read(self, tmp_path):
        path = write(tmp_path / "a.txt", "one")
        first = open_corpus(path)
        assert open_corpus(path).fingerprint == first.fingerprint
        assert open_corpus(path, documents="paragraphs").fingerprint != first.fingerprint
        write(path, "two")
        assert open_corpus(path).fingerprint != first.fingerprint
        assert open_corpus(path).about["files"] != first.about["files"]


def test_pythons_own_documentation_is_cut_at_line_ends():
    from pydoc_data.topics import topics

    read = open_corpus("python-docs")
    windows = list(read)
    assert "".join(windows) == "\n".join(topics[name] for name in sorted(topics))
    assert all(len(window) >= corpus.WINDOW and window.endswith("\n") for window in windows[:-1])
    assert len(windows) > 64
    assert read.about["corpus"] == "python-docs"


# --- the hub: each step is a process of its own, since its library reads its settings when it is imported ---

READ = """
import json, sys
from itertools import islice
from jaxqkv.text.corpora import open_corpus
from jaxqkv.errors import JaxqkvError
try:
    corpus = open_corpus(sys.argv[1], text_column=sys.argv[2])
    print(json.dumps([corpus.about, list(islice(corpus, 3))]))
except JaxqkvError as error:
    print(json.dumps(str(error)))
"""


def read_in_process(spec, tmp_path, endpoint, text_column="text", **environment):
    folders = {"HF_HOME": str(tmp_path / "hf"), "JAXQKV_CACHE": str(tmp_path / "cache")}
    environment = os.environ | environment | folders | {"HF_ENDPOINT": endpoint}
    done = subprocess.run(
        [sys.executable, "-c", READ, spec, text_column],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def hub(tmp_path):
    base = tmp_path / "repository"
    for config in ("one", "two"):
        lines = [json.dumps({"title": str(n), "text": f"{config} {n}"}) for n in range(5)]
        write(base / config / "train.jsonl", "\n".join(lines))
    front = {
        "configs": [{"config_name": c, "data_files": [{"split": "train", "path": f"{c}/*"}]} for c in ("one", "two")]
    }
    write(base / "README.md", f"---\n{json.dumps(front)}\n---\n")
    server = Hub({"datasets/owner/texts": base})
    yield server
    server.shutdown()
    server.server_close()


class TestHub:
    def test_a_data_set_is_streamed_at_its_commit(self, hub, tmp_path):
        about, texts = read_in_process("owner/texts:two:train", tmp_path, hub.url)
        assert texts == ["two 0", "two 1", "two 2"]
        assert about["config"] == "two"
        assert about["split"] == "train"
        assert len(about["revision"]) == 40

    @pytest.mark.parametrize(
        ("spec", "column", "words"),
        [
            ("owner/nothing", "text", ["neither a file here nor a data set on the hub", "--corpus"]),
            ("owner/texts:three", "text", ["three", "one", "two"]),
            ("owner/texts:one:test", "text", ["test", "train"]),
            ("owner/texts:one:train", "body", ["row 0: no column 'body'; it has title, text", "--text-column"]),
            ("owner/texts:one:train:more", "text", ["NAME:CONFIG:SPLIT"]),
            ("not a name at all", "text", ["neither a file here nor a valid hub id"]),
        ],
    )
    def test_refusals(self, hub, tmp_path, spec, column, words):
        message = read_in_process(spec, tmp_path, hub.url, column)
        assert isinstance(message, str)
        assert "\n" not in message
        assert all(word in message for word in words), message

    def test_out_of_reach_the_last_commit_seen_is_taken(self, hub, tmp_path):
        """So that what was counted of it before is found again; nothing more can be read."""
        about, _ = read_in_process("owner/texts:two:train", tmp_path, hub.url)
        code = (
            "import sys; from jaxqkv.text.corpora import open_corpus; print(open_corpus(sys.argv[1]).about['revision'])"
        )
        environment = {"JAXQKV_CACHE": str(tmp_path / "cache"), "HF_ENDPOINT": "http://127.0.0.1:9"}
        done = subprocess.run(
            [sys.executable, "-c", code, "owner/texts:two:train"],
            capture_output=True,
            text=True,
            env=os.environ | environment,
            timeout=120,
        )
        assert done.stdout.strip() == about["revision"]
        assert "owner/texts: the hub cannot be reached; the last commit seen is" in done.stderr

    @pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}])
    def test_out_of_reach_one_line_says_the_ways_out(self, tmp_path, environment):
        message = read_in_process(corpus.DEFAULT, tmp_path, "http://127.0.0.1:9", **environment)
        assert message.startswith("wikimedia/wikipedia: ")
        assert "--corpus FILE or FOLDER" in message
        assert "python-docs" in message


def test_errors_are_of_the_package():
    assert issubclass(CorpusError, JaxqkvError)


def test_local_files_are_read_without_the_network(tmp_path):
    """Not even to count what is loaded; names would be looked up before a socket is made."""
    path = write(tmp_path / "a.txt", "text")
    code = (
        "import socket, sys\n"
        "def refuse(*arguments, **options): sys.exit(f'asked for {arguments}')\n"
        "socket.getaddrinfo = refuse\n"
        "from jaxqkv.text.corpora import open_corpus\n"
        "print(list(open_corpus(sys.argv[1])))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("['text']\n", 0), done.stderr
