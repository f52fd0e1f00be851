"""Snapshot a warmed process with its GPU state and bring it back."""
