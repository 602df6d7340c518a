"""Study 2, raw and softmax attention scores: `python scripts/attention_scores.py [ID …] [--demo] [--help]`."""

import sys

from jaxqkv.cli.main import command

if __name__ == "__main__":
    command(["figures", "attention-scores", *sys.argv[1:]])
