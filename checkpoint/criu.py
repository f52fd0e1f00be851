"""CRIU, driven over its command line: what it is asked is made by pure functions, what it says is read from its log.

A dump or restore runs in a session of its own, so that a signal meant for the caller's terminal does not end it
half-way. It is never left running: whoever waits for it and gives up ends it first.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from checkpoint import control, runtime
from checkpoint.criu_command import (
    PID_FILE,
    Command,
    Criu,
    DumpOptions,
    RestoreOptions,
    dump_argv,
    log_name,
    options_for,
    restore_argv,
    restore_options_of,
)
from checkpoint.errors import CheckpointError, MisfitError, PidTakenError, RetryError, TargetError
from checkpoint.processes import children_of, family, process, start_ticks

__all__ = [
    "BUNDLED",
    "OLDEST",
    "Criu",
    "DumpOptions",
    "RestoreOptions",
    "dump",
    "dump_argv",
    "find_criu",
    "options_for",
    "parse_version",
    "restore",
    "restore_argv",
    "restore_options_of",
]

OLDEST: Final = (4, 1, 0)
BUNDLED: Final = "/opt/weightfs/criu/usr/sbin/criu"
"""Where tools/install-criu puts the one it brings."""

_PLUGINS: Final = "no-criu-plugins"
_INSTALL: Final = "tools/install-criu"
_ANSWER_S: Final = 20.0
_ENDING_S: Final = 10.0
_FORKED: Final = re.compile(r"Forking task with (\d+) pid")
_LOOK_S: Final = 0.02
_CHECK_S: Final = 0.05


def find_criu(candidate: str | None = None, *, check: bool = True) -> Criu:
    """The CRIU to use: `candidate`, else that on PATH or that tools/install-criu brings.

    Of these two it is the first that is new enough for everything on this kernel, else the first that is new enough
    for processes without TCP and UDP sockets: see `Criu.can_dump_inet`.

    Args:
        candidate: a path, or a name to look for on PATH.
        check: have it ask the kernel for what it needs (`criu check`, 60 to 100 ms).

    Raises:
        MisfitError: none that is new enough, or the kernel lacks what it needs.
    """
    tried: list[str] = []
    fit: list[Criu] = []
    for name in (candidate,) if candidate else ("criu", BUNDLED):
        path = shutil.which(name)
        if path is None:
            continue
        said = _ask(path, "--version")
        version = parse_version(said)
        if version is None:
            tried.append(f"{path} does not start: {_first_line(said)}")
        elif version < OLDEST:
            tried.append(f"{path} is {'.'.join(map(str, version))}")
        else:
            fit.append(Criu(path=path, version=version, libdir=_empty_folder()))
    if not fit:
        found = "; ".join(tried) or (f"{candidate} is not there" if candidate else "it is not installed")
        raise MisfitError(f"snapshots need CRIU 4.1 or later: {found}", mend=_INSTALL)
    chosen = next((one for one in fit if one.can_dump_inet), fit[0])
    if check and (reason := _refusal(chosen.path)):
        mend = f"{chosen.path} check -v4 tells more"
        raise MisfitError(f"CRIU can't work with this kernel: {reason}", path=chosen.path, mend=mend)
    return chosen


def parse_version(said: str) -> tuple[int, int, int] | None:
    """What `criu --version` says, None where that is no version."""
    found = re.search(r"^Version: (\d+)\.(\d+)(?:\.(\d+))?", said, re.MULTILINE)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else None


def _ask(path: str, *arguments: str) -> str:
    try:
        done = subprocess.run(
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_ANSWER_S,
            check=False,
            env=_environment(),
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        return str(e)
    return done.stdout.decode(errors="replace")


def _refusal(path: str) -> str | None:
    """Why `criu check` is not satisfied; None if it is."""
    said = _ask(path, "check", "--no-default-config")
    if "Looks good" in said:
        return None
    errors = [line.split("): ", 1)[-1].strip() for line in said.splitlines() if line.startswith("Error")]
    return errors[0] if errors else _first_line(said)


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "it says nothing")


def _environment() -> dict[str, str]:
    """CRIU_CONFIG_FILE and its like could change what the argv says."""
    return {name: value for name, value in os.environ.items() if not name.startswith("CRIU_")}


def _empty_folder() -> str:
    """A folder for plugins that is empty and that only its owner, this user or root, may write to."""
    with contextlib.suppress(OSError, CheckpointError):
        folder = runtime.made(_PLUGINS)
        if not os.listdir(folder):
            return folder
    import tempfile

    return tempfile.mkdtemp(prefix="weightfs-no-criu-plugins-")


def dump(
    criu: Criu,
    pid: int,
    images: str,
    options: DumpOptions,
    timeout_s: float,
    *,
    work: str | None = None,
    inherited: Sequence[int] = (),
) -> None:
    """Write the tree of `pid` to the folder `images`; the tree ends, unless it is to be left running.

    When it fails, the tree goes on as it was.

    Args:
        criu: see `find_criu`.
        pid: the root.
        images: an existing, empty folder.
        options: see `options_for`.
        timeout_s: for all of it.
        work: an existing folder for `dump.log` and `stats-dump`; without, they are not kept.
        inherited: descriptors that CRIU needs, as for a folder that is reached through `/proc/self/fd`.

    Raises:
        TargetError: something the process has can't be dumped: what, and what to do.
        CriuError: CRIU failed otherwise.
        RetryError: it took too long.
    """
    if start_ticks(pid) is None:
        raise TargetError(f"there is no process {pid}", mend="ps -e shows those there are")
    options = replace(options, timeout_s=max(1, min(options.timeout_s, int(timeout_s))))
    with _work_folder(work) as folder:
        _run("dump", dump_argv(criu, pid, images, options, work=folder), folder, timeout_s, inherited)


def restore(
    criu: Criu,
    images: str,
    options: RestoreOptions,
    timeout_s: float,
    *,
    work: str | None = None,
    check: Callable[[], None] | None = None,
    inherited: Sequence[int] = (),
) -> int:
    """Bring back the tree in the folder `images`; gives the pid of its root, which runs (or is stopped, if asked for).

    When it fails, nothing of the tree is left.

    Args:
        criu: see `find_criu`.
        images: what `dump` wrote; nothing is written to it.
        options: see `restore_options_of`.
        timeout_s: for all of it.
        work: an existing folder for `restore.log` and `stats-restore`; without, they are not kept.
        check: called many times while CRIU works; when it raises, CRIU waits in vain and is ended.
        inherited: descriptors that CRIU needs besides those of `options`.

    Raises:
        CriuError: CRIU failed: why, and what to do.
        RetryError: a pid is taken, or it took too long.
    """
    ends = time.monotonic() + timeout_s
    while True:
        try:
            return _restore(criu, images, options, ends - time.monotonic(), work, check, inherited)
        except PidTakenError as e:
            # Init, or whoever started it, may be slow to wait for a process that was dumped.
            if not _is_waited_for(e.pid, min(ends, time.monotonic() + _ENDING_S)):
                raise


def _restore(
    criu: Criu,
    images: str,
    options: RestoreOptions,
    timeout_s: float,
    work: str | None,
    check: Callable[[], None] | None,
    inherited: Sequence[int],
) -> int:
    with _work_folder(work) as folder, _each_its_own(options.inherit) as inherit:
        pid_file = os.path.join(folder, PID_FILE)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(pid_file)
        argv = restore_argv(criu, images, replace(options, inherit=inherit), work=folder)
        _run("restore", argv, folder, timeout_s, [*inherited, *(fd for fd, _ in inherit)], check)
        with open(pid_file) as file:
            return int(file.read())


@contextlib.contextmanager
def _each_its_own(inherit: Sequence[tuple[int, str]]) -> Iterator[tuple[tuple[int, str], ...]]:
    """The same, with a duplicate where a descriptor stands for a second resource: CRIU can take each only once."""
    pairs: list[tuple[int, str]] = []
    with contextlib.ExitStack() as held:
        for fd, resource in inherit:
            own = fd
            if any(fd == taken for taken, _ in pairs):
                own = os.dup(fd)
                held.callback(os.close, own)
            pairs.append((own, resource))
        yield tuple(pairs)


def restored_pid(work: str) -> int | None:
    """The root that a restore brought back, where it came so far. `work`: as `restore` was given it."""
    try:
        with open(os.path.join(work, PID_FILE)) as file:
            return int(file.read())
    except (FileNotFoundError, ValueError):
        return None


def at_work(images: str) -> Iterator[int]:
    """Every CRIU that dumps to a folder of images or restores from it, with what it has forked but not yet made."""
    wanted = {b"--images-dir", b"--libdir", os.fsencode(images)}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
                if wanted <= set(file.read().split(b"\0")):
                    yield int(name)


def wait_for(images: str, timeout_s: float) -> None:
    """Wait for every CRIU that is `at_work` on a folder; it goes on when whoever started it has died.

    Raises:
        CheckpointError: one does not come to an end.
    """
    until = time.monotonic() + timeout_s
    while pids := list(at_work(images)):
        if time.monotonic() > until:
            raise CheckpointError(f"CRIU (process {pids[0]}) is still busy", path=images, mend=f"kill {pids[0]}")
        time.sleep(_LOOK_S)


def _is_waited_for(pid: int, until: float) -> bool:
    """Whether a process that has ended is gone in time; False at once for one that has not ended."""
    while time.monotonic() < until:
        try:
            if not process(pid).has_ended:
                return False
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(_LOOK_S)
    return False


@contextlib.contextmanager
def _work_folder(work: str | None) -> Iterator[str]:
    if work is not None:
        yield work
    else:
        import tempfile

        with tempfile.TemporaryDirectory(prefix="weightfs-criu-") as folder:
            yield folder


def _run(
    command: Command,
    argv: list[str],
    work: str,
    timeout_s: float,
    inherited: Sequence[int] = (),
    check: Callable[[], None] | None = None,
) -> None:
    """Run CRIU to its end, or end it.

    Raises:
        CheckpointError: as the log has it, or as `check` raises it.
    """
    criu = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        pass_fds=inherited,
        env=_environment(),
        umask=0o077,  # the images hold all that is in memory
    )
    try:
        said = _said(criu, timeout_s, check)
    except subprocess.TimeoutExpired:
        if _end(criu, work):
            mend = "give it more time"
            raise RetryError(f"CRIU did not {command} the process within {timeout_s:g} s", mend=mend) from None
        said = b""
    except BaseException:
        _end(criu, work)
        raise
    if criu.returncode:
        from checkpoint.criu_log import explain  # what failed is worth the time, what did not is not

        raise explain(_log(os.path.join(work, log_name(command)), said), command)


def _said(criu: subprocess.Popen[bytes], timeout_s: float, check: Callable[[], None] | None) -> bytes:
    """What it wrote to stderr until it ended."""
    ends = time.monotonic() + timeout_s
    while True:
        left = ends - time.monotonic()
        try:
            return criu.communicate(timeout=left if check is None else min(left, _CHECK_S))[1]
        except subprocess.TimeoutExpired:
            if check is None or time.monotonic() >= ends:
                raise
            check()


def _end(criu: subprocess.Popen[bytes], work: str) -> bool:
    """End CRIU with its helpers, and what it has restored so far, which nobody else knows of.

    Of a dump nothing is left to undo: the code CRIU runs in the target gives up when its socket closes.

    Returns:
        False where it had ended by itself just now: then its status counts.

    Raises:
        CheckpointError: it does not die.
    """
    criu.send_signal(signal.SIGSTOP)
    if criu.poll() is not None:
        return False
    control.kill([*family(criu.pid)[1:], *_siblings(work)])  # before CRIU: what it traces would run on without it
    criu.kill()
    if criu.stderr is not None:
        criu.stderr.close()
    try:
        criu.wait(_ENDING_S)
    except subprocess.TimeoutExpired:
        mend = f"see what it waits for: /proc/{criu.pid}/stack"
        raise CheckpointError(f"CRIU (process {criu.pid}) does not die", mend=mend) from None
    return True


def _siblings(work: str) -> Iterator[tuple[int, int]]:
    """What a restore has made that is not its own child but this process's (`--restore-sibling`)."""
    for pid in _FORKED.findall(_log(os.path.join(work, log_name("restore")), b"")):
        if int(pid) in children_of(os.getpid()):
            yield from family(int(pid))


def _log(path: str, said: bytes) -> str:
    """The log, or what came on stderr where CRIU ended before it opened one."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return said.decode(errors="replace")
