"""Nothing from a checkpoint is executed, and nothing outside it is read."""

import ast
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import GPT2, random_tensors, write_folder, write_word_tokenizer

import jaxqkv
from jaxqkv.cli.main import main
from jaxqkv.errors import JaxqkvWarning
from jaxqkv.runtime.files import fingerprint
from jaxqkv.text import counting

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "jaxqkv").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")])


class Trap:
    """Makes a file when a pickle of it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def trapped(tmp_path):
    """A sound checkpoint among all that other programs would run, and the file that one of them would make."""
    sprung = tmp_path / "sprung"
    code = f"import pathlib\npathlib.Path({str(sprung)!r}).touch()\n"
    template = "{{ cycler.__init__.__globals__.os.system('touch " + str(sprung) + "') }}"
    names = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    extra = {"auto_map": names, "trust_remote_code": True, "custom_pipelines": {"x": {"impl": "evil.Pipeline"}}}
    folder = write_word_tokenizer(write_folder(tmp_path / "model", GPT2, **extra), ["<unk>", " her", " saw", "I"])
    tokenizer = {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"tokenizer_class": "EvilTokenizer"}))
    (folder / "chat_template.jinja").write_text(template)
    for name in ("evil.py", "modeling_gpt2.py", "tokenization_gpt2.py", "conftest.py", "__init__.py"):
        (folder / name).write_text(code)
    for name in ("pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    pickle.loads((folder / "optimizer.pt").read_bytes())  # the trap is one
    assert sprung.exists()
    sprung.unlink()
    return folder, sprung


def test_the_library_runs_nothing(trapped):
    folder, sprung = trapped
    with pytest.warns(JaxqkvWarning, match="unknown keys auto_map, custom_pipelines, trust_remote_code"):
        model = jaxqkv.load(folder)
    with pytest.warns(JaxqkvWarning, match="EvilTokenizer is not implemented here"):
        batch = model.tokenize("I saw her")
    acts = model.run(batch, capture={"q"})
    write_folder(folder.with_name("plain"), GPT2)
    plain = jaxqkv.load(folder.with_name("plain")).run([[3, 2, 1]], capture={"q"})
    np.testing.assert_array_equal(acts.q, plain.q)
    assert not sprung.exists()


@pytest.mark.parametrize(
    "line",
    [
        ["info"],
        ["figures", "attention-scores", "3", "--text", "I saw her", "--arrays-only", "--out", "out", "--model"],
        ["figures", "weight-tour", "architecture", "positions", "--arrays-only", "--out", "out", "--model"],
        ["verify", "--out", "verify.json", "--text", "I" + 16 * " her", "I saw" + 6 * " her", "--"],
    ],
    ids=["info", "attention-scores", "weight-tour", "verify"],
)
def test_the_commands_run_nothing(trapped, line, monkeypatch):
    if line[0] == "verify":
        pytest.importorskip("torch", exc_type=ImportError)
    folder, sprung = trapped
    monkeypatch.chdir(folder.parent)
    assert main([*line, str(folder)]) == 0
    assert not sprung.exists()


def test_without_safetensors_no_pickle_is_opened(trapped, monkeypatch, capsys):
    folder, sprung = trapped
    monkeypatch.chdir(folder.parent)
    (folder / "model.safetensors").unlink()
    for line in (["info"], ["verify"], ["figures", "qkv-weights", "--model"]):
        assert main([*line, str(folder)]) == 2
        assert "only pytorch_model-00001-of-00001.bin, and pickles are never opened" in capsys.readouterr().err
    assert not sprung.exists()


def test_what_is_kept_of_counts_is_no_pickle(tmp_path, monkeypatch):
    """An array of objects in the cache is as good as none."""
    monkeypatch.setenv("JAXQKV_CACHE", str(tmp_path))
    key = {"version": 1}
    path = counting._path("batch", key)
    path.parent.mkdir(parents=True)
    np.savez(path, ids=np.array([Trap(tmp_path / "sprung")], object))
    assert counting._recall("batch", key, "ids") is None
    assert not (tmp_path / "sprung").exists()


# Its displays and pictures go between the command and processes that it starts itself, by pipes that no one else has.
OWN_PROCESSES = ROOT / "jaxqkv" / "figures" / "drawers.py"


# One of these words is in each of them.
WORDS = re.compile(
    r"\b(pickle|marshal|shelve|dill|joblib|cloudpickle|jinja2|eval|exec|compile|__import__|load|system|shell"
    r"|trust_remote_code)\b"
)


def means_of_execution(path):
    """What a source could run a checkpoint's code with, by line."""
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)) if WORDS.search(text) else ():
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            modules = {name.split(".")[0] for name in names}
            found = modules & {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "jinja2"}
            found -= {"pickle"} if path == OWN_PROCESSES else set()
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {each.arg: ast.unparse(each.value) for each in node.keywords}
            found = {name} & {"eval", "exec", "compile", "__import__", "torch.load", "os.system"}
            found |= {option for option in ("trust_remote_code", "shell") if options.get(option, "False") != "False"}
            if name == "np.load" and options.get("allow_pickle") != "False":
                found.add("np.load without allow_pickle=False")
        else:
            continue
        for each in found:
            yield f"{path.relative_to(ROOT)}, line {node.lineno}: {each}"


def test_no_source_has_the_means():
    assert len(SOURCES) > 50
    assert [found for path in SOURCES for found in means_of_execution(path)] == []


def test_links_are_followed_wherever_they_lead(tmp_path):
    """As in the hub's cache: they are the folder's owner's doing, and no index can make one."""
    folder = write_folder(tmp_path / "blobs", GPT2)
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for number, name in enumerate(("config.json", "model.safetensors")):
        (folder / name).rename(folder / str(number))
        (linked / name).symlink_to(Path("..", "blobs", str(number)))
    weights = jaxqkv.load(linked).weights
    for key, tensor in random_tensors(GPT2).items():
        np.testing.assert_array_equal(weights[key], tensor)
    assert weights.checkpoint.identity()["files"] == {"model.safetensors": fingerprint(folder / "1")}
