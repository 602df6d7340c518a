"""Study 5, similarities of a token's Q, K and V: `python scripts/token_similarity.py [ID …] [--demo] [--help]`."""

import sys

from jaxqkv.cli.main import command

if __name__ == "__main__":
    command(["figures", "token-similarity", *sys.argv[1:]])
