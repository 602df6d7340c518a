import io
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import GPT2, write_folder
from helpers.checkpoints import write_checkpoint_of_words
from helpers.processes import COMMAND, fork, in_a_process

import jaxqkv
from jaxqkv.checkpoints.checkpoint import BUNDLED
from jaxqkv.cli.figures import command_for, parse
from jaxqkv.cli.main import command, main
from jaxqkv.cli.output import note_words
from jaxqkv.cli.parser import Line
from jaxqkv.errors import CheckpointError
from jaxqkv.studies.registry import names, study


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"jaxqkv {jaxqkv.__version__}"


@pytest.mark.parametrize("command", [[], ["figures"], ["list"], ["info"], ["view"]])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    assert "example" in capsys.readouterr().out


def test_list_is_the_registry(capsys):
    assert main(["list"]) == 0
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["study", "id"]
    assert lines[2:] == [[name, id] for name in names() for id in study(name).figures]
    assert [id for name, id in lines if name == "qkv-weights"] == [
        "1",
        "2a",
        "2b",
        "2c",
        "2d",
        "3",
        "4a",
        "4b",
        "5a",
        "5b",
        "5c",
        "6",
    ]


@pytest.mark.parametrize("columns", [80, 100])
def test_list_fits_the_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["list"]) == 0
    heading, _, *lines = capsys.readouterr().out.splitlines()
    assert columns - 9 < max(map(len, lines)) <= columns
    place, found = heading.index("figure"), []
    for line in lines:
        if line.startswith(" "):
            found[-1] += " " + line[place:]
        else:
            found.append(line[place:])
    assert found == [spec.title for name in names() for spec in study(name).figures.values()]


def test_figures_without_a_study_says_how_to_name_one(capsys):
    assert main(["figures"]) == 0
    *studies, empty, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in studies] == names()
    assert empty == ""
    assert last == "Name a study, as in `jaxqkv figures qkv-weights --demo`; `jaxqkv list` shows the figures of each."


@pytest.mark.parametrize("number", [0, 2])
def test_an_interrupted_run_of_all_studies_names_those_that_were_finished(number, tmp_path, monkeypatch, capsys):
    def draw(order):
        if order.study.name == names()[number]:
            raise KeyboardInterrupt("no figure of heads was finished")
        return {}

    monkeypatch.setattr("jaxqkv.cli.figures._draw_study", draw)
    assert main(["figures", "all", "--demo", "--arrays-only", "--out", str(tmp_path)]) == 130
    finished = {0: "0 of 12 studies finished", 2: "2 of 12 studies finished: qkv-weights, attention-scores"}[number]
    assert capsys.readouterr().err == f"jaxqkv: interrupted; {finished}; no figure of heads was finished\n"


def test_list_of_named_studies_has_arrays(capsys):
    assert main(["list", "qkv-weights"]) == 0
    lines = capsys.readouterr().out.splitlines()
    place = next(number for number, line in enumerate(lines) if line.split()[1] == "2c")
    assert lines[place].endswith("  distributions of W_Q, W_K and W_V by layer")
    said = " ".join(line.strip() for line in lines[place + 1 : place + 3])
    assert said == str(study("qkv-weights").figures["2c"].arrays)
    assert main(["list", *names()]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) == 100
    for name in names():
        for spec in study(name).figures.values():
            assert str(spec.arrays).replace(" ", "") in re.sub(r"\s", "", printed)


def test_list_as_json_has_options_and_figures(capsys):
    assert main(["list", "weight-tour", "category-selectivity", "--json"]) == 0
    tour, selectivity = json.loads(capsys.readouterr().out)
    assert (tour["study"], tour["models"], tour["demo"]) == ("weight-tour", ["gpt2"], "demo-gpt2")
    assert len(tour["figures"]) == 16
    assert tour["figures"][2] == {
        "id": "position-dimension",
        "title": "one dimension of the position embeddings",
        "arrays": [
            {"name": "values", "axes": ["pos"], "condition": ""},
            {"name": "dimension", "axes": [], "condition": ""},
            {"name": "values_NAME", "axes": ["pos"], "condition": "with more checkpoints"},
            {"name": "dimension_NAME", "axes": [], "condition": "with more checkpoints"},
        ],
    }
    options = {each["option"]: each for each in selectivity["options"]}
    assert options["--permutations"]["default"] == 1000
    assert "--text-file" not in options
    with pytest.raises(SystemExit):
        main(["figures", "category-selectivity", "--help"])
    shown = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    assert set(options) - shown == set()


def test_info(capsys, tmp_path):
    assert main(["info", str(write_folder(tmp_path / "tiny", GPT2))]) == 0
    out = capsys.readouterr().out
    assert "gpt2, 3 layers, 5 heads of 7" in out
    assert "43 tokens, 17 positions" in out
    # Embeddings; four projections; the MLP's two matrices; two norms a layer and the last.
    attention, mlp = 3 * 4 * (35 * 35 + 35), 3 * (2 * 35 * 29 + 35 + 29)
    total = (43 + 17) * 35 + attention + mlp + (2 * 3 + 1) * 70
    assert f"parameters:           {total:,}" in out
    assert "model.safetensors (" in out
    assert "F32" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figures", "qkv-weights", "--dpi", "0"], "argument --dpi: 0 is not a whole number from 10 to 2400"),
        (["figures", "qkv-weights", "--seed", "-1"], "argument --seed: -1 is not a whole number from 0 up"),
        (["figures", "qkv-weights", "--seed", "x"], "argument --seed: x is not a whole number from 0 up"),
        (["figures", "qkv-weights", "--demo", "--nothing"], "unrecognized arguments: --nothing"),
        (["list", "--more"], "unrecognized arguments: --more"),
        (["draw"], "no command draw; there is figures, list, view, info, verify, bench, version"),
        (["figures", "qkv-wieghts"], "no study qkv-wieghts; did you mean qkv-weights?"),
        (
            ["figures", "--demo"],
            "--demo needs the name of a study, as in `jaxqkv figures qkv-weights --demo`; `jaxqkv list` names all; see",
        ),
        (
            ["figures", "qkv-weights", "--sentences", "x"],
            "unrecognized arguments: --sentences; --sentences is an option of token-similarity; see",
        ),
        (
            ["figures", "all", "--head=3"],
            "unrecognized arguments: --head=3; --head is an option of head-silencing; see jaxqkv figures all",
        ),
        (["figures", "qkv-weights", "--compair", "x"], "unrecognized arguments: --compair; did you mean --compare or"),
        (["weight-tour", "weights"], "weight-tour is a study; jaxqkv figures weight-tour weights draws it"),
        (
            ["view", "demo-gpt2", "--text", "I", "saw her"],
            "arguments: saw her; quote a text of several words; see jaxqkv view",
        ),
    ],
)
def test_a_wrong_argument_is_one_line_too(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_ids_stand_before_or_after_the_options(tmp_path, capsys):
    folder = write_folder(tmp_path / "tiny", GPT2)
    line = ["figures", "qkv-weights", "1", "--model", str(folder), "--arrays-only", "--out", str(tmp_path)]
    assert main([*line, "--seed", "3", "4b"]) == 0
    assert sorted(path.name for path in tmp_path.glob("*/*.npz")) == ["1.npz", "4b.npz"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(rf"2 figures in {tmp_path}/qkv-weights; computing [\d.]+ s; see {tmp_path}/index.html", last)


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("figures qkv-weights --demo", "figures qkv-weights 6 --demo"),
        ("figures qkv-weights 1 6 --demo --layer 6 2d", "figures qkv-weights 6 --demo --layer 6"),
        ("figures qkv-weights --seed 6 --demo 6", "figures qkv-weights 6 --seed 6 --demo"),
        ("--debug figures qkv-weights 6 --model 'a b' 6", "--debug figures qkv-weights 6 --model 'a b' 6"),
    ],
)
def test_the_command_for_one_figure_of_a_run(line, command):
    before, _, after = (shlex.split(part) for part in line.partition("figures"))
    given = parse(after)
    assert command_for(given, study("qkv-weights"), "6", before) == f"jaxqkv {command}"
    assert parse(shlex.split(command.partition("figures")[2])).ids == ["6"]


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("a b", "'a b'"),
        ("é·🙂", "'é·🙂'"),
        ("a\x01b", r"$'a\001b'"),
        ("\u202e1'\\", r"$'\U0000202e1\'\\'"),
        ("a\nb\t", r"$'a\nb\t'"),
        ("\x7f7\udcff7", r"$'\1777\3777'"),
        ("\u00a0\U000e0001", r"$'\U000000a0\U000e0001'"),
    ],
)
def test_a_command_is_shown_in_characters_that_show_and_is_read_back(word, shown):
    line = str(Line((), "view", ("gpt2", "--text", word)))
    assert line == f"jaxqkv view gpt2 --text {shown}"
    assert line.isprintable()
    script = ["bash", "-c", f"printf '%s\\0' {line.partition('gpt2 ')[2]}"]
    found = subprocess.run(
        script, capture_output=True, check=True, env={"LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"]}
    )
    assert found.stdout == os.fsencode(f"--text\0{word}\0")


@pytest.mark.parametrize("option", ["--model", "--compare"])
def test_ids_that_an_option_with_several_values_took_are_named(tmp_path, capsys, option):
    line = ["figures", "weight-tour", "--out", str(tmp_path), option, "demo-gpt2", "weights"]
    assert main(line) == 2
    assert capsys.readouterr().err == f"jaxqkv: error: weights is a figure of weight-tour; put ids before {option}\n"


def test_what_nobody_foresaw_is_one_line_as_well(monkeypatch, capsys):
    def fail(given, line):
        raise MemoryError("no room\nfor more")

    monkeypatch.setattr("jaxqkv.cli.list.run", fail)
    assert main(["list"]) == 2
    assert capsys.readouterr().err == "jaxqkv: error: MemoryError: no room (--debug shows where)\n"


def test_words_that_have_become_texts_are_told(tmp_path, capsys):
    model = str(write_checkpoint_of_words(tmp_path / "model"))
    line = ["figures", "attention-scores", "3", "--model", model, "--arrays-only", "--out", str(tmp_path), "--text"]
    assert main([*line, " w1", " w2", " w3"]) == 0
    assert capsys.readouterr().err == "jaxqkv: --text: 3 texts, one of each word; quote a text of several words\n"
    note_words([" w1 w2 w3", " w4"])
    assert capsys.readouterr().err == ""


def test_what_cannot_be_drawn_stops_nothing_else(tmp_path, capsys):
    """Of the figures asked for: it is said why, the others are drawn, and the status tells that one is missing."""
    model = str(write_checkpoint_of_words(tmp_path / "model"))
    line = ["figures", "attention-scores", "3", "4", "6", "--model", model, "--arrays-only", "--out", str(tmp_path)]
    assert main([*line, "--text", " w1"]) == 2
    assert {path.stem for path in tmp_path.glob("*/*.npz")} == {"3", "6"}
    assert capsys.readouterr().err.splitlines() == [
        "jaxqkv: 4 is not drawn: figure 4 needs a text of 3 tokens or more, not 1",
        "jaxqkv: error: 4 cannot be drawn with this checkpoint and these options",
    ]


# Standard output of which the reader has left.
LEFT = "import os\nread, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\n"


@pytest.mark.slow
def test_a_reader_who_leaves_does_not_stop_the_script_of_a_study(tmp_path):
    """And it shows no progress bar where there is no terminal."""
    script = BUNDLED["demo-gpt2"].parents[2] / "scripts" / "qkv_weights.py"
    code = f"{LEFT}import runpy\nrunpy.run_path({str(script)!r}, run_name='__main__')\n"
    done = fork(code, "1", "2d", "--demo", "--arrays-only", "--out", str(tmp_path)).completed()
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in tmp_path.glob("*/*.npz")) == ["1.npz", "2d.npz"]


@pytest.mark.slow
def test_a_reader_who_leaves_is_no_error():
    line = f"set -o pipefail; {sys.executable} -m jaxqkv.cli --version | true"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("arguments", ["list", "info demo-gpt2 --json"])
@pytest.mark.slow
def test_a_reader_who_has_left_is_no_error(arguments):
    done = fork(LEFT + COMMAND, *arguments.split()).completed()
    assert (done.returncode, done.stderr) == (0, "")


def test_a_terminal_without_the_characters_stops_nothing(tmp_path, monkeypatch):
    folder = str(write_folder(tmp_path / "模型", GPT2))
    monkeypatch.setenv("MPLBACKEND", "agg")  # as `command` does, and back again
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    with pytest.raises(SystemExit) as stop:
        command(["info", folder])
    assert stop.value.code == 0
    sys.stdout.flush()
    assert rb"\u6a21\u578b" in sys.stdout.buffer.getvalue()


@pytest.mark.parametrize("arguments", [["--debug", "info", "./nowhere"], ["info", "./nowhere", "--debug"]])
def test_debug_shows_the_traceback(arguments):
    with pytest.raises(CheckpointError):
        main(arguments)


def test_no_command_prints_the_help(capsys):
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().out


@pytest.mark.slow
def test_the_package_is_light_to_import():
    """Nothing heavy comes with `import jaxqkv`; what draws, tokenizes or downloads loads on first use."""
    heavy = ("matplotlib", "datasets", "tokenizers", "huggingface_hub", "tqdm", "torch")
    code = "import sys, jaxqkv\n"
    for used, more in (("jaxqkv.cli", ("jax", "flax", "scipy")), ("jaxqkv.load", ())):
        code += f"{used}; print([m for m in {heavy + more} if m in sys.modules])\n"
    assert in_a_process("-c", code).stdout == "[]\n[]\n"
