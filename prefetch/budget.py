"""How many bytes of page cache prefetch may fill.

The rule is `weightfs.memory.budget_of`, where `weightfs doctor` finds it too.
"""

from __future__ import annotations

from weightfs.memory import Budget, budget_of, read_memory

__all__ = ["Budget", "effective_budget"]


def effective_budget(asked_bytes: int | None = None, *, root: str = "/") -> Budget:
    """The budget of this process as things are now; by default half of what is left of memory.

    Args:
        asked_bytes: what the user asked for; capped at what can be had, which `limited_by` then says.
        root: holds `proc` and the mounts of `sys`.
    """
    return budget_of(asked_bytes, read_memory(root))
