"""weightfs: a read-only filesystem for model weights, at the speed of the bare file."""
