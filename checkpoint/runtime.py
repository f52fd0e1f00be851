"""Where things lie that mean nothing once the machine was switched off: `/run/weightfs`, or what a variable names.

Commands recover what others that died have begun, which they know by the journals here. So tenants of a machine that
are not to touch each other's processes have a folder each, and so have tests that run beside each other.
"""

from __future__ import annotations

import os
from typing import Final

from checkpoint import guarded
from checkpoint.errors import CheckpointError

VARIABLE: Final = "WEIGHTFS_RUNTIME_DIR"
DEFAULT: Final = "/run/weightfs"


def path_of(name: str) -> str:
    """The path of a folder of this name, which may not be there.

    Raises:
        CheckpointError: the variable names no absolute path.
    """
    base = os.environ.get(VARIABLE) or DEFAULT
    if not os.path.isabs(base):
        raise CheckpointError(f"{VARIABLE} is no absolute path", path=base, mend=f"unset it for {DEFAULT}")
    return os.path.join(base, name)


def made(name: str) -> str:
    """The same, made where it was not there, and nobody's but ours or root's.

    Raises:
        CorruptError: others could have written there: what lies there tells which processes are ended or go on.
        CheckpointError: it can't be made.
    """
    path = path_of(name)
    try:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        os.makedirs(path, mode=0o700, exist_ok=True)
    except OSError as e:
        raise guarded.unwritable(path, e) from e
    guarded.require_path_ours(path)
    return path
