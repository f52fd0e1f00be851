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
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from checkpoint.criu_log import Command, explain
from checkpoint.errors import MisfitError, RetryError, TargetError
from checkpoint.processes import Process, start_ticks, tree_of
from weightfs import linux

OLDEST: Final = (4, 1, 0)
_OLDEST_WITH_SOCKETS: Final = (4, 2, 0)
_STRICT_SOCKETS: Final = (6, 16)
"""getsockopt(SO_PASSCRED) fails since then for all but a few families of sockets; older CRIUs ask it of every one."""
BUNDLED: Final = "/opt/weightfs/criu/usr/sbin/criu"
"""Where tools/install-criu puts the one it brings."""

_PLUGINS: Final = "/run/weightfs/no-criu-plugins"
_INSTALL: Final = "tools/install-criu"
_ANSWER_S: Final = 20.0
_VERBOSITY: Final = "-v4"
"""The lowest at which the log says which descriptor and which mapping it is busy with."""
_DEFAULT_GHOST_BYTES: Final = 1 << 20
_ENDING_S: Final = 10.0
_PID_FILE: Final = "restored.pid"


@dataclass(frozen=True, kw_only=True, slots=True)
class Criu:
    """A CRIU that is new enough.

    Attributes:
        path: of the program.
        version: major, minor, patch.
        libdir: an empty folder: where it is to look for plugins. Its own CUDA plugin would checkpoint a second time.
    """

    path: str
    version: tuple[int, int, int]
    libdir: str

    @property
    def can_dump_inet(self) -> bool:
        """Whether it can dump TCP and UDP sockets on this kernel."""
        return self.version >= _OLDEST_WITH_SOCKETS or linux.kernel_version() < _STRICT_SOCKETS


@dataclass(frozen=True, kw_only=True, slots=True)
class DumpOptions:
    """How a tree is dumped; each but the last three as CRIU's option of that name.

    Attributes:
        shell_job: the session it belongs to, or its terminal, is not in the tree.
        link_remap: files whose name is gone, but which have another, may be given one for the images.
        file_locks: there are locks.
        ext_unix_sk: sockets whose peer is not in the tree stay, without a peer.
        tcp_established: connections are kept, which blocks them until the restore.
        tcp_close: connections are closed in the process that is restored.
        leave_running: the tree goes on afterwards.
        external: what is not to be dumped because the restore is given it, such as `mnt[]`.
        root: the tree's root folder, of one in a mount namespace of its own.
        ghost_limit_bytes: how large a file without any name may be to be copied into the images; 0 for 1 MiB.
        manage_cgroups: `ignore`, so that a restored tree is in the control group of whoever restores it.
        timeout_s: how long it may take to stop all threads of the tree.
    """

    shell_job: bool = False
    link_remap: bool = False
    file_locks: bool = False
    ext_unix_sk: bool = False
    tcp_established: bool = False
    tcp_close: bool = False
    leave_running: bool = False
    external: tuple[str, ...] = ()
    root: str | None = None
    ghost_limit_bytes: int = 0
    manage_cgroups: str = "ignore"
    timeout_s: int = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoreOptions:
    """How a tree is restored; each as CRIU's option of that name unless said otherwise.

    Attributes:
        shell_job, file_locks, ext_unix_sk, tcp_established, tcp_close, manage_cgroups: as it was dumped.
        external: what CRIU is given for what was external, such as `mnt[]`.
        root: the folder that becomes the tree's root, for one dumped with a mount namespace of its own.
        inherit: descriptors of this process that stand for ones of the tree, as (descriptor, resource): see
            `resource_of`.
        sibling: the root becomes a child of whoever called, who then waits for it (`--restore-sibling`).
        lazy_pages: memory is filled in by a page server.
        leave_stopped: every process is stopped (SIGSTOP) once it is restored.
        join: namespaces to restore into, as `net:/run/netns/x`.
        empty_net: the network namespace is made anew and left empty.
    """

    shell_job: bool = False
    file_locks: bool = False
    ext_unix_sk: bool = False
    tcp_established: bool = False
    tcp_close: bool = False
    manage_cgroups: str = "ignore"
    external: tuple[str, ...] = ()
    root: str | None = None
    inherit: tuple[tuple[int, str], ...] = ()
    sibling: bool = False
    lazy_pages: bool = False
    leave_stopped: bool = False
    join: tuple[str, ...] = ()
    empty_net: bool = False


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
    """A folder for plugins that is empty and that only its owner, this user, may write to."""
    with contextlib.suppress(OSError):
        os.makedirs(_PLUGINS, mode=0o755, exist_ok=True)
        status = os.lstat(_PLUGINS)
        if status.st_uid == os.geteuid() and not status.st_mode & 0o022 and not os.listdir(_PLUGINS):
            return _PLUGINS
    return tempfile.mkdtemp(prefix="weightfs-no-criu-plugins-")


def options_for(processes: Sequence[Process]) -> DumpOptions:
    """How to dump a tree as it was found: only what it needs is allowed.

    Args:
        processes: the whole tree, root first.
    """
    inside = {one.pid for one in processes}
    descriptors = [one for process in processes for one in process.descriptors]
    mappings = [one for process in processes for one in process.mappings]
    return DumpOptions(
        shell_job=any(one.session not in inside for one in processes if not one.has_ended),
        link_remap=any(one.is_deleted for one in descriptors) or any(one.is_deleted for one in mappings),
        file_locks=any(one.locks for one in descriptors),
        ext_unix_sk=any(one.kind == "socket" for one in descriptors),
        tcp_close=any(one.kind == "socket" for one in descriptors),
    )


def dump_argv(criu: Criu, pid: int, images: str, options: DumpOptions, *, work: str | None = None) -> list[str]:
    """The command that dumps the tree of `pid` into the folder `images`; its log goes to `work`, or to `images`."""
    o = options
    argv = [*_common(criu, "dump", images, work), "--tree", str(pid), "--timeout", str(o.timeout_s)]
    argv += _switches(o)
    if o.link_remap:
        argv.append("--link-remap")
    if o.leave_running:
        argv.append("--leave-running")
    if o.ghost_limit_bytes > _DEFAULT_GHOST_BYTES:
        argv += ["--ghost-limit", str(o.ghost_limit_bytes)]
    return argv


def restore_argv(criu: Criu, images: str, options: RestoreOptions, *, work: str | None = None) -> list[str]:
    """The command that restores the tree in the folder `images` and returns once it runs, its pid in a file."""
    o = options
    argv = [*_common(criu, "restore", images, work), "--restore-detached", "--pidfile", _PID_FILE, *_switches(o)]
    for fd, resource in o.inherit:
        argv += ["--inherit-fd", f"fd[{fd}]:{resource}"]
    for namespace in o.join:
        argv += ["--join-ns", namespace]
    if o.sibling:
        argv.append("--restore-sibling")
    if o.lazy_pages:
        argv.append("--lazy-pages")
    if o.leave_stopped:
        argv.append("--leave-stopped")
    if o.empty_net:
        argv += ["--empty-ns", "net"]
    return argv


def _common(criu: Criu, command: Command, images: str, work: str | None) -> list[str]:
    argv = [criu.path, command, "--no-default-config", "--images-dir", images, "--work-dir", work or images]
    return [*argv, "--log-file", log_name(command), _VERBOSITY, "--libdir", criu.libdir]


def _switches(options: DumpOptions | RestoreOptions) -> list[str]:
    """What dump and restore must be told alike."""
    o = options
    argv = [f"--manage-cgroups={o.manage_cgroups}"]
    for wanted, switch in (
        (o.shell_job, "--shell-job"),
        (o.file_locks, "--file-locks"),
        (o.ext_unix_sk, "--ext-unix-sk"),
        (o.tcp_established, "--tcp-established"),
        (o.tcp_close, "--tcp-close"),
    ):
        if wanted:
            argv.append(switch)
    for resource in o.external:
        argv += ["--external", resource]
    if o.root is not None:
        argv += ["--root", o.root]
    return argv


def log_name(command: Command) -> str:
    """The log's name in the work folder."""
    return f"{command}.log"


def restore_options_of(options: DumpOptions) -> RestoreOptions:
    """How to restore what was dumped with these options."""
    return RestoreOptions(
        shell_job=options.shell_job,
        file_locks=options.file_locks,
        ext_unix_sk=options.ext_unix_sk,
        tcp_established=options.tcp_established,
        tcp_close=options.tcp_close,
        manage_cgroups=options.manage_cgroups,
        external=options.external,
        root=options.root,
    )


def dump(criu: Criu, pid: int, images: str, options: DumpOptions, timeout_s: float, *, work: str | None = None) -> None:
    """Write the tree of `pid` to the folder `images`; the tree ends, unless it is to be left running.

    When it fails, the tree goes on as it was.

    Args:
        criu: see `find_criu`.
        pid: the root.
        images: an existing, empty folder.
        options: see `options_for`.
        timeout_s: for all of it.
        work: an existing folder for `dump.log` and `stats-dump`; without, they are not kept.

    Raises:
        TargetError: something the process has can't be dumped: what, and what to do.
        CriuError: CRIU failed otherwise.
        RetryError: it took too long.
    """
    if start_ticks(pid) is None:
        raise TargetError(f"there is no process {pid}", mend="ps -e shows those there are")
    options = replace(options, timeout_s=max(1, min(options.timeout_s, int(timeout_s))))
    with _work_folder(work) as folder:
        _run("dump", dump_argv(criu, pid, images, options, work=folder), folder, timeout_s)


def restore(criu: Criu, images: str, options: RestoreOptions, timeout_s: float, *, work: str | None = None) -> int:
    """Bring back the tree in the folder `images`; gives the pid of its root, which runs (or is stopped, if asked for).

    When it fails, nothing of the tree is left.

    Args:
        criu: see `find_criu`.
        images: what `dump` wrote; nothing is written to it.
        options: see `restore_options_of`.
        timeout_s: for all of it.
        work: an existing folder for `restore.log` and `stats-restore`; without, they are not kept.

    Raises:
        CriuError: CRIU failed: why, and what to do.
        RetryError: a pid is taken, or it took too long.
    """
    with _work_folder(work) as folder:
        pid_file = os.path.join(folder, _PID_FILE)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(pid_file)
        inherited = [fd for fd, _ in options.inherit]
        _run("restore", restore_argv(criu, images, options, work=folder), folder, timeout_s, inherited)
        with open(pid_file) as file:
            return int(file.read())


@contextlib.contextmanager
def _work_folder(work: str | None) -> Iterator[str]:
    if work is not None:
        yield work
    else:
        with tempfile.TemporaryDirectory(prefix="weightfs-criu-") as folder:
            yield folder


def _run(command: Command, argv: list[str], work: str, timeout_s: float, inherited: Sequence[int] = ()) -> None:
    """Run CRIU to its end, or end it.

    Raises:
        CheckpointError: as the log has it.
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
        _, said = criu.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _end(criu, command)
        raise RetryError(
            f"CRIU did not {command} the process within {timeout_s:g} s", mend="give it more time"
        ) from None
    except BaseException:
        _end(criu, command)
        raise
    if criu.returncode:
        raise explain(_log(os.path.join(work, log_name(command)), said), command)


def _end(criu: subprocess.Popen[bytes], command: Command) -> None:
    """End CRIU, and what it has restored so far, which nobody else knows of.

    Of a dump nothing is left to undo: the code CRIU runs in the target gives up when its socket closes.
    """
    criu.send_signal(signal.SIGSTOP)
    restored = tree_of(criu.pid)[1:] if command == "restore" else ()
    criu.kill()
    for one in restored:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one.pid, signal.SIGKILL)
    criu.wait(_ENDING_S)
    if criu.stderr is not None:
        criu.stderr.close()


def _log(path: str, said: bytes) -> str:
    """The log, or what came on stderr where CRIU ended before it opened one."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return said.decode(errors="replace")
