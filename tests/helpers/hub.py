"""A stand-in for the hub on the loopback interface."""

import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
