"""Study 9, words and their categories: `python scripts/category_selectivity.py [ID …] [--demo] [--help]`."""

import sys

from jaxqkv.cli.main import command

if __name__ == "__main__":
    command(["figures", "category-selectivity", *sys.argv[1:]])
