"""Python in a process of its own."""

import os
import subprocess
import sys


def in_a_process(*arguments, env=None):
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
