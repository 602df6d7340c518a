"""`python -m jaxqkv.cli`: the command, where it is not installed."""

from jaxqkv.cli.main import command

if __name__ == "__main__":
    command()
