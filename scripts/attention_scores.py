"""Study 2, raw and softmax attention scores: `python scripts/attention_scores.py [ID …] [--demo] [--help]`."""

import sys

from jaxqkv.cli import main

if __name__ == "__main__":
    sys.exit(main(["figures", "attention-scores", *sys.argv[1:]]))
