"""The structure of the package: imports point downwards, without circles, and nothing asks which architecture it is."""

import ast
import functools
import re
from pathlib import Path

import pytest

import jaxqkv

ROOT = Path(jaxqkv.__file__).parent
# A file imports from its own folder and from those after it in this list.
ORDER = (
    "cli",
    "studies",
    "pages",
    "figures",
    "kernels",
    "model",
    "metrics",
    "edits",
    "architectures",
    "checkpoints",
    "text",
    "runtime",
    "errors",
    "typing",
)
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if path != ROOT / "__init__.py"
}


@pytest.fixture(autouse=True, scope="module")
def _together():
    """In one worker, which parses the files once."""


@functools.cache
def trees():
    """The parsed files by module."""
    return {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}


def imports(tree):
    """The modules of the package that a file imports, at its top and inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxqkv"):
            module = node.module.removeprefix("jaxqkv").removeprefix(".")
            for name in node.names:
                whole = f"{module}.{name.name}".removeprefix(".")
                found.add(whole if whole in FILES else module)
        elif isinstance(node, ast.Import):
            found |= {name.name.removeprefix("jaxqkv.") for name in node.names if name.name.startswith("jaxqkv.")}
    return found - {""}


@functools.cache
def all_imports():
    """The modules of the package that each of them imports."""
    return {module: imports(tree) & FILES.keys() for module, tree in trees().items()}


def test_every_file_is_in_a_folder_of_the_list():
    assert {module.split(".")[0] for module in FILES} == set(ORDER)


def place(module):
    return ORDER.index(module.split(".")[0])


def test_imports_point_downwards():
    found = all_imports().items()
    upwards = {module: [each for each in others if place(each) < place(module)] for module, others in found}
    assert {module: others for module, others in upwards.items() if others} == {}


def test_there_is_no_circle():
    def reach(module, seen):
        for other in all_imports()[module] - seen:
            seen.add(other)
            reach(other, seen)
        return seen

    assert [module for module in FILES if module in reach(module, set())] == []


def test_heavy_libraries_are_imported_where_they_are_used():
    """Not at the top of a file; but for what is itself imported only where it is used."""
    heavy = ("datasets", "scipy", "tqdm", "matplotlib", "torch", "transformers")
    alone = {"torch": ["model.torch_reference"], "transformers": ["model.torch_reference"]}
    at_top = {name: [] for name in heavy}
    for module, tree in trees().items():
        for node in tree.body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            for library in {name.split(".")[0] for name in names} & at_top.keys():
                at_top[library].append(module)
    assert at_top == {name: [] for name in heavy} | alone


def test_nothing_outside_asks_which_architecture_it_is():
    """No class of one architecture is named but in its own file and in the list of them."""
    asks = re.compile(r"\b(?:GPT2Config|BertConfig|RobertaConfig|DistilBertConfig)\b|model_type\s*[=!]=")
    outside = {module: path for module, path in FILES.items() if module.split(".")[0] != "architectures"}
    found = {module: asks.findall(path.read_text(encoding="utf-8")) for module, path in outside.items()}
    assert {module: words for module, words in found.items() if words} == {}
