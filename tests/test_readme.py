"""What the README says is so: its snippet runs, its table is the registry's, its commands parse."""

import re
import shlex
from pathlib import Path

import pytest

from jaxqkv.cli import parser
from jaxqkv.figures.registry import STUDIES, study

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_library_in_ten_lines():
    (code,) = blocks("python")
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


def test_the_table_is_the_registry():
    section = README.split("## Figures")[1].split("###")[0]
    rows = re.findall(r"^\| (?:\[`([\w-]+)`\].*?)? ?\| ([\w-]+) \| (.+) \|$", section, re.MULTILINE)
    rows = [row for row in rows if row[1] != "id"]
    listed, current = [], None
    for name, id, title in rows:
        current = name or current
        listed.append((current, id, title))
    expected = [(name, spec.id, spec.title) for name in STUDIES for spec in study(name).figures.values()]
    assert listed == expected


@pytest.mark.parametrize(
    "line", [line for block in blocks("sh") for line in block.splitlines() if re.search(r"(^|/)jaxqkv ", line)]
)
def test_commands_parse(line):
    command = line.split("&&")[-1].split("#")[0]
    arguments = shlex.split(command)[1:]
    assert parser().parse_args(arguments).command == arguments[0]


def test_every_link_in_the_clone_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_module_is_on_the_map():
    modules = {path.name for path in (ROOT / "jaxqkv").glob("*.py")} - {"__init__.py", "errors.py"}
    assert {name for name in modules if f"`{name}`" not in README} == set()
