"""What the documents say is so: snippets give what they claim, commands parse, links exist, tables are up to date."""

import ast
import importlib
import itertools
import json
import re
import shlex
import sys
from pathlib import Path

import benchmark
import make_tables
import pytest
import scaling
from benchmarks import report

from jaxqkv import kernels
from jaxqkv.architectures import REGISTRY
from jaxqkv.architectures.activations import FIELDS
from jaxqkv.cli.main import COMMANDS
from jaxqkv.studies import registry
from jaxqkv.text.tokenizer_files import CLASSES

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [
    ROOT / "jaxqkv",
    *(path.parent for path in sorted((ROOT / "jaxqkv").glob("*/__init__.py"))),
    ROOT / "jaxqkv" / "demo",
    ROOT / "scripts",
]
DOCUMENTS = [ROOT / "README.md", *(folder / "README.md" for folder in FOLDERS)]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
TOP = TEXTS["README.md"]


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def without_blocks(text):
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


@pytest.fixture(autouse=True, scope="module")
def _together():
    """Snippets run the same programs: they are in one worker."""


SNIPPETS = [
    pytest.param(code, id=f"{name}-{number}")
    for name, text in TEXTS.items()
    for number, code in enumerate(blocks(text, "python"))
][1:]  # the first is in the next test but one


def test_the_first_document_is_short():
    assert len(TOP.encode()) <= 8_800


# --- snippets ---


def test_the_library_in_ten_lines():
    code = blocks(TOP, "python")[0]
    assert len(code.splitlines()) <= 10
    assert "→" not in code
    names = {}
    exec(code, names)
    batch, acts, model = names["batch"], names["acts"], names["model"]
    sentences, pos = batch.ids.shape
    assert acts.q.shape == (2, sentences, 8, pos, 16)
    assert acts.pattern.shape == (2, sentences, 8, pos, pos)
    assert acts.layers == (5, 6)
    reduced = model.run(batch, reduce=lambda a, mask: a.scores.max(axis=(-1, -2)))
    assert reduced.shape == (8, sentences, 8)
    assert model.weights.W_Q(6, by_head=True).shape == (8, 128, 16)


def claims(code):
    """A snippet's statements, each with the result that the comment behind or below it claims (`# → …`), or None."""
    lines = code.splitlines()
    for node in ast.parse(code).body:
        _, arrow, claim = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().partition("# → ")
        below = lines[node.end_lineno :]
        if not arrow and below and below[0].startswith("# → "):
            claim = below.pop(0).removeprefix("# → ")
            for line in itertools.takewhile(lambda line: line.startswith("#   "), below):
                claim += f"\n{line[4:]}"
        yield node, claim or None


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippets_give_what_they_claim(code, tmp_path, monkeypatch, capsys):
    """Files of pictures, at which no snippet looks, are a few bytes; studies/test_notebook.py has real ones."""
    monkeypatch.setattr("jaxqkv.figures.drawing.rendered", lambda figure, kind, theme: b"picture")
    monkeypatch.chdir(tmp_path)
    names = {}
    for node, claim in claims(code):
        if isinstance(node, ast.Expr):
            value = eval(compile(ast.Expression(node.value), "README.md", "eval"), names)
            printed = repr(value)
        else:
            exec(compile(ast.Module([node], []), "README.md", "exec"), names)
            printed = capsys.readouterr().out.rstrip("\n")
        assert claim in (None, printed)


def test_no_claim_of_the_snippets_is_overlooked():
    codes = [code for text in TEXTS.values() for code in blocks(text, "python")]
    for code in codes:
        assert code.count("→") == sum(claim is not None for _, claim in claims(code))
    assert sum(code.count("→") for code in codes) >= 12
    (claim,) = (claim for _, claim in claims("x = 1\nx  # → 1\n#   of two lines\n# another\n") if claim)
    assert claim == "1"
    (claim,) = (claim for _, claim in claims("x = 1\nx\n# → 1\n#   of two lines\n# another\n") if claim)
    assert claim == "1\nof two lines"


# --- commands ---


def commands(line):
    """The words after each `jaxqkv` of a shell line, also of one that another command is given as a word."""
    words = shlex.split(line, comments=True)
    for word in [word for word in words if word.startswith("jaxqkv ")]:
        yield from commands(word)
    for place in [i for i, word in enumerate(words) if word == "jaxqkv" or word.endswith("/jaxqkv")]:
        yield list(itertools.takewhile(lambda word: word != "&&", words[place + 1 :]))


LINES = [line for text in TEXTS.values() for block in blocks(text, "sh") for line in block.splitlines()]
# Commands inside sentences that can be typed as they are.
INLINE = {
    line
    for text in TEXTS.values()
    for line in re.findall(r"`(jaxqkv [^`]+)`", without_blocks(text).replace("\n", " "))
    if not re.search(r"[A-Z]{2}|…|--help", line) and len(line.split()) > 2
}


@pytest.mark.parametrize("line", [line for line in dict.fromkeys([*LINES, *sorted(INLINE)]) if "jaxqkv " in line])
def test_commands_parse(line):
    found = list(commands(line))
    assert found
    for name, *words in found:
        assert name in COMMANDS
        given = importlib.import_module(f"jaxqkv.cli.{name}").parse(words)
        for study in getattr(given, "studies", []) if name == "figures" else []:
            assert study.select(given.ids)


def test_a_command_inside_another_is_found():
    assert list(commands('ssh --command "jaxqkv list x"  # jaxqkv info')) == [["list", "x"]]
    assert list(commands("a && b/jaxqkv figures y && c")) == [["figures", "y"]]


def test_options_exist(capsys, monkeypatch):
    helps = [("figures", [name, "--help"]) for name in registry.names()]
    for name, words in [*helps, *((name, ["--help"]) for name in COMMANDS if name not in ("figures", "bench"))]:
        with pytest.raises(SystemExit):
            importlib.import_module(f"jaxqkv.cli.{name}").parse(words)
    train_demo = pytest.importorskip("train_demo", exc_type=ImportError)  # which needs an extra
    for script in (scaling, train_demo):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--help"])
        with pytest.raises(SystemExit):
            script.main()
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out + benchmark.parser().format_help()))
    for name, text in TEXTS.items():
        code = " ".join(re.findall(r"`[^`]+`", without_blocks(text)))
        named = set(re.findall(r"(?<!\S)--[a-z-]+|(?<=`)--[a-z-]+", code))
        assert named - known == set(), name


# --- links, tables and maps ---


def anchors(text):
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_exists(name):
    for link in re.findall(r"\]\(([^)]+)\)", without_blocks(TEXTS[name])):
        if link.startswith("http"):
            continue
        target, _, anchor = link.partition("#")
        path = ((ROOT / name).parent / target).resolve() if target else ROOT / name
        assert path.exists(), link
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), link


def test_generated_tables_are_the_registry():
    """`python scripts/make_tables.py` rewrites them."""
    for table in make_tables.tables():
        expected = f"<!-- {table.mark} -->\n{table.content}\n<!-- end of {table.mark} -->"
        assert expected in table.path.read_text(encoding="utf-8"), table.mark


def test_a_study_without_a_section_is_named():
    with pytest.raises(ValueError, match="no section 'heads' that begins with a question in italics"):
        make_tables.question("## heads\n\nNo question.\n", "heads")
    assert make_tables.question("## heads\n\n*What do\nthey do?*\n\nMuch.\n", "heads") == "What do they do?"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_file_of_a_folder_is_named(folder):
    text = TEXTS[(folder / "README.md").relative_to(ROOT).as_posix()]
    names = {path.name for path in folder.iterdir() if not path.name.startswith((".", "_"))} - {"README.md"}
    assert {name for name in names if f"`{name}`" not in text and f"`{name}/`" not in text} == set()


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("kernels", kernels.__all__),
        ("cli", [f"jaxqkv {command}" for command in COMMANDS]),
        ("architectures", REGISTRY.architectures),
        ("model", FIELDS),
        ("text", CLASSES),
    ],
)
def test_lists_are_complete(name, listed):
    text = TEXTS[f"jaxqkv/{name}/README.md"]
    assert [each for each in listed if not re.search(rf"`{re.escape(each)}\b", text)] == []


def test_the_numbers_of_the_documents_are_the_published_ones():
    cases = {each["case"]: each for each in json.loads(report.PUBLISHED["cpu"].read_text())["cases"]}
    prose = " ".join(TOP.split())
    seconds = cases["forward gpt2-medium, 8 × 512"]["median seconds"]
    jaxqkv, tuned = (report.duration(seconds[side]) for side in ("jaxqkv", "tuned"))
    assert f"takes {jaxqkv}; tuned PyTorch code takes {tuned}." in prose
    for side, words in (("tuned", "tuned PyTorch takes"), ("notebook", "code written as in the originals")):
        faster = [case["faster"][side] for name, case in cases.items() if name.endswith(", arrays")]
        assert f"{words} {min(faster):.1f} to {max(faster):.1f} times" in prose
    large = {each["case"]: each["median seconds"] for each in json.loads(report.PUBLISHED["gpu"].read_text())["cases"]}
    for case, precision in (("gpt2-medium, 64 × 512", "float32"), ("gpt2-medium, 64 × 512, TF32", "TensorFloat-32")):
        seconds = large[f"forward {case}"]
        assert f"{seconds['jaxqkv']:.2f} s in {precision} (PyTorch {seconds['tuned']:.2f} s)" in prose
    pieces = json.loads(scaling.PUBLISHED.read_text())["pieces"]
    days, hours = (scaling.predict(pieces, n)["whole"] / size for n, size in ((1, 86_400), (64, 3600)))
    package = " ".join(TEXTS["jaxqkv/README.md"].split())
    assert f"{days:.0f} days on two cores and {hours:.0f} hours on 64 machines of two cores" in package
