"""What a preflight says of a process."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing about a process that stands in the way of a snapshot, or that a snapshot will change.

    Attributes:
        code: stable, for scripts: `io-uring`, `tcp-peer`.
        pid: of the process; 0 where it is about all of them or the machine.
        what: what was found, with descriptor and path.
        why: what it means for the snapshot or the restore.
        mend: what to change.
        fatal: whether the dump, or every restore, is bound to fail.
    """

    code: str
    pid: int
    what: str
    why: str
    mend: str
    fatal: bool

    def document(self) -> dict[str, Any]:
        """As `TargetError.findings` and the JSON document have it."""
        return asdict(self)

    def __str__(self) -> str:
        whose = f"process {self.pid}: " if self.pid else ""
        return f"{whose}{self.what}: {self.why}; {self.mend}"
