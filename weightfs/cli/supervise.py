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
from weightfs.errors import UsageError, WeightfsError
from weightfs.logs import log_to
from weightfs.supervision.replacement import read_handoff
from weightfs.supervision.supervisor import Supervisor


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
        log_to(supervisor.log_file, supervisor.settings.log_level)
        sys.exit(supervisor.run_on())
    settings = MountConfig(**json.load(sys.stdin))
    if given.foreground:
        log_to(None, settings.log_level)
        sys.exit(Supervisor(settings, lambda document: _print(document, given.json)).run())
    os.set_inheritable(given.outcome, False)
    sys.exit(_in_background(settings, given.outcome))


def _prepare() -> None:
    """What daemons inherit."""
    os.umask(0o077)
    linux.raise_file_limit()  # a descriptor for each open file
    linux.avoid_oom()  # all who read weights wait for these processes


def _print(document: Mapping[str, Any], as_json: bool) -> None:
    if "error" in document:
        fail(error_from(document["error"]), as_json=as_json)
    announce(document, as_json=as_json)


def _in_background(settings: MountConfig, outcome: int) -> int:
    def say(document: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # whoever asked may have given up
            os.write(outcome, json.dumps(document).encode() + b"\n")
        os.close(outcome)

    try:
        path = _log_to_file(settings)
    except WeightfsError as e:
        say({"error": error_document(e)})
        return e.exit_code
    return Supervisor(settings, say, path).run()


def _log_to_file(settings: MountConfig) -> str:
    """Log to the state folder; what the interpreter itself has to say, a crash included, goes there too.

    Raises:
        UsageError: the folder can't be written.
    """
    path = os.path.join(settings.state_folder, "weightfs.log")
    try:
        os.makedirs(settings.state_folder, mode=0o700, exist_ok=True)
        log_to(path, settings.log_level)
    except OSError as e:
        reason = os.strerror(e.errno or 0)
        raise UsageError(f"can't keep a log: {reason}", path=path, mend="--state-dir names another folder") from e
    return path


if __name__ == "__main__":
    main()
