"""What `weightfs mount` starts, or with --foreground becomes: the supervisor of one mount.

(nothing)       settings as JSON on stdin; the outcome, one line of JSON, goes to the descriptor named by --outcome
--foreground    the outcome goes to stdout as `weightfs mount` prints it, with --json as JSON
--resume FD     go on from the supervisor that became this process
--examine FD    whether that would work: exit status 0
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from weightfs import linux
from weightfs.cli.output import announce, fail
from weightfs.config import MountConfig
from weightfs.control import error_document, error_from
from weightfs.errors import UsageError
from weightfs.logs import log_to
from weightfs.supervision.replacement import read_handoff
from weightfs.supervision.supervisor import Said, Supervisor


def main() -> None:
    """Supervise; exits with the mount's status."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--outcome", type=int)
    arguments.add_argument("--foreground", action="store_true")
    arguments.add_argument("--json", action="store_true")
    arguments.add_argument("--resume", type=int)
    arguments.add_argument("--examine", type=int)
    given = arguments.parse_args()
    if given.examine is not None:
        read_handoff(given.examine)
        return
    _prepare()
    if given.resume is not None:
        supervisor = Supervisor.resume(given.resume)
        os.close(given.resume)
        try:
            log_to(supervisor.log_file, supervisor.settings.log_level)
        except OSError:
            log_to(None, supervisor.settings.log_level)
        sys.exit(supervisor.run_on())
    settings = MountConfig(**json.load(sys.stdin))
    if given.foreground:
        sys.exit(_supervise(settings, lambda document: _print(document, given.json), log_file=None))
    os.set_inheritable(given.outcome, False)
    log_file = os.path.join(settings.state_folder, "weightfs.log")
    sys.exit(_supervise(settings, lambda document: _say(document, given.outcome), log_file))


def _prepare() -> None:
    """What daemons inherit."""
    os.umask(0o077)
    linux.raise_file_limit()  # a descriptor for each open file
    linux.avoid_oom()  # all who read weights wait for these processes


def _print(document: Mapping[str, Any], as_json: bool) -> None:
    if "error" in document:
        fail(error_from(document["error"]), as_json=as_json)
    announce(document, as_json=as_json)


def _say(document: Mapping[str, Any], outcome: int) -> None:
    with contextlib.suppress(OSError):  # whoever asked may have given up
        os.write(outcome, json.dumps(document).encode() + b"\n")
    os.close(outcome)


def _supervise(settings: MountConfig, said: Said, log_file: str | None) -> int:
    """Supervise in this process; gives the exit status."""
    try:
        _make_folder(settings.state_folder)
        log_to(log_file, settings.log_level)  # what the interpreter itself has to say, a crash included, goes there too
    except OSError as e:
        reason = os.strerror(e.errno or 0)
        error = UsageError(
            f"can't keep index and log: {reason}", path=settings.state_folder, mend="--state-dir names another folder"
        )
        said({"error": error_document(error)})
        return error.exit_code
    return Supervisor(settings, said, log_file).run()


def _make_folder(path: str) -> None:
    """A state folder, for its owner alone; missing ones above it may be passed through, as a control group may have to.

    Raises:
        OSError: it can't be made.
    """
    above = os.path.dirname(path)
    missing = []
    while not os.path.isdir(above):
        missing.append(above)
        above = os.path.dirname(above)
    for folder in reversed(missing):
        os.makedirs(folder, exist_ok=True)
        os.chmod(folder, 0o711)  # whatever the umask
    os.makedirs(path, mode=0o700, exist_ok=True)


if __name__ == "__main__":
    main()
