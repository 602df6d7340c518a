"""Study 10, downstream impacts of head silencing: `python scripts/head_silencing.py [ID …] [--demo] [--help]`."""

import sys

from jaxqkv.cli.main import command

if __name__ == "__main__":
    command(["figures", "head-silencing", *sys.argv[1:]])
