"""Study 3, token frequencies and attention: `python scripts/token_frequency.py [ID …] [--demo] [--help]`."""

import sys

from jaxqkv.cli.main import command

if __name__ == "__main__":
    command(["figures", "token-frequency", *sys.argv[1:]])
