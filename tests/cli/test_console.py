"""What the command says: to people, to nobody, to programs; and the bars over long work."""

import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import GPT2, changed, write_folder, write_word_tokenizer
from helpers.checkpoints import WORDS
from helpers.spoilt import Terminal, bars_of_a_terminal

from jaxqkv.cli.main import main
from jaxqkv.model import comparison
from jaxqkv.runtime import console
from jaxqkv.studies.registry import names, study

CONFIG = changed(GPT2, initializer_range=0.2, n_layer=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = write_word_tokenizer(write_folder(tmp_path_factory.mktemp("model") / "tiny", CONFIG), WORDS)
    # So that transformers, too, takes tokenizer.json as it is.
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return str(path)


@pytest.fixture
def lines(folder, tmp_path):
    """Commands of two studies on a tiny checkpoint."""
    (tmp_path / "corpus.txt").write_text("the cat saw her " * 30 + "\n\n" + "run home " * 30)
    corpus = ["--corpus", str(tmp_path / "corpus.txt"), "--documents", "paragraphs", "--tokens", "150"]
    extra = {
        "attention-scores": ["--text", "a cat saw her run home"],
        "token-frequency": [*corpus, "--batch", "2", "--length", "17"],
    }
    common = ["--arrays-only", "--out", str(tmp_path / "out"), "--model", folder]
    return {name: ["figures", name, *common, *options] for name, options in extra.items()}


STUDIES = Path(__file__).parents[1] / "studies"


@pytest.mark.parametrize("name", names())
def test_every_study_has_a_whole_run_checked_where_its_numbers_are(name):
    """Its document, its warnings and its bars: there the same programs run it."""
    call = re.compile(rf'check_spoilt_run\(\s*tmp_path,\s*"{name}"')
    assert any(call.search(path.read_text()) for path in STUDIES.glob("test_*.py"))


# --- what differs by option ---


class TestQuiet:
    def test_figures(self, lines, tmp_path, capfd):
        for _ in range(2):  # there are counts to take up again
            assert main([*lines["token-frequency"], "1", "2", "--quiet"]) == 0
        assert capfd.readouterr() == ("", "")
        assert (tmp_path / "out" / "index.html").exists()

    def test_other_commands(self, folder, capfd):
        for line in (["list"], ["info", folder]):
            assert main([*line, "--quiet"]) == 0
        assert capfd.readouterr() == ("", "")

    def test_errors_and_warnings_are_said(self, lines, tmp_path, capfd):
        assert main(["info", str(tmp_path / "nowhere"), "--quiet"]) == 2
        assert capfd.readouterr().err == f"jaxqkv: error: {tmp_path}/nowhere: no such folder\n"
        short = lines["attention-scores"]
        short[short.index("--text") + 1] = "a cat"
        assert main([*short, "--quiet"]) == 0
        out, err = capfd.readouterr()
        assert out == ""
        assert [line.split(":")[1] for line in err.splitlines()] == [f" {id} is not drawn" for id in ("4", "5a", "5b")]

    def test_without_it_the_same_is_said(self, lines, capfd):
        assert main([*lines["token-frequency"], "1"]) == 0
        out, err = capfd.readouterr()
        assert out.startswith("token-frequency: ")
        assert "1 figure in " in out
        assert err == ""
        main([*lines["token-frequency"], "1"])
        err = capfd.readouterr().err
        assert err.startswith("jaxqkv: 182 tokens of ")
        assert err.endswith("corpus.txt were counted before; --no-cache reads them anew\n")

    def test_bars_of_other_libraries(self):
        names = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
        before = {name: os.environ.get(name) for name in names}
        with console.quiet():
            assert [os.environ[name] for name in names] == ["1", "1"]
            with console.quiet(False):
                assert console.is_quiet()
        assert {name: os.environ.get(name) for name in names} == before
        assert not console.is_quiet()
        with console.quiet(False):
            assert {name: os.environ.get(name) for name in names} == before


class TestJson:
    def document(self, line, capfd):
        assert main([*line, "--json"]) == 0
        out, err = capfd.readouterr()
        assert err == ""
        return json.loads(out)

    def test_figures_of_this_run_alone_and_what_is_not_drawn(self, lines, tmp_path, capfd):
        study_name, *options = lines["attention-scores"][1:]
        self.document(["figures", study_name, "1", *options], capfd)
        options[options.index("--text") + 1] = "a cat"
        drawn = [word for word in options if word != "--arrays-only"]
        document = self.document(["figures", study_name, "3", *drawn, "--dpi", "20", "--format", "svg"], capfd)
        assert list(document["figures"]) == ["3"]
        kinds = [path.rpartition(".")[2] for path in document["figures"]["3"]["files"]]
        assert kinds == ["npz", "png", "svg"]
        assert main(["figures", study_name, *options, "--json"]) == 0
        out, err = capfd.readouterr()
        document = json.loads(out)
        assert set(document["not drawn"]) == {"4", "5a", "5b"}
        assert document["not drawn"]["4"] == "figure 4 needs a text of 3 tokens or more, not 2"
        reasons = document["not drawn"].items()
        assert err.splitlines() == [f"jaxqkv: {id} is not drawn: {reason}" for id, reason in reasons]
        assert set(document["figures"]) == set(study("attention-scores").figures) - {"4", "5a", "5b"}

    def test_list(self, capfd):
        found = {each["study"]: each["figures"] for each in self.document(["list"], capfd)}
        assert list(found) == names()
        for name, figures in found.items():
            for listed, figure in zip(figures, study(name).figures.values(), strict=True):
                assert (listed["id"], listed["title"]) == (figure.id, figure.title)
                assert [each["name"] for each in listed["arrays"]] == [each.name for each in figure.arrays.declared]

    def test_view(self, folder, tmp_path, capfd):
        path = tmp_path / "attention.html"
        document = self.document(["view", folder, "--text", "a cat saw her", "--out", str(path)], capfd)
        assert document.pop("checkpoint")["checkpoint"] == folder
        assert document.pop("drawn").startswith("tiny: ")
        assert document == {"page": str(path), "bytes": path.stat().st_size}

    def test_info(self, tmp_path, capfd):
        folder = str(write_word_tokenizer(write_folder(tmp_path / "tiny", changed(CONFIG, n_layer=3)), WORDS))
        about = self.document(["info", folder], capfd)
        assert about["checkpoint"] == folder
        assert about["source"] == "folder"
        assert set(about["files"]) == {"model.safetensors"}
        config = {"model_type": "gpt2", "n_layer": 3, "head_dim": 7, "vocab_size": 43}
        assert config.items() <= about["config"].items()
        attention, mlp, norms = 3 * 4 * (35 * 35 + 35), 3 * (2 * 35 * 29 + 35 + 29), (2 * 3 + 1) * 70
        total = (43 + 17) * 35 + attention + mlp + norms
        assert about["parameters"] == {
            "Token Embedding": 43 * 35,
            "Positional Embedding": 17 * 35,
            "Token Type Embedding": 0,
            "Attention": attention,
            "Feed Forward": mlp,
            "Layer Norm": norms,
            "Output Embedding": 0,
            "all": total,
        }
        assert about["stored as"] == ["F32"]
        assert about["bytes"] == {"float32": 4 * total}
        assert about["tokenizer"] == ["tokenizer.json"]

    def test_verify(self, folder, tmp_path, capfd, monkeypatch):
        pytest.importorskip("transformers", exc_type=ImportError)
        same = comparison.Comparison("q", *np.zeros((4, 3)))
        monkeypatch.setattr(comparison, "compare", lambda *arguments: [same])
        path = tmp_path / "verify.json"
        document = self.document(["verify", folder, "--text", "a cat saw her", "--out", str(path)], capfd)
        assert document.pop("report") == str(path)
        assert document == json.loads(path.read_text())
        assert document["passed"] is True

    def test_an_error_is_one_line_on_stderr(self, capfd):
        assert main(["figures", "qkv-weights", "7x", "--json"]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("jaxqkv: error: qkv-weights has no figure 7x")
        assert err.count("\n") == 1

    def test_quiet_and_json_exclude_each_other(self, capfd):
        assert main(["list", "--quiet", "--json"]) == 2
        assert capfd.readouterr().err == "jaxqkv: error: --quiet and --json exclude each other\n"

    def test_what_is_not_finite_is_null(self):
        tree = {"a": [1.5, float("nan")], "b": (float("inf"), {"c": -float("inf")}), "d": None, "e": True, "f": "nan"}
        expected = {"a": [1.5, None], "b": [None, {"c": None}], "d": None, "e": True, "f": "nan"}
        assert json.loads(console.as_json(tree), parse_constant=pytest.fail) == expected


class TestBars:
    def test_on_terminals_alone_after_a_second_with_the_time_left(self):
        terminal = Terminal()
        bar = console.bar(total=4, file=terminal)
        assert not bar.disable
        assert bar.delay == 1
        bar.start_t -= 6  # as if it had begun six seconds ago
        bar.last_print_t -= 6
        bar.update(3)
        assert "3/4 [00:06<00:02" in terminal.getvalue()  # two seconds left
        bar.close()
        assert console.bar(total=4, file=io.StringIO()).disable
        with console.quiet():
            assert console.bar(total=4, file=Terminal()).disable

    def test_short_work_shows_none(self):
        terminal = Terminal()
        assert list(console.bar(range(3), file=terminal)) == [0, 1, 2]
        assert terminal.getvalue() == ""

    def test_a_batch_alone_is_counted_in_sequences(self, lines):
        with bars_of_a_terminal() as bars:
            assert main([*lines["token-frequency"], "2", "--no-cache"]) == 0
        assert ("sequences", 2, 2) in [(bar.desc, bar.total, bar.n) for bar in bars]
