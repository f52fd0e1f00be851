"""The command line, which at one point is killed, is told to end, or fails: `python -m tests.helpers.stopping POINT HOW
ARGUMENTS`.

POINT is `none`; `MODULE:NAME@before` or `@after` a call of that name; `STEP@` as soon as the journal says that step; or
`criu@FILE`, once CRIU has run so far that there is a file of that pattern in the folder of images or of its own work.
HOW is `kill` (this process gets SIGKILL), `term` (SIGTERM), `fail` (the call raises), `full` (the same, by a disk
without space), `criu` (CRIU gets SIGKILL) or `run:COMMAND` (something happens meanwhile, by a shell).

With CUDA_DOUBLE_WORLD in it the driver is `tests.helpers.cuda_double`.
"""

from __future__ import annotations

import errno
import fnmatch
import functools
import importlib
import os
import signal
import subprocess
import sys
import time
from typing import Any

from checkpoint.cuda_helper import Cuda
from checkpoint.errors import CriuError
from checkpoint.journal import Journal
from tests.helpers import cuda_double

CRIU_SO_FAR_S = 20.0


def stop(how: str, process: subprocess.Popen[bytes] | None = None) -> None:
    """Do it, here and now."""
    match how:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()
        case "term":
            os.kill(os.getpid(), signal.SIGTERM)
        case "criu":
            assert process is not None
            process.kill()
            if process.wait() == 0:  # it was done by then: as if it had been killed with its last instruction
                process.returncode = -signal.SIGKILL
        case _ if how.startswith("run:"):
            subprocess.run(how.removeprefix("run:"), shell=True, check=True)
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case _:
            raise CriuError("was made to fail", mend="do not")


def at_call(where: str, how: str) -> None:
    name, _, when = where.partition("@")
    module, _, path = name.partition(":")
    owner: Any = importlib.import_module(module)
    *owners, attribute = path.split(".")
    for one in owners:
        owner = getattr(owner, one)
    call = getattr(owner, attribute)

    @functools.wraps(call)
    def stopped(*arguments: Any, **named: Any) -> Any:
        if when == "before":
            stop(how)
        answer = call(*arguments, **named)
        if when == "after":
            stop(how)
        return answer

    setattr(owner, attribute, stopped)


def at_step(wanted: str, how: str) -> None:
    noted = Journal.at

    def at(self: Journal, step: str, **changes: Any) -> None:
        noted(self, step, **changes)
        if step == wanted:
            stop(how)

    Journal.at = at  # type: ignore[method-assign]


def while_criu_runs(pattern: str, how: str) -> None:
    class Watched(subprocess.Popen[bytes]):
        def __init__(self, argv: list[str], **named: Any) -> None:
            super().__init__(argv, **named)
            if "--images-dir" not in argv:
                return
            folders = [argv[argv.index(option) + 1] for option in ("--images-dir", "--work-dir")]
            ends = time.monotonic() + CRIU_SO_FAR_S
            has_ended = False
            while not any(fnmatch.filter(os.listdir(folder), pattern) for folder in folders):
                assert time.monotonic() < ends, f"CRIU wrote no {pattern}"
                assert not has_ended, f"CRIU ended without a {pattern}"
                has_ended = self.poll() is not None
            stop(how, self)

    setattr(subprocess, "Popen", Watched)  # noqa: B010 - a class of the same kind, which mypy refuses


def main() -> None:
    point, how, *arguments = sys.argv[1:]
    if cuda_double.FILE_VARIABLE in os.environ:
        Cuda.detect = classmethod(lambda cls: cls(module=cuda_double.MODULE))  # type: ignore[method-assign, assignment]
    if point.startswith("criu@"):
        while_criu_runs(point.removeprefix("criu@"), how)
    elif point.endswith("@"):
        at_step(point.removesuffix("@"), how)
    elif point != "none":
        at_call(point, how)
    from weightfs.cli.main import main as command

    sys.argv = ["weightfs", *arguments]
    command()


if __name__ == "__main__":
    main()
