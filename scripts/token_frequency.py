"""Study 3, token frequencies and attention: `python scripts/token_frequency.py [ID …] [--demo] [--help]`."""

import sys

from jaxqkv.cli import main

if __name__ == "__main__":
    sys.exit(main(["figures", "token-frequency", *sys.argv[1:]]))
