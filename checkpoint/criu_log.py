"""What CRIU's log says went wrong, as an error that names the descriptor or mapping and what to do."""

from __future__ import annotations

import re
from typing import Final, Literal

from checkpoint.errors import CheckpointError, CriuError, RetryError

Command = Literal["dump", "restore"]

_ERROR: Final = re.compile(r"Error \((?P<place>[^)]*)\): (?P<text>.*)")
_PID_TAKEN: Final = re.compile(r"Can't fork for (\d+): File exists")
_HARMLESS: Final = re.compile(r"rlimit: Can't setup RLIMIT_NOFILE")
_TAIL_LINES: Final = 40


def explain(log: str, command: Command) -> CheckpointError:
    """The error that a log of a failed command stands for.

    Args:
        log: the whole of it, at verbosity 3 or more.
        command: what was run.
    """
    lines = log.splitlines()
    errors = [found["text"].strip() for line in lines if (found := _ERROR.search(line))]
    errors = [error for error in errors if not _HARMLESS.match(error)]
    for error in errors:
        if taken := _PID_TAKEN.match(error):
            mend = "end that process, or restore with --new-pidns"
            return RetryError(f"another process has the pid {taken[1]}", mend=mend)
    message = f"CRIU could not {command} the process"
    if errors:
        message += f": {errors[0]}"
    return CriuError(message, log="\n".join(lines[-_TAIL_LINES:]))
