"""Python in processes of its own: new ones, and forks of one that has imported the package."""

import atexit
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAIT = 120  # seconds; nothing here takes a tenth of it


def in_a_process(*arguments, env=None):
    """Runs Python as users do, with XLA's optimisations."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment | (env or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=WAIT,
    )


# --- forks, which need not import JAX and the package again: most of the time of a short process ---

COMMAND = "from jaxqkv.cli.main import command\ncommand()"
# Imported before the first fork; nothing of JAX has been used by then, so that each fork begins as a new process does.
IMPORTED = (
    "jaxqkv.cli.figures",
    "jaxqkv.cli.info",
    "jaxqkv.cli.list",
    "jaxqkv.cli.view",
    "jaxqkv.figures.drawing",
    "jaxqkv.model.loading",
    "jaxqkv.pages.gallery",
    "jaxqkv.pages.view",
    "jaxqkv.text.counting",
    "jaxqkv.text.tokenizer_files",
    "huggingface_hub.hf_api",
    "matplotlib.backends.backend_agg",
    "tqdm",
)
# Libraries that read the environment when they are imported, and so are imported by each fork that uses them.
ANEW = ("huggingface_hub",)


def fork(code, *arguments, env=None, cwd=None):
    """Starts Python code with arguments in a forked process.

    Args:
      code: as of `python -c`.
      arguments: of `sys.argv`, after the first.
      env: variables besides those of this process. JAX reads its own before the fork, but for XLA_FLAGS.
      cwd: folder that the process is in.

    Returns:
      A `Fork`.
    """
    return Fork(_server(), code, arguments, os.environ | (env or {}), cwd or Path.cwd())


class Fork:
    """A forked process, with those parts of `subprocess.Popen` that are needed here."""

    def __init__(self, server, code, arguments, env, cwd):
        self._server, self.returncode = server, None
        self._outputs = [server.folder / f"{server.count}.{name}" for name in ("out", "err")]
        server.count += 1
        self.pid = server.ask(
            code=code, arguments=arguments, env=env, cwd=str(cwd), outputs=list(map(str, self._outputs))
        )

    def poll(self):
        if self.returncode is None:
            self.returncode = self._server.ask(ended=self.pid)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=WAIT):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise subprocess.TimeoutExpired(f"fork {self.pid}", timeout)
            time.sleep(0.02)
        return tuple(path.read_text() for path in self._outputs)

    def completed(self, timeout=WAIT):
        """Waits for the end, and returns it as `subprocess.run` does."""
        out, err = self.communicate(timeout)
        return subprocess.CompletedProcess(f"fork {self.pid}", self.returncode, out, err)


class _Server:
    """The process that is forked: this file as a program."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory()
        self.folder, self.count = Path(self._folder.name), 0
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def end(self):
        self._process.communicate()
        self._folder.cleanup()


@functools.cache
def _server():
    server = _Server()
    atexit.register(server.end)
    return server


def serve():
    """Forks at each request on standard input and answers with the process's id, or with the status of one."""
    for name in IMPORTED:
        importlib.import_module(name)
    from jaxqkv.studies.registry import studies

    assert all(study.figures for study in studies())  # which imports their modules
    gc.collect()
    gc.freeze()  # so that no fork looks through what all share, at its end neither
    for line in sys.stdin:
        request = json.loads(line)
        if "ended" in request:
            pid, status = os.waitpid(request["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            return run(**request)  # and ends as Python does
        print(json.dumps(answer), flush=True)
    return None


def run(code, arguments, env, cwd, outputs):
    """In a fork: runs the code as if this were a new process."""
    for number, path in enumerate((os.devnull, *outputs)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = ["-c", *arguments]
    for name in [each for each in sys.modules if each.split(".")[0] in ANEW]:
        del sys.modules[name]
    exec(code, {"__name__": "__main__"})


if __name__ == "__main__":
    serve()
