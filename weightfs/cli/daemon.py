"""What `weightfs mount` starts in the background. Settings come as JSON on stdin, the outcome goes to a descriptor."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
from typing import Any

from weightfs.cli.mounting import serve_here
from weightfs.config import MountConfig
from weightfs.errors import UsageError, WeightfsError


def _log_file(folder: str) -> str:
    """The log's path; what the interpreter itself has to say, a crash included, goes there too.

    Raises:
        UsageError: the folder can't be written.
    """
    path = os.path.join(folder, "weightfs.log")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as e:
        reason = os.strerror(e.errno or 0)
        raise UsageError(f"can't keep a log: {reason}", path=path, mend="--state-dir names another folder") from e
    os.dup2(fd, 2)
    os.close(fd)
    faulthandler.enable()
    return path


def main() -> None:
    """Serve; the first line on the given descriptor is the mount document, or an error."""
    outcome = int(sys.argv[1])
    os.set_inheritable(outcome, False)
    settings = MountConfig(**json.load(sys.stdin))

    def say(document: dict[str, Any]) -> None:
        os.write(outcome, json.dumps(document).encode() + b"\n")
        os.close(outcome)

    try:
        serve_here(settings, say, log_file=_log_file(settings.state_folder))
    except WeightfsError as e:
        logging.getLogger("weightfs").error("%s", e)
        error = {"code": e.code, "message": e.message, "path": e.path, "mend": e.mend, "exit_code": e.exit_code}
        say({"error": error})
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
