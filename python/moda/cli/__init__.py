"""The `moda` command."""
