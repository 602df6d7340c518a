"""The `jaxqkv` command."""
