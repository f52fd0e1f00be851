"""Snapshot a warmed process with its GPU state and bring it back."""

from checkpoint.client import on_restore, on_snapshot, snapshot_point

__all__ = ["on_restore", "on_snapshot", "snapshot_point"]
