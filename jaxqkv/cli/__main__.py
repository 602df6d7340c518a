"""`python -m jaxqkv.cli`: runs the command without installing it."""

from jaxqkv.cli.main import command

if __name__ == "__main__":
    command()
