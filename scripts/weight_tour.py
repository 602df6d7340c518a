"""Study 4, a tour of a transformer's weights: `python scripts/weight_tour.py [ID …] [--demo] [--help]`."""

import sys

from jaxqkv.cli.main import command

if __name__ == "__main__":
    command(["figures", "weight-tour", *sys.argv[1:]])
