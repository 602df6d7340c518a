"""Study 7, attention adjustments: `python scripts/adjustment_magnitudes.py [ID …] [--demo] [--help]`."""

import sys

from jaxqkv.cli.main import command

if __name__ == "__main__":
    command(["figures", "adjustment-magnitudes", *sys.argv[1:]])
