"""The `jaxqkv` command: its sub-commands, arguments and output."""
