"""`python -m jaxqkv.cli`: the command, where it is not installed."""

from jaxqkv.cli.main import command

command()
