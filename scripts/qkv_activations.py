"""Study 6, activations of Q, K and V: `python scripts/qkv_activations.py [ID …] [--demo] [--help]`."""

import sys

from jaxqkv.cli.main import command

if __name__ == "__main__":
    command(["figures", "qkv-activations", *sys.argv[1:]])
