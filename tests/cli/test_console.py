"""What the command says: to people, to nobody, to programs; and the bars over long work."""

import contextlib
import io
import json
import os
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import GPT2, arrays_of, changed, random_tensors, write_folder, write_word_tokenizer
from helpers.broken import SPOILT, spoil
from helpers.checkpoints import WORDS
from tqdm import tqdm

from jaxqkv.cli.main import main
from jaxqkv.model import comparison
from jaxqkv.runtime import console
from jaxqkv.studies.registry import names, study

CONFIG = changed(GPT2, initializer_range=0.2)
SENTENCES = ("a cat saw her run", "the cat saw her", "run her home")
# The checkpoint predicts some of its words, and not all.
PREDICTED = " cat cat saw her home home cat cat home saw home saw home her cat home cat her"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = write_word_tokenizer(write_folder(tmp_path_factory.mktemp("model") / "tiny", CONFIG), WORDS)
    # So that transformers, too, takes tokenizer.json as it is.
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return str(path)


@pytest.fixture
def lines(folder, tmp_path):
    """A command of each study on a tiny checkpoint."""
    return commands(folder, tmp_path)


def commands(folder, tmp_path):
    (tmp_path / "corpus.txt").write_text("the cat saw her " * 30 + "\n\n" + "run home " * 30)
    (tmp_path / "sentences.txt").write_text("\n".join(SENTENCES))
    (tmp_path / "words.txt").write_text("a cat\na saw\na her\nb run\nb home\n")
    (tmp_path / "predicted.txt").write_text(PREDICTED * 2)
    corpus = ["--corpus", str(tmp_path / "corpus.txt"), "--documents", "paragraphs", "--tokens", "150"]
    pair = ["--clean", "a cat saw her", "--donor", "a her cat her", "--answers", " her", " cat"]
    extra = {
        "attention-scores": ["--text", "a cat saw her run home"],
        "token-frequency": [*corpus, "--batch", "2", "--length", "17"],
        "weight-tour": ["--compare", f"random:{folder}"],
        "token-similarity": ["--sentences", str(tmp_path / "sentences.txt")],
        "qkv-activations": ["--text-file", str(tmp_path / "predicted.txt"), "--target", " her", "--permutations", "19"],
        "adjustment-magnitudes": ["--corpus", str(tmp_path / "sentences.txt"), "--documents", "paragraphs"],
        "prediction-divergence": ["--text-file", str(tmp_path / "predicted.txt"), "--permutations", "19"],
        "category-selectivity": ["--words", str(tmp_path / "words.txt"), "--permutations", "19"],
        "head-silencing": ["--text", "a cat saw her", "--fact", "a cat", "--answer", " saw", "--against", " her"],
        "head-patching": pair,
        "heads": [*pair, "--text", "a cat saw her", "--null", "1"],
    }
    common = ["--arrays-only", "--out", str(tmp_path / "out"), "--model", folder]
    return {name: ["figures", name, *common, *extra.get(name, [])] for name in names()}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@contextlib.contextmanager
def bars_of_a_terminal():
    """The bars that are made in the block, as on a terminal."""
    made = []

    def bar(items=None, **options):
        made.append(tqdm(items, delay=1, file=Terminal(), **options))
        return made[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(console, "bar", bar)
        yield made


# --- every study, once: with --json, with weights that are NaN or infinite, and as on a terminal ---


class Ran(NamedTuple):
    """A run of a study: what it printed, where, and its bars."""

    name: str
    out: Any
    document: dict
    warnings: list
    bars: list


@pytest.fixture(scope="module", params=names())
def ran(request, tmp_path_factory):
    base = tmp_path_factory.mktemp("ran")
    spoilt = random_tensors(CONFIG)
    spoil(spoilt)
    write_word_tokenizer(write_folder(base / "model", CONFIG, spoilt), WORDS)
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patched, bars_of_a_terminal() as bars:
        patched.chdir(base)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert main([*commands("./model", base)[request.param], "--json"]) == 0
    return Ran(request.param, base / "out", json.loads(out.getvalue()), err.getvalue().splitlines(), bars)


# Figures that there are not of such weights.
NOT_DRAWN = {
    "qkv-weights": {"2b", "4b", "5a"},
    "attention-scores": {"4"},
    "token-frequency": set(),
    "weight-tour": {"head-clusters"},
    "token-similarity": {"cosine", "correlation"},
    "qkv-activations": set(),
    "adjustment-magnitudes": {"2"},
    "prediction-divergence": {"2b", "3", "4", "5", "6"},
    "category-selectivity": {"5"},
    "head-silencing": {"3"},
    "head-patching": set(),
    "heads": set(),
}


def test_weights_that_are_not_finite_are_computed_and_named(ran):
    warning, *others = ran.warnings
    assert warning == f"jaxqkv: warning: {SPOILT}"
    assert all("are NaN or infinite" in line for line in others)
    assert {line.split()[1] for line in others} == NOT_DRAWN[ran.name]
    figures = json.loads((ran.out / ran.name / "manifest.json").read_text())["figures"]
    assert NOT_DRAWN[ran.name] == set(study(ran.name).figures) - set(figures)


def test_the_document_is_the_manifest_with_the_files(ran):
    folder, document = ran.out / ran.name, dict(ran.document)
    manifest = json.loads((folder / "manifest.json").read_text())
    figures, reasons = document.pop("figures"), document.pop("not drawn")
    until_the_last, seconds = manifest.pop("seconds"), document.pop("seconds")
    assert until_the_last.keys() == seconds.keys()
    assert all(seconds[name] >= until_the_last[name] for name in seconds)
    assert document.pop("manifest") == str(folder / "manifest.json")
    assert document.pop("page") == str(ran.out / "index.html")
    assert document == {key: value for key, value in manifest.items() if key != "figures"}
    assert [f"jaxqkv: {id} is not drawn: {reason}" for id, reason in reasons.items()] == ran.warnings[1:]
    assert list(figures) == [id for id in study(ran.name).figures if id not in NOT_DRAWN[ran.name]]
    for id, figure in figures.items():
        assert figure == {
            "title": study(ran.name).figures[id].title,
            "caption": manifest["figures"][id]["caption"],
            "files": [str(folder / f"{id}.npz")],
            "command": manifest["figures"][id]["command"],
            "arrays": manifest["figures"][id]["arrays"],
        }
        arrays = arrays_of(folder / f"{id}.npz")
        assert len(arrays) > 0
        assert {name: values.ndim for name, values in arrays.items()} == {
            name: len(axes) for name, axes in figure["arrays"].items()
        }


# Description of a bar → its total, or the totals of several.
BARS = {
    "qkv-weights": {"layers": 3},
    "attention-scores": {"layers": 3},
    "weight-tour": {"layers": 2 * 3},  # with what it is compared with
    "token-similarity": {"layers": 3},
    "qkv-activations": {"layers": 3},
    "adjustment-magnitudes": {"layers": 3},
    "prediction-divergence": {"layers": 3},
    "category-selectivity": {"layers": 3},
    # A layer's heads go on with those before them, 1 + 2 + 3; figure 4c's are of layer 1 alone; and the gradient goes
    # through the layers twice.
    "head-silencing": {"branches": [2, 2 * 3, 1 + 2 + 3]},
    "head-patching": {"branches": [1 + 2 + 3] * 3},
    "token-frequency": {"tokens": 150, "sequences": 2},
    # The lens has no description; six are the pairs of layers; copying scores are also of fresh weights.
    "heads": {"": 3, "layers": 3, "spectra": 3, "copying": [3, 3], "fresh checkpoints": [1, 1]}
    | dict.fromkeys(("similarity", "composition", "divergence"), 6),
}


def test_every_long_loop_has_a_total_and_gets_there(ran):
    totals = {
        desc: sorted(bar.total for bar in ran.bars if bar.desc == desc) for desc in {bar.desc for bar in ran.bars}
    }
    expected = BARS[ran.name] | {"figures": len(study(ran.name).figures)}
    assert totals == {desc: each if isinstance(each, list) else [each] for desc, each in expected.items()}
    for bar in ran.bars:
        reached = bar.n if bar.desc != "tokens" else min(bar.n, bar.total)  # whole documents are counted
        assert reached == bar.total, bar.desc


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

    def test_info(self, folder, capfd):
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
        assert about["tokenizer"] == ["tokenizer.json", "tokenizer_config.json"]

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
