"""The real hub code against a stand-in for the hub on the loopback interface.

Each step is a fork that imports the hub's library anew, since that reads its settings when it is imported.
"""

import json
import re
from pathlib import Path

import pytest
from conftest import BERT, GPT2, write_folder
from helpers.checkpoints import write_sharded
from helpers.hub import COMMIT, Handler, Hub
from helpers.processes import COMMAND, fork

pytestmark = pytest.mark.slow

# Runs commands, and prints their statuses after all else.
SEVERAL = """
import json, sys
from jaxqkv.cli.main import main
print(json.dumps([main(line) for line in json.loads(sys.argv[1])]))
"""


@pytest.fixture
def hub(tmp_path):
    repositories = {
        "tiny": write_folder(tmp_path / "hub" / "tiny", GPT2),
        "owner/sharded": write_sharded(tmp_path / "hub" / "sharded", BERT),
        "owner/llama": write_folder(tmp_path / "hub" / "llama", GPT2, model_type="llama"),
        "owner/pickled": write_folder(tmp_path / "hub" / "pickled", GPT2),
    }
    (tmp_path / "hub/pickled/model.safetensors").rename(tmp_path / "hub/pickled/pytorch_model.bin")
    for name in ("tf_model.h5", "pytorch_model.bin", "README.md", "onnx/model.safetensors"):
        (repositories["tiny"] / name).parent.mkdir(exist_ok=True)
        (repositories["tiny"] / name).write_bytes(b"not needed")
    (repositories["tiny"] / "tokenizer_config.json").write_text("{}")
    server = Hub(repositories)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def command(hub, tmp_path):
    """Runs `jaxqkv` in a process whose hub is the stand-in; of several lines, one after the other."""

    def run(*arguments, url=None, **extra):
        environment = {
            "HF_ENDPOINT": url or hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_ETAG_TIMEOUT": "2",
        }
        line = [COMMAND, *arguments] if isinstance(arguments[0], str) else [SEVERAL, json.dumps(arguments)]
        return fork(*line, env=environment | extra, cwd=tmp_path).completed()

    return run


def error_line(result):
    """The one line of an error; the hub's own progress bars come before it."""
    assert result.returncode == 2
    (line,) = error_lines(result)
    return line


def error_lines(result):
    assert "Traceback" not in result.stderr
    return [line for line in result.stderr.splitlines() if line.startswith("jaxqkv: error: ")]


def test_fetches_what_it_needs_and_works_offline_afterwards(hub, command):
    result = command("info", "tiny")
    assert result.returncode == 0, result.stderr
    assert "gpt2, 3 layers, 5 heads of 7" in result.stdout
    assert COMMIT in result.stdout
    assert sorted(hub.fetched) == ["config.json", "model.safetensors", "tokenizer_config.json"]

    hub.fetched.clear()
    assert command("info", "tiny", HF_HUB_OFFLINE="1").stdout == result.stdout
    assert command("info", "tiny", url="http://127.0.0.1:9").stdout == result.stdout
    assert hub.fetched == []


def test_offline_without_a_copy_says_what_to_do(command):
    """The same where the hub does not answer; fresh weights of a known name need its tokenizer alone."""
    no_copy = ("tiny: not in the local cache, and the hub cannot be reached", "or copy the checkpoint to a folder")
    messages = (
        no_copy,
        ("random:gpt2: text needs the tokenizer of gpt2: not in the local cache", "--tokenizer FOLDER"),
    )
    offline = command(["info", "tiny"], ["figures", "attention-scores", "--model", "random:gpt2"], HF_HUB_OFFLINE="1")
    assert json.loads(offline.stdout.splitlines()[-1]) == [2, 2]
    for said, line in zip(messages, error_lines(offline), strict=True):
        assert all(part in line for part in said)
    line = error_line(command("info", "tiny", url="http://127.0.0.1:9"))
    assert all(part in line for part in no_copy)


def test_revisions_shards_and_manifest(hub, command, tmp_path):
    arguments = ["figures", "qkv-weights", "2d", "--arrays-only", "--model", "owner/sharded", "--revision", "v2"]
    result = command(*arguments)
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "figures/qkv-weights/manifest.json").read_text())
    assert manifest["checkpoint"] == [{"checkpoint": "owner/sharded", "source": "hub", "revision": COMMIT}]
    assert sorted(hub.fetched) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


def test_what_is_not_supported_is_refused_before_its_weights_are_fetched(hub, command):
    assert "model_type is 'llama'" in error_line(command("info", "owner/llama"))
    assert hub.fetched == ["config.json"]


def test_offline_with_part_of_a_copy(hub, command):
    """As `random:` leaves it: config and tokenizer, and no weights."""
    assert command("info", "random:tiny").returncode == 0
    assert sorted(hub.fetched) == ["config.json", "tokenizer_config.json"]
    line = error_line(command("info", "tiny", HF_HUB_OFFLINE="1"))
    # Versions of the hub's library differ in whether part of a copy is one.
    assert re.search("tiny: (not|no model.safetensors .* offline,) in the local cache.*; go online once", line), line


def test_what_the_hub_does_not_have(command):
    messages = {
        ("nobody",): "nobody: neither a folder here nor a repository on the hub",
        ("tiny", "--revision", "v9"): "tiny: no revision 'v9' on the hub",
        ("not a/valid/id",): "not a/valid/id: neither a folder here nor a valid hub id",
        ("owner/pickled",): "owner/pickled: no model.safetensors",
        ("nobody.safetensors",): "nobody.safetensors: no such folder",
        ("owner/no.safetensors",): "owner/no.safetensors: neither a folder here nor a repository on the hub",
        ("./nobody",): "./nobody: no such folder",
    }
    result = command(*(["info", *arguments] for arguments in messages))
    assert json.loads(result.stdout.splitlines()[-1]) == [2] * len(messages)
    for message, line in zip(messages.values(), error_lines(result), strict=True):
        assert message in line


def test_a_folder_never_touches_the_network(hub, command):
    folder = Path(hub.repositories["tiny"])
    asked = []
    hub.RequestHandlerClass = type("Spy", (Handler,), {"answer": lambda self, body: asked.append(self.path)})
    figure = ["figures", "qkv-weights", "1", "--arrays-only", "--model", str(folder)]
    result = command(["info", str(folder)], figure)
    assert json.loads(result.stdout.splitlines()[-1]) == [0, 0]
    assert asked == []
