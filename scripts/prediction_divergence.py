"""Study 8, predictions and attention: `python scripts/prediction_divergence.py [ID …] [--demo] [--help]`."""

import sys

from jaxqkv.cli.main import command

if __name__ == "__main__":
    command(["figures", "prediction-divergence", *sys.argv[1:]])
