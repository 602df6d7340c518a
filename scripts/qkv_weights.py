"""Study 1, QKV weights characteristics: `python scripts/qkv_weights.py [ID …] [--demo] [--help]`."""

import sys

from jaxqkv.cli.main import command

if __name__ == "__main__":
    command(["figures", "qkv-weights", *sys.argv[1:]])
