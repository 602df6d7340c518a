"""Study 12, what the heads do: `python scripts/heads.py [ID …] [--demo] [--help]`."""

import sys

from jaxqkv.cli.main import command

if __name__ == "__main__":
    command(["figures", "heads", *sys.argv[1:]])
