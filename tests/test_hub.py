"""The real hub code against a stand-in for the hub on the loopback interface.

Each step is a process of its own, since the hub's library reads its settings when it is imported.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import BERT, GPT2, write_folder
from test_checkpoint import write_sharded

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves folders as repositories and remembers which files were asked for."""

    daemon_threads = True

    def __init__(self, repositories):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.fetched = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_POST(self):
        self.asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.answer(body=True)

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.split("?")[0].strip("/")
        if path.startswith("api/"):
            # Data sets are under datasets/, here and where files are; models are at the root.
            what = next((word for word in ("/tree/", "/paths-info/") if word in path), "/revision/")
            name, _, revision = path.removeprefix("api/").removeprefix("models/").partition(what)
            return self.about(name, revision, what)
        name, _, rest = path.partition("/resolve/")
        revision, _, file = rest.partition("/")
        folder = self.server.repositories.get(name)
        if folder is None or revision not in ("main", COMMIT, "v2") or not (folder / file).is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound" if folder else "RepoNotFound"})
        content = (folder / file).read_bytes()
        if body:
            self.server.fetched.append(file)
        etag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self.send(200, content if body else b"", etag | {"Content-Length": str(len(content))})

    def about(self, name, revision, what):
        folder = self.server.repositories.get(name)
        if folder is None:
            return self.send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        revision, _, below = revision.partition("/")
        if revision not in ("", "main", COMMIT, "v2"):
            return self.send(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
        if what == "/tree/":
            below = folder / below
            found = below.iterdir() if "recursive=false" in self.path else below.rglob("*")
            about = [
                {"type": "file" if each.is_file() else "directory", "size": each.stat().st_size}
                | {"path": each.relative_to(folder).as_posix(), "oid": COMMIT}
                for each in sorted(found)
            ]
        elif what == "/paths-info/":
            found = [(path, folder / path) for path in urllib.parse.parse_qs(self.asked)["paths"]]
            about = [
                {"type": "file" if each.is_file() else "directory", "path": path, "oid": COMMIT}
                | {"size": each.stat().st_size}
                for path, each in found
                if each.exists()
            ]
        else:
            files = [path for path in folder.rglob("*") if path.is_file()]
            siblings = [{"rfilename": path.relative_to(folder).as_posix()} for path in files]
            about = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "tags": [], "downloads": 0}
        return self.send(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

    def send(self, status, content, headers):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content)


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
    """Runs `jaxqkv` in a new process whose hub is the stand-in."""

    def run(*arguments, url=None, **extra):
        environment = os.environ | {
            "HF_ENDPOINT": url or hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_ETAG_TIMEOUT": "2",
            "JAX_PLATFORMS": "cpu",
        }
        line = [sys.executable, "-m", "jaxqkv.cli", *arguments]
        return subprocess.run(
            line, env=environment | extra, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
        )

    return run


def error_line(result):
    """The one line of an error; the hub's own progress bars come before it."""
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("jaxqkv: error: ")]
    assert len(lines) == 1
    return lines[0]


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
    for extra in ({"HF_HUB_OFFLINE": "1"}, {"url": "http://127.0.0.1:9"}):
        line = error_line(command("info", "tiny", **extra))
        assert "tiny: not in the local cache, and the hub cannot be reached" in line
        assert "go online once, or copy the checkpoint to a folder" in line


def test_fresh_weights_of_a_known_name_ask_for_a_tokenizer_offline(command):
    line = error_line(command("figures", "attention-scores", "--model", "random:gpt2", HF_HUB_OFFLINE="1"))
    assert "random:gpt2: text needs the tokenizer of gpt2: not in the local cache" in line
    assert "--tokenizer FOLDER" in line


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody"], "nobody: neither a folder here nor a repository on the hub"),
        (["tiny", "--revision", "v9"], "tiny: no revision 'v9' on the hub"),
        (["not a/valid/id"], "not a/valid/id: neither a folder here nor a valid hub id"),
        (["owner/pickled"], "owner/pickled: no model.safetensors"),
        (["./nobody"], "./nobody: no such folder"),
    ],
)
def test_what_the_hub_does_not_have(command, arguments, message):
    assert message in error_line(command("info", *arguments))


def test_a_folder_never_touches_the_network(hub, command):
    folder = Path(hub.repositories["tiny"])
    asked = []
    hub.RequestHandlerClass = type("Spy", (Handler,), {"answer": lambda self, body: asked.append(self.path)})
    assert command("info", str(folder)).returncode == 0
    assert command("figures", "qkv-weights", "1", "--arrays-only", "--model", str(folder)).returncode == 0
    assert asked == []
