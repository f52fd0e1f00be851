"""The `weightfs` command."""
