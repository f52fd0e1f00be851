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
import resource
import sys
from typing import Any, Final

from weightfs.cli.output import announce, fail, log_to_stderr
from weightfs.config import MountConfig
from weightfs.errors import UsageError, WeightfsError
from weightfs.supervisor import Supervisor, described, examine, raised

_OOM_SCORE: Final = "-900"


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
        examine(given.examine)
        return
    _prepare()
    if given.resume is not None:
        supervisor = Supervisor.resume(given.resume)
        log_to_stderr(supervisor.settings.log_level)
        os.close(given.resume)
        sys.exit(supervisor.run_on())
    settings = MountConfig(**json.load(sys.stdin))
    if given.foreground:
        log_to_stderr(settings.log_level)
        sys.exit(Supervisor(settings, lambda document: _print(document, given.json)).run())
    os.set_inheritable(given.outcome, False)
    sys.exit(_in_background(settings, given.outcome))


def _prepare() -> None:
    os.umask(0o077)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one for each open file
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write(_OOM_SCORE)  # all who read weights wait for this process


def _print(document: dict[str, Any], as_json: bool) -> None:
    if "error" in document:
        fail(raised(document["error"]), as_json=as_json)
    announce(document, as_json=as_json)


def _in_background(settings: MountConfig, outcome: int) -> int:
    def say(document: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # whoever asked may have given up
            os.write(outcome, json.dumps(document).encode() + b"\n")
        os.close(outcome)

    try:
        _log_to_file(settings.state_folder)
    except WeightfsError as e:
        say({"error": described(e)})
        return e.exit_code
    log_to_stderr(settings.log_level)
    return Supervisor(settings, say).run()


def _log_to_file(folder: str) -> None:
    """Make the log this process's stderr: what the interpreter itself has to say, a crash included, goes there too.

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


if __name__ == "__main__":
    main()
