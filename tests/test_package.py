"""The package as a whole: what it documents, and what it needs."""

import ast
import functools
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import GPT2, arrays_of, write_folder

import jaxqkv

# What the extras bring, and the only module that may need it.
EXTRAS = ("torch", "transformers", "sklearn", "optax", "beartype", "mypy", "pytest", "_pytest", "xdist", "xarray")
NEEDS_EXTRA = "jaxqkv.model.torch_reference"
MODULES = [module.name for module in pkgutil.walk_packages(jaxqkv.__path__, "jaxqkv.") if module.name != NEEDS_EXTRA]

WITHOUT_EXTRAS = f"""
import importlib, sys

class Absent:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent)
for name in {MODULES}:
    importlib.import_module(name)
try:
    import {NEEDS_EXTRA}
except ModuleNotFoundError as error:
    print("absent:", error.name)
sys.exit(importlib.import_module("jaxqkv.cli.main").main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_base_dependencies_suffice(tmp_path):
    folder = write_folder(tmp_path / "tiny", GPT2)
    line = ["figures", "qkv-weights", "2d", "--model", str(folder), "--arrays-only", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, *line], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "absent: torch" in done.stdout
    written = {path.stem: arrays_of(path) for path in (tmp_path / "out" / "qkv-weights").glob("*.npz")}
    assert written.keys() == {"2d"}
    assert np.isfinite(written["2d"]["mean"]).all()


def test_only_what_is_about_them_imports_libraries_of_the_extras():
    """Wherever in a file: the reference, what compares with it, and the conversion to xarray."""
    found = {}
    for path in Path(jaxqkv.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if any(name in text for name in EXTRAS) else ():
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            for library in {name.split(".")[0] for name in names} & set(EXTRAS):
                found.setdefault(path.stem, set()).add(library)
    expected = {"torch_reference": {"torch", "transformers"}, "comparison": {"transformers"}, "activations": {"xarray"}}
    assert found == expected


def public_members():
    """Every public function and class of the package, and the public methods and properties of the classes."""
    for name in MODULES:
        for key, member in vars(importlib.import_module(name)).items():
            if key.startswith("_") or getattr(member, "__module__", None) != name:
                continue
            # A figure's title is where it is registered.
            if callable(member) and hasattr(member, "__qualname__") and not key.startswith("figure_"):
                yield f"{name}.{key}", member
            if inspect.isclass(member):
                for part, value in vars(member).items():
                    own = (
                        isinstance(value, property | functools.cached_property)
                        or getattr(value, "__module__", None) == name
                    )
                    if own and not part.startswith("_") and not inspect.isclass(value):
                        yield f"{name}.{key}.{part}", getattr(member, part)


MEMBERS = dict(public_members())


def test_the_public_members_are_found():
    """Jitted kernels, classes, methods and properties among them."""
    assert MEMBERS.keys() >= {
        "jaxqkv.kernels.moments.moments",
        "jaxqkv.kernels.similarity.head_pair_masks",
        "jaxqkv.model.forward.forward",
        "jaxqkv.model.model.Model",
        "jaxqkv.model.model.Model.run",
        "jaxqkv.text.batches.Batch.positions",
    }


def faults_of(name, member):
    """What a public member lacks of documentation and annotations."""
    text = inspect.getdoc(member)
    if not text or text.startswith(f"{name.rpartition('.')[2]}("):  # what `dataclass` writes where nothing is written
        yield "no docstring"
    if isinstance(member, property | functools.cached_property):
        member = getattr(member, "fget", None) or member.func
    elif inspect.isclass(member):
        return
    signature = inspect.signature(member)
    for each in signature.parameters.values():
        if each.annotation is each.empty and each.name not in ("self", "cls"):
            yield f"no type of {each.name}"
    if signature.return_annotation is signature.empty:
        yield "no type of what it returns"


def test_everything_is_documented_and_annotated():
    assert len(MEMBERS) > 300
    faults = {name: list(faults_of(name, member)) for name, member in sorted(MEMBERS.items())}
    assert {name: found for name, found in faults.items() if found} == {}


SHAPED = ("Float", "Int", "Bool", "UInt8", "UInt16", "Shaped", "Key")


def bare_arrays(annotation):
    """Arrays in an annotation, but those with the shape that jaxtyping gives them."""
    if isinstance(annotation, ast.Subscript) and getattr(annotation.value, "id", None) in SHAPED:
        return []
    if getattr(annotation, "attr", None) == "ndarray" or getattr(annotation, "id", None) in ("Array", "AnyArray"):
        return [ast.unparse(annotation)]
    return [found for child in ast.iter_child_nodes(annotation) for found in bare_arrays(child)]


def public_functions(node, name=""):
    """The public functions and methods of a module, and their names."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            if isinstance(child, ast.FunctionDef):
                yield name + child.name, child
            else:
                yield from public_functions(child, f"{name}{child.name}.")


def test_arrays_have_shapes():
    """In every public function: what it takes and what it gives."""
    bare, seen = {}, 0
    for path in Path(jaxqkv.__file__).parent.rglob("*.py"):
        for name, function in public_functions(ast.parse(path.read_text())):
            arguments = function.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg]
            annotations = [each.annotation for each in every if each is not None] + [function.returns]
            found = [array for each in annotations if each is not None for array in bare_arrays(each)]
            seen += any("ndarray" in ast.unparse(each) for each in annotations if each is not None)
            if found:
                bare[f"{path.stem}.{name}"] = found
    assert bare == {}
    assert seen > 50


def test_the_package_is_typed():
    assert (Path(jaxqkv.__file__).parent / "py.typed").exists()
