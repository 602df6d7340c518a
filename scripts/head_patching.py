"""Study 11, patching heads: `python scripts/head_patching.py [ID …] [--demo] [--help]`."""

import sys

from jaxqkv.cli.main import command

if __name__ == "__main__":
    command(["figures", "head-patching", *sys.argv[1:]])
