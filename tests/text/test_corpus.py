"""Documents from files, from Python and from a stand-in for the hub."""

import json
import os
import re
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from helpers.hub import Hub

from jaxqkv.errors import CorpusError, JaxqkvError, JaxqkvWarning
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
                "line 3: no column 'text'; it has body, title; name the text column with --text",
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

    def test_null_is_no_text(self, tmp_path):
        path = write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": null}\n')
        assert refusal(path) == f"{path}, line 2: 'text' is null, not text"


def write_table(path, metadata=None, **columns):
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path)
    return path


class TestParquet:
    TEXTS = ("one", "two\r\n", "café 猫", "", "one")
    KINDS = (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int8(), pyarrow.string()),
             pyarrow.dictionary(pyarrow.int32(), pyarrow.large_string()))  # fmt: skip

    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_text_of_every_type(self, tmp_path, kind):
        numbers = pyarrow.array([7, None, 8, 9, 10])
        path = write_table(tmp_path / "a.parquet", id=numbers, text=pyarrow.array(self.TEXTS, kind), n=numbers)
        assert list(open_corpus(path)) == list(self.TEXTS)

    def test_features_that_datasets_does_not_know(self, tmp_path):
        """What another version of the library has written beside the table is not needed to read it."""
        for number, features in enumerate(({"text": {"_type": "Nonsense"}}, {"text": 3}, "[")):
            metadata = {"huggingface": json.dumps({"info": {"features": features}})}
            path = write_table(tmp_path / f"{number}.parquet", metadata, text=["one", "two"])
            assert list(open_corpus(path)) == ["one", "two"]

    def test_columns_beside_the_text_are_not_read(self, tmp_path):
        strange = pyarrow.array([[{"a": b"\xff"}], None], pyarrow.list_(pyarrow.struct({"a": pyarrow.binary()})))
        path = write_table(tmp_path / "a.parquet", strange=strange, text=["one", "two"])
        assert list(open_corpus(path)) == ["one", "two"]

    @pytest.mark.parametrize("last", [True, False])
    def test_empty_shards_are_left_out(self, tmp_path, last):
        write_table(tmp_path / "b.parquet", text=["one"])
        write_table(tmp_path / f"{'c' if last else 'a'}.parquet", text=pyarrow.array([], pyarrow.string()))
        write_table(tmp_path / f"{'d' if last else 'aa'}.parquet", other=pyarrow.array([], pyarrow.int8()))
        assert list(open_corpus(tmp_path)) == ["one"]

    def test_a_file_without_a_byte_is_left_out_and_named(self, tmp_path):
        write_table(tmp_path / "b.parquet", text=["one"])
        (tmp_path / "a.parquet").write_bytes(b"")
        with pytest.warns(JaxqkvWarning) as caught:
            assert list(open_corpus(tmp_path)) == ["one"]
        (warning,) = caught
        assert str(warning.message) == f"{tmp_path}/a.parquet: has 0 bytes, so it is left out; was it copied whole?"

    def test_a_folder_of_empty_files(self, tmp_path):
        write_table(tmp_path / "a.parquet", text=pyarrow.array([], pyarrow.string()))
        write(tmp_path / "b.jsonl", "\n\n")
        write(tmp_path / "c.txt", "\n")
        expected = f"{tmp_path}: no document in it: all of the 3 files are empty; give files with text in them"
        assert refusal(tmp_path) == expected

    @pytest.mark.parametrize(
        ("column", "kind"),
        [
            ([1, 2], "int64"),
            ([b"one", b"two"], "binary"),
            ([["one"], []], "list<.*: string>"),
            ([None, None], "null"),
        ],
    )
    def test_a_column_that_is_no_text(self, tmp_path, column, kind):
        path = write_table(tmp_path / "a.parquet", text=column)
        match = re.fullmatch(
            r"(.*): column 'text' is (.*), not text; name the text column with --text-column", refusal(path)
        )
        assert match[1] == str(path)
        assert re.fullmatch(kind, match[2])

    def test_a_column_that_is_not_there(self, tmp_path):
        path = write_table(tmp_path / "a.parquet", id=[1, 2], body=["one", "two"])
        assert refusal(path) == f"{path}: no column 'text'; it has id, body; name the text column with --text-column"
        assert list(open_corpus(path, text_column="body")) == ["one", "two"]

    def test_two_columns_of_one_name(self, tmp_path):
        table = pyarrow.Table.from_arrays([pyarrow.array(["one"]), pyarrow.array(["two"])], names=["text", "text"])
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        assert refusal(tmp_path) == f"{tmp_path}/a.parquet: has 2 columns 'text'; keep one"

    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_rows_without_text(self, tmp_path, kind):
        texts = ["one"] * 300 + [None, "two"]
        path = write_table(tmp_path / "a.parquet", text=pyarrow.array(texts, kind))
        assert refusal(path) == f"{path}, row 300: 'text' is null, not text"

    def test_bytes_that_are_no_text(self, tmp_path):
        data = pyarrow.array([b"one", b"\xff\xfe"]).view(pyarrow.string())
        path = write_table(tmp_path / "a.parquet", text=data)
        assert refusal(path) == f"{path}, row 1: 'text' is not UTF-8 text"

    @pytest.mark.parametrize("damage", [lambda all: b"no table", lambda all: all[:-9], lambda all: all[:4] + all[40:]])
    def test_a_file_that_is_no_table(self, tmp_path, damage):
        path = write_table(tmp_path / "a.parquet", text=["one", "two"])
        path.write_bytes(damage(path.read_bytes()))
        assert refusal(path).startswith(f"{path}: not a readable parquet file (")

    def test_damage_in_the_middle(self, tmp_path):
        path = tmp_path / "a.parquet"
        texts = pyarrow.table({"text": [f"{number} " * 100 for number in range(20_000)]})
        pyarrow.parquet.write_table(texts, path, row_group_size=1000)
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 2000] = bytes(2000)
        path.write_bytes(content)
        assert refusal(path).startswith(f"{path}: not a readable parquet file (")

    @pytest.mark.parametrize("groups", [1, 20])
    def test_rows_are_read_as_they_are_used(self, tmp_path, groups):
        """Of a file of 40 MB, also in one group of rows, never more than some batches are in memory."""
        path = tmp_path / "a.parquet"
        texts = [f"{number} ".rjust(2000, "x") for number in range(20_000)]
        options = {"row_group_size": 20_000 // groups, "compression": "none", "use_dictionary": False}
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, **options)
        assert path.stat().st_size > 40_000_000
        before = pyarrow.total_allocated_bytes()
        largest = 0
        for expected, text in zip(texts, open_corpus(path), strict=True):
            assert text == expected
            largest = max(largest, pyarrow.total_allocated_bytes() - before)
        assert largest < 10_000_000


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
        assert refusal([write(tmp_path / "a.txt", "one"), other]).startswith(f"{other}: only files and folders")

    def test_refusals(self, tmp_path):
        assert refusal("~nosuchuser/x.txt") == "~nosuchuser/x.txt: no such file or folder"
        (tmp_path / "empty").mkdir()
        assert refusal(tmp_path / "empty") == f"{tmp_path}/empty: has no .txt, .jsonl, .parquet file"
        assert refusal(tmp_path / "absent.txt") == f"{tmp_path}/absent.txt: no such file or folder"
        path = write(tmp_path / "a.md", "text")
        assert refusal(path) == f"{path}: only .txt, .jsonl, .parquet files are read"
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


# --- the hub: in processes of their own, since its library reads its settings when it is imported ---

READ = """
import json, sys
from itertools import islice
from jaxqkv.text.corpora import open_corpus
from jaxqkv.errors import JaxqkvError
answers = []
for spec, text_column, count in json.loads(sys.argv[1]):
    try:
        corpus = open_corpus(spec, text_column=text_column)
        answers.append([corpus.about, list(islice(corpus, count)) if count else []])
    except JaxqkvError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def read_in_process(specs, home, cache, endpoint, **environment):
    """What is found or said of each spec, text column and number of documents, and what is printed besides."""
    environment = os.environ | environment | {"HF_HOME": str(home), "JAXQKV_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(specs)],
        capture_output=True,
        text=True,
        env=environment | {"HF_ENDPOINT": endpoint},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    base = tmp_path_factory.mktemp("hub") / "repository"
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


SET = ("owner/texts:two:train", "text")
# Spec and text column → words of what is said.
REFUSED = {
    ("owner/nothing", "text"): ["neither a file here nor a data set on the hub", "--corpus"],
    ("owner/texts:three", "text"): ["three", "one", "two"],
    ("owner/texts:one:test", "text"): ["test", "train"],
    ("owner/texts:one:train", "body"): ["row 0: no column 'body'; it has title, text", "--text-column"],
    ("owner/texts:one:train:more", "text"): ["NAME:CONFIG:SPLIT"],
    ("not a name at all", "text"): ["neither a file here nor a valid hub id"],
}
NOWHERE = "http://127.0.0.1:9"


def assert_ways_out(message):
    assert message.startswith("wikimedia/wikipedia: ")
    assert "\n" not in message
    assert "--corpus FILE or FOLDER" in message
    assert "python-docs" in message


@pytest.fixture(scope="module")
def commits(tmp_path_factory):
    """The package's cache folder: of one process, and of a later one that does not reach the hub."""
    return tmp_path_factory.mktemp("commits")


@pytest.fixture(scope="module")
def answers(hub, commits, tmp_path_factory):
    """What one process reads of the hub."""
    specs = [(*each, 3) for each in (SET, *REFUSED)]
    found, _ = read_in_process(specs, tmp_path_factory.mktemp("home"), commits, hub.url)
    return dict(zip((SET, *REFUSED), found, strict=True))


@pytest.mark.slow
class TestHub:
    def test_a_data_set_is_streamed_at_its_commit(self, answers):
        about, texts = answers[SET]
        assert texts == ["two 0", "two 1", "two 2"]
        assert about["config"] == "two"
        assert about["split"] == "train"
        assert len(about["revision"]) == 40

    @pytest.mark.parametrize("refused", REFUSED, ids=" ".join)
    def test_refusals(self, answers, refused):
        message = answers[refused]
        assert isinstance(message, str)
        assert "\n" not in message
        assert all(word in message for word in REFUSED[refused]), message

    def test_out_of_reach_the_last_commit_seen_is_taken(self, answers, commits, tmp_path):
        """So that what was counted of it before is found again; nothing more can be read.

        Of a data set that was never seen, one line says the ways out.
        """
        specs = [(*SET, 0), (corpus.DEFAULT, "text", 3)]
        ((about, _), message), said = read_in_process(specs, tmp_path, commits, NOWHERE)
        assert about["revision"] == answers[SET][0]["revision"]
        assert "owner/texts: the hub cannot be reached; the last commit seen is" in said
        assert_ways_out(message)

    def test_offline_one_line_says_the_ways_out(self, tmp_path):
        specs = [(corpus.DEFAULT, "text", 3)]
        (message,), _ = read_in_process(specs, tmp_path, tmp_path / "cache", NOWHERE, HF_HUB_OFFLINE="1")
        assert_ways_out(message)


def test_errors_are_of_the_package():
    assert issubclass(CorpusError, JaxqkvError)


@pytest.mark.slow
def test_local_files_are_read_without_the_network_and_without_the_hub_s_cache(tmp_path):
    """Not even what is loaded is counted: names would be looked up before a socket is made.

    As on a cluster whose home is read-only, the cache cannot be made.
    """
    path = write(tmp_path / "a.txt", TestText.TEXT)
    (tmp_path / "file").write_text("in the way")
    code = (
        "import socket, sys\n"
        "def refuse(*arguments, **options): sys.exit(f'asked for {arguments}')\n"
        "socket.getaddrinfo = refuse\n"
        "from jaxqkv.text.corpora import open_corpus\n"
        "sys.exit(list(open_corpus(sys.argv[1])) != [sys.argv[2]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), TestText.TEXT],
        env=os.environ | {"HF_HOME": str(tmp_path / "file" / "cache")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
