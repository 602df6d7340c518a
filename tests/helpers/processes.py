"""Python in a process of its own."""

import os
import subprocess
import sys


def in_a_process(*arguments, env=None):
    """Runs Python as users do, with XLA's optimisations."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment | (env or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
