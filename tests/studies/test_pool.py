"""Batches in parts: pooled statistics against NumPy on everything, saved states, and memory that does not grow."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import BERT, MODEL_LIMIT, changed, figures_of, write_folder, write_word_tokenizer

import jaxqkv
from jaxqkv.cli.main import main
from jaxqkv.errors import JaxqkvError, NotDrawable
from jaxqkv.pages import gallery
from jaxqkv.studies.study import FigureSpec
from jaxqkv.studies.token_frequency import STUDY, TokenFrequencyOptions
from jaxqkv.studies.token_frequency import run as study_run
from jaxqkv.studies.token_frequency.pool import ENDS, Pool
from jaxqkv.text.counting import Place, TokenCounts

LAYERS, BINS, LENGTH, BATCH = 3, 5, 7, 11
WORDS = ["[UNK]", *(f" w{n}" for n in range(36))]
CONFIG = changed(BERT, initializer_range=0.2)


def chunks():
    """Eleven sequences in parts of four, with tokens that have no frequency and bins that are empty."""
    generator = np.random.default_rng(0)
    x = generator.normal(-8, 2, (BATCH, LENGTH))
    x[generator.random(x.shape) < 0.2] = np.nan
    y = generator.normal(1, 0.3, (LAYERS, BATCH, LENGTH)).astype(np.float32)
    mean, std = generator.normal(size=(2, LAYERS, BATCH, BINS)).astype(np.float32)
    mean[:, generator.random((BATCH, BINS)) < 0.3] = np.nan
    mean[:, :, 3] = np.nan
    std[np.isnan(mean)] = np.nan
    centres = generator.normal(size=(BATCH, BINS))
    return {"x": x, "y": y, "centres": centres, "mean": mean, "std": std}


def pooled(whole, parts=(slice(0, 4), slice(4, 8), slice(8, 11))):
    pool = Pool(LAYERS, BINS, LENGTH, {"x": ((LENGTH,), np.float64)})
    for part in parts:
        numbers = np.arange(BATCH)[part]
        pool.add_moments(whole["x"][part], whole["y"][:, part])
        pool.add_bins(*(whole[name][..., part, :] for name in ("centres", "mean", "std")))
        ids = numbers[:, None] * 100 + np.arange(LENGTH)
        pool.add(numbers, Place(3, 2), ids, BATCH, {"x": whole["x"][part]})
    return pool


def test_sums_over_parts_are_those_of_everything():
    whole = chunks()
    pool = pooled(whole).joined()
    known = ~np.isnan(whole["x"])
    expected = [np.corrcoef(whole["x"][known], layer[known])[0, 1] for layer in whole["y"]]
    np.testing.assert_allclose(pool.correlations(), expected, rtol=1e-10)
    for place, name in enumerate(("centres", "mean", "std")):
        values = np.broadcast_to(whole[name], whole["mean"].shape).astype(np.float64)
        values = np.where(np.isnan(whole["mean"]), np.nan, values)
        expected = np.array(
            [[np.mean(v[~np.isnan(v)]) if not np.isnan(v).all() else np.nan for v in layer.T] for layer in values]
        )
        assert np.isnan(expected[:, 3]).all()
        np.testing.assert_allclose(pool.binned()[place], expected, rtol=1e-12)
    np.testing.assert_array_equal(pool["x"], whole["x"])
    np.testing.assert_array_equal(pool.sums[ENDS], [np.arange(LENGTH), 1000 + np.arange(LENGTH)])


@pytest.mark.parametrize("name", ["x", "y"])
def test_what_is_constant_has_no_correlation(name):
    """Also where float32 rounds it by a last place, and not where parts alone are constant."""
    whole = chunks()
    known = ~np.isnan(whole["x"])
    if name == "x":
        whole["x"][known] = -7.3
        expected = [True] * LAYERS
    else:
        whole["y"][1] = np.float32(0.7)
        whole["y"][1, 3] = np.nextafter(np.float32(0.7), np.float32(1))
        whole["y"][2, :4], whole["y"][2, 4:] = 0.5, 0.6
        expected = [False, True, False]
    assert np.isnan(pooled(whole).correlations()).tolist() == expected


def test_nothing_known_has_no_correlation():
    whole = chunks()
    whole["x"][:] = np.nan
    assert np.isnan(pooled(whole).correlations()).all()


KEY = {"tokens": 30, "corpus": "a", "batch": [2, 3]}
COUNTS = TokenCounts(np.array([3, 0, 1]), documents=2, whole=True)


class TestState:
    def saved(self, tmp_path, counts=COUNTS):
        pool = pooled(chunks())
        pool.save(tmp_path / "state.npz", KEY, counts)
        return pool, Pool(LAYERS, BINS, LENGTH, {"x": ((LENGTH,), np.float64)})

    def test_what_was_saved_comes_back(self, tmp_path):
        pool, again = self.saved(tmp_path)
        counts = again.restore(tmp_path / "state.npz", KEY)
        np.testing.assert_array_equal(counts.counts, COUNTS.counts)
        assert (counts.documents, counts.whole) == (2, True)
        assert again.place == Place(3, 2)
        for name, values in pool.sums.items():
            np.testing.assert_array_equal(again.sums[name], values)
            assert again.sums[name].dtype == values.dtype
        np.testing.assert_array_equal(again.lowest, pool.lowest)
        np.testing.assert_array_equal(again.numbers, np.arange(BATCH))
        np.testing.assert_array_equal(again["x"], pool["x"])

    def test_without_counts(self, tmp_path):
        _, again = self.saved(tmp_path, None)
        assert again.restore(tmp_path / "state.npz", KEY) is None

    def test_of_another_run(self, tmp_path):
        _, again = self.saved(tmp_path)
        with pytest.raises(JaxqkvError, match=r"of another run \(another tokens, batch\); leave --resume out"):
            again.restore(tmp_path / "state.npz", KEY | {"tokens": 31, "batch": [2, 4]})

    @pytest.mark.parametrize("size", [0, 50, 0.5, -7])
    def test_a_broken_file(self, tmp_path, size):
        _, again = self.saved(tmp_path)
        path = tmp_path / "state.npz"
        content = path.read_bytes()
        path.write_bytes(content[: int(size * len(content)) if isinstance(size, float) else size])
        with pytest.raises(JaxqkvError, match="not a saved state"):
            again.restore(path, KEY)


# --- the study ---

# Eight sequences, in parts of two.
BATCH_OPTIONS, PARTS = ["--batch", "8"], 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_word_tokenizer(write_folder(tmp_path_factory.mktemp("model") / "tiny", CONFIG), WORDS)


def write_texts(path, sizes):
    """Documents of so many words, of which the first are frequent."""
    generator = np.random.default_rng(3)
    with path.open("w") as file:
        for size in sizes:
            words = [f" w{int(36 * u**2)}" for u in generator.random(size)]
            file.write(json.dumps({"text": "".join(words)}) + "\n")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    sizes = np.random.default_rng(5).integers(17, 41, 23)
    path = write_texts(tmp_path_factory.mktemp("corpus") / "texts.jsonl", sizes)
    return ["--corpus", str(path), "--length", "17", "--tokens", "150", "--no-cache", *BATCH_OPTIONS]


@contextlib.contextmanager
def running_in_parts():
    """Two sequences together, and the state saved after each two."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(study_run, "TOGETHER", 2)
        patched.setattr(study_run, "SAVE_EVERY", -1)
        yield


@pytest.fixture
def in_parts():
    with running_in_parts():
        yield


def state_of(tmp_path):
    return tmp_path / "out" / "token-frequency" / ".state.npz"


def interrupted_at(monkeypatch, number):
    """The model's runs, counted; that one is interrupted."""
    runs = []
    run = jaxqkv.Model.run

    def counted(*arguments, **options):
        runs.append(1)
        if len(runs) == number:
            raise KeyboardInterrupt
        return run(*arguments, **options)

    monkeypatch.setattr(jaxqkv.Model, "run", counted)
    return runs


def line_of(folder, tmp_path):
    return ["figures", "token-frequency", "--model", str(folder), "--arrays-only", "--out", str(tmp_path / "out")]


def interrupt(number, line):
    """A run of the command that is interrupted at the model's run of that number."""
    with pytest.MonkeyPatch.context() as patched:
        interrupted_at(patched, number)
        assert main(line) == 130


@pytest.fixture(scope="module")
def whole(folder, corpus, tmp_path_factory):
    """Every figure of a run in parts that nothing interrupts."""
    base = tmp_path_factory.mktemp("whole")
    with running_in_parts():
        figures = figures_of("token-frequency", base, folder, *corpus)
    assert not state_of(base).exists()
    return figures


@pytest.fixture(scope="module")
def stopped(folder, corpus, tmp_path_factory):
    """The folder of a run that was interrupted after two parts."""
    base = tmp_path_factory.mktemp("stopped")
    with running_in_parts():
        interrupt(3, [*line_of(folder, base), *corpus])
    return base / "out"


@pytest.fixture
def state(stopped, tmp_path):
    """The saved state of that run in a folder of the test's own."""
    shutil.copytree(stopped, tmp_path / "out")
    return state_of(tmp_path)


def same(one, other, exactly):
    assert set(one) == set(other)
    assert len(one) == 10
    for id, arrays in one.items():
        for name, values in arrays.items():
            if exactly or values.dtype.kind in "iu":
                np.testing.assert_array_equal(other[id][name], values, err_msg=f"{id} {name}")
            else:
                limit = (5 * MODEL_LIMIT if name.startswith("r") else MODEL_LIMIT) * np.nanmax(np.abs(values))
                np.testing.assert_allclose(other[id][name], values, rtol=0, atol=limit, err_msg=f"{id} {name}")


def test_parts_change_no_number(folder, corpus, whole, tmp_path):
    same(figures_of("token-frequency", tmp_path, folder, *corpus), whole, exactly=False)


@pytest.mark.parametrize("stops", [[1], [2, 3]])
def test_an_interrupted_run_goes_on_with_the_same_numbers(
    stops, folder, corpus, whole, tmp_path, monkeypatch, in_parts, capsys
):
    """Interrupted before its first part; or after it, and again before the last."""
    line, done = [*line_of(folder, tmp_path), *corpus], 0
    for stop in stops:
        interrupt(stop, [*line, "--resume"] if done else line)
        done += stop - 1
        assert state_of(tmp_path).exists() == (done > 0)
        said = "no figure of token-frequency was finished"
        said += f"; --resume goes on from {state_of(tmp_path)}" if done else ", and "
        assert said in capsys.readouterr().err
        assert [path.name for path in tmp_path.glob("out/token-frequency/*")] == [".state.npz"] * (done > 0)
    runs = interrupted_at(monkeypatch, None)
    same(whole, figures_of("token-frequency", tmp_path, folder, *corpus, "--resume"), exactly=True)
    assert len(runs) == PARTS - done
    assert not state_of(tmp_path).exists()
    manifest = json.loads((tmp_path / "out" / "token-frequency" / "manifest.json").read_text())
    said = f"{2 * done} sequences were run before" if done else "there is no saved state"
    assert any(said in note for note in manifest["notes"])


def test_a_tested_run_goes_on_with_the_same_p(folder, corpus, tmp_path, monkeypatch, in_parts):
    """The sums over pairs of tokens are in the state too, and all parts, of which the last has one, are permuted."""
    tested = [*corpus, "--batch", "7", "--significance", "--permutations", "31"]
    plain = figures_of("token-frequency", tmp_path / "plain", folder, "6", *tested)["6"]
    line = line_of(folder, tmp_path)
    interrupt(PARTS, [*line[:2], "6", *line[2:], *tested])
    runs = interrupted_at(monkeypatch, None)
    again = figures_of("token-frequency", tmp_path, folder, "6", *tested, "--resume")["6"]
    assert len(runs) == 1
    assert {"p_mean", "p_std", "q_value_mean", "q_value_std"} < set(plain)
    for name, values in plain.items():
        np.testing.assert_array_equal(again[name], values, err_msg=name)
    # Run one by one, the device adds in another order.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(study_run, "TOGETHER", 1)
        apart = figures_of("token-frequency", tmp_path / "apart", folder, "6", *tested)["6"]
    for name in ("p_mean", "p_std"):
        np.testing.assert_allclose(apart[name], plain[name], rtol=1e-6)


def test_a_state_of_other_figures_is_refused_and_kept(folder, corpus, state, tmp_path, in_parts, capsys):
    line = line_of(folder, tmp_path)
    before = state.read_bytes()
    changed = ["151" if word == "150" else word for word in corpus]
    for ids, options in (["6"], corpus), ([], [*corpus, "--layer", "2"]), ([], changed):
        assert main([*line[:2], *ids, *line[2:], *options, "--resume"]) == 2
        assert "is of another run" in capsys.readouterr().err
        assert state.read_bytes() == before


def test_a_state_is_left_to_the_run_that_it_is_of(folder, corpus, state, tmp_path, monkeypatch, in_parts, capsys):
    """Another one may draw into the same folder meanwhile."""
    line = line_of(folder, tmp_path)
    before = state.read_bytes()
    assert main([*line[:2], "1", *line[2:], *corpus]) == 0
    assert capsys.readouterr().err == ""
    assert state.read_bytes() == before
    runs = interrupted_at(monkeypatch, None)
    assert main([*line, *corpus, "--resume"]) == 0
    assert len(runs) == PARTS - 2
    assert not state.exists()


def test_a_run_that_is_interrupted_while_it_draws_goes_on_too(folder, corpus, tmp_path, monkeypatch, in_parts, capsys):
    line = line_of(folder, tmp_path)
    save = gallery.save_figure

    def interrupted(display, spec, *arguments):
        if spec.id == "4a":
            raise KeyboardInterrupt
        save(display, spec, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(gallery, "save_figure", interrupted)
        assert main([*line, *corpus]) == 130
    folder_of = state_of(tmp_path).parent
    assert capsys.readouterr().err == (
        f"jaxqkv: interrupted; 2 of 10 figures finished in {folder_of}: 1, 2; "
        f"--resume goes on from {state_of(tmp_path)}\n"
    )
    runs = interrupted_at(monkeypatch, None)
    assert main([*line, *corpus, "--resume"]) == 0
    assert runs == []


def test_a_run_that_begins_anew_says_so(folder, corpus, whole, state, tmp_path, monkeypatch, in_parts, capsys):
    runs = interrupted_at(monkeypatch, None)
    same(whole, figures_of("token-frequency", tmp_path, folder, *corpus), exactly=True)
    assert f"{state} is of an interrupted run; --resume would go on" in capsys.readouterr().err
    assert len(runs) == PARTS


def test_resume_is_for_this_study(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["figures", "weight-tour", "--demo", "--resume", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "unrecognized arguments: --resume" in capsys.readouterr().err


def test_a_state_stays_when_no_figure_can_be_drawn(folder, corpus, tmp_path, monkeypatch, in_parts, capsys):
    def undrawable(*arguments):
        raise NotDrawable("no paper")

    monkeypatch.setattr(FigureSpec, "display", undrawable)
    assert main([*line_of(folder, tmp_path), *corpus]) == 2
    assert "no figure of token-frequency can be drawn with this checkpoint" in capsys.readouterr().err
    assert state_of(tmp_path).exists()


def test_the_first_process_alone_removes_the_states_of_all(folder, corpus, tmp_path, monkeypatch, in_parts):
    """The others end before it has drawn."""
    sizes = {"length": 17, "tokens": 150, "batch": 8}
    options = TokenFrequencyOptions(model=(str(folder),), corpus=(corpus[1],), no_cache=True, **sizes)
    for process, left in ((1, True), (0, False)):
        with monkeypatch.context() as patched, STUDY.start(options, tmp_path) as run:
            run.compute({"ends"})
            (tmp_path / ".state-1-of-2.npz").write_bytes((tmp_path / ".state.npz").read_bytes())
            patched.setattr(study_run.distributed, "index", lambda process=process: process)
        assert [path.exists() for path in (tmp_path / ".state.npz", tmp_path / ".state-1-of-2.npz")] == [left] * 2


GROWTH = """
import gc, json, sys, tracemalloc
import jax
from jaxqkv.text import counting
from jaxqkv.cli.main import main
from jaxqkv.pages import gallery
from jaxqkv.studies.token_frequency import run

def anonymous():
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon:"))

run.TOGETHER, counting.CHARACTERS = 8, 1 << 14
held, sizes = [], []
pool = run.TokenFrequencyRun._pool

def pooled(self, chunk, reduced):
    if not held:  # what came before, modules and programs above all, is not looked through each time
        gc.collect()
        gc.freeze()
        tracemalloc.start()
    pool(self, chunk, reduced)
    del chunk, reduced
    gc.collect()
    held.append(tracemalloc.get_traced_memory()[0] + sum(each.nbytes for each in jax.live_arrays()))
    sizes.append(anonymous())

run.TokenFrequencyRun._pool = pooled
assert main(sys.argv[1:]) == 0
print(json.dumps([held, sizes]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says what memory is a process's own")
@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_parts(tmp_path):
    """Figures 4b and 6 of 16 parts: after the last, arrays and objects hold no more than after the seventh.

    Kept, the norms alone of seven parts would be 7 · 8 sequences · 13 layers · 67 floats, or 0.20 MB, and the bins of
    their pairs, a byte each, 0.25 MB. What the process has beside them, such as compiled programs (10 MB each), is
    seen less exactly: its allocators keep some of what is free.
    """
    config = changed(CONFIG, n_positions=67, n_embd=14, n_head=2, n_inner=10, n_layer=13)
    folder = write_word_tokenizer(write_folder(tmp_path / "deep", config), WORDS)
    corpus = write_texts(tmp_path / "long.jsonl", [79] * 131)
    line = ["figures", "token-frequency", "4b", "6", "--model", str(folder), "--arrays-only", "--no-cache"]
    line += ["--corpus", str(corpus), "--batch", "128", "--tokens", "500", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", GROWTH, *line], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held, sizes = json.loads(done.stdout.splitlines()[-1])
    assert len(held) == 16
    assert np.median(held[-4:]) - np.median(held[5:9]) < 1e5
    assert np.median(sizes[-4:]) - np.median(sizes[5:9]) < 1e7
