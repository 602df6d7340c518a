"""Study 1, QKV weights characteristics: `python scripts/qkv_weights.py [ID …] [--demo] [--help]`."""

import sys

from jaxqkv.cli import main

if __name__ == "__main__":
    sys.exit(main(["figures", "qkv-weights", *sys.argv[1:]]))
