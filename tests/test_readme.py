"""What the README says is so: its snippets give what it says, its table is the registry's, its commands parse."""

import ast
import importlib
import itertools
import re
import shlex
from pathlib import Path

import pytest

from jaxqkv.cli.main import COMMANDS
from jaxqkv.studies.registry import names, study

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_library_in_ten_lines():
    code = blocks("python")[0]
    assert len(code.splitlines()) <= 10
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


@pytest.mark.parametrize("code", blocks("python"), ids=range(len(blocks("python"))))
def test_snippets_give_what_they_claim(code, tmp_path, monkeypatch, capsys):
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
    for code in blocks("python"):
        assert code.count("→") == sum(claim is not None for _, claim in claims(code))
    assert sum(code.count("→") for code in blocks("python")) >= 8
    (claim,) = (claim for _, claim in claims("x = 1\nx  # → 1\n#   of two lines\n# another\n") if claim)
    assert claim == "1"
    (claim,) = (claim for _, claim in claims("x = 1\nx\n# → 1\n#   of two lines\n# another\n") if claim)
    assert claim == "1\nof two lines"


def test_the_table_is_the_registry():
    section = README.split("## Figures")[1].split("###")[0]
    rows = re.findall(r"^\| (?:\[`([\w-]+)`\].*?)? ?\| ([\w-]+) \| (.+) \|$", section, re.MULTILINE)
    rows = [row for row in rows if row[1] != "id"]
    listed, current = [], None
    for name, id, title in rows:
        current = name or current
        listed.append((current, id, title))
    expected = [(name, spec.id, spec.title) for name in names() for spec in study(name).figures.values()]
    assert listed == expected


@pytest.mark.parametrize(
    "line", [line for block in blocks("sh") for line in block.splitlines() if re.search(r"(^|/)jaxqkv ", line)]
)
def test_commands_parse(line):
    arguments = shlex.split(line.split("&&")[-1].split("#")[0])[1:]
    command, *words = (word for word in arguments if word != "--debug")
    if command != "--version":
        assert command in COMMANDS
        importlib.import_module(f"jaxqkv.cli.{command}").parse(words)


def test_every_link_in_the_clone_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_folder_is_on_the_map():
    folders = {path.name for path in (ROOT / "jaxqkv").iterdir() if any(path.glob("*.py"))}
    assert folders >= {"cli", "studies", "kernels", "model"}
    assert {name for name in folders if f"`{name}/`" not in README} == set()
