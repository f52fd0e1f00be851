"""What CRIU is asked: its command lines, made from options that follow from what a tree has open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from checkpoint.errors import CorruptError
from checkpoint.processes import Process, namespaces_of
from weightfs import linux

if TYPE_CHECKING:
    from checkpoint.sockets import Socket

Command = Literal["dump", "restore"]

PID_FILE: Final = "restored.pid"
"""Where a restore leaves the pid of the root, in the work folder."""

GHOST_LIMIT_BYTES: Final = 1 << 30
"""The largest file without a name that is copied into the images."""

OWN_MOUNTS: Final = "mnt[]:sm"
"""Each mount that is there outside of the tree's mount namespace too is taken from there, however it propagates."""

ROOT_TO_BE_NAMED: Final = ""
"""`RestoreOptions.root` of a tree whose root folder is a filesystem of its own, which lies elsewhere each time."""

_OLDEST_WITH_SOCKETS: Final = (4, 2, 0)
_STRICT_SOCKETS: Final = (6, 16)
"""getsockopt(SO_PASSCRED) fails since then for all but a few families of sockets; older CRIUs ask it of every one."""
_VERBOSITY: Final = "-v4"
"""The lowest at which the log says which descriptor and which mapping it is busy with."""
_DEFAULT_GHOST_BYTES: Final = 1 << 20


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
    """How a tree is dumped.

    Attributes:
        shell_job: the session it belongs to, or its terminal, is not in the tree.
        link_remap: files whose name is gone, but which have another, may be given one for the images.
        file_locks: there are locks.
        ext_unix_sk: sockets whose peer is not in the tree stay, without a peer.
        tcp_established: connections are kept, which blocks them until the restore.
        tcp_close: connections are closed in the process that is restored.
        skip_in_flight: connections that were not accepted yet are left out.
        network_lock: what is sent to the tree is held back, by nftables: the other way needs the program
            iptables-restore. Only where it is needed, since it takes CRIU 0.4 s to set nftables up.
        leave_running: the tree goes on afterwards.
        leave_stopped: it is stopped afterwards (SIGSTOP); without either it ends.
        external: what is not dumped because the restore is given it: `OWN_MOUNTS`, and what `Attachment` tells of.
        ghost_limit_bytes: how large a file without any name may be to be copied into the images; 0 for 1 MiB.
        timeout_s: how long it may take to stop all threads of the tree.
    """

    shell_job: bool = False
    link_remap: bool = False
    file_locks: bool = False
    ext_unix_sk: bool = False
    tcp_established: bool = False
    tcp_close: bool = False
    skip_in_flight: bool = False
    network_lock: bool = False
    leave_running: bool = False
    leave_stopped: bool = False
    external: tuple[str, ...] = ()
    ghost_limit_bytes: int = 0
    timeout_s: int = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoreOptions:
    """How a tree is restored.

    Attributes:
        shell_job, file_locks, ext_unix_sk, tcp_established, tcp_close: as it was dumped.
        external: `OWN_MOUNTS`, for a tree dumped with it.
        root: the folder that becomes the root of a tree in a mount namespace of its own.
        inherit: descriptors of this process that stand for ones of the tree, as (descriptor, resource): see
            `checkpoint.attachments`. What was external in the dump, mounts apart, must be among them.
        sibling: the root becomes a child of whoever called, who then waits for it (`--restore-sibling`).
        lazy_pages: memory is filled in by a page server.
        leave_stopped: every process is stopped (SIGSTOP) once it is restored.
        enter: the command before CRIU's that has it run in other namespaces; the pid it tells is one in there.
    """

    shell_job: bool = False
    file_locks: bool = False
    ext_unix_sk: bool = False
    tcp_established: bool = False
    tcp_close: bool = False
    external: tuple[str, ...] = ()
    root: str | None = None
    inherit: tuple[tuple[int, str], ...] = ()
    sibling: bool = False
    lazy_pages: bool = False
    leave_stopped: bool = False
    enter: tuple[str, ...] = ()


def options_for(processes: Sequence[Process], sockets: Mapping[int, Socket] | None = None) -> DumpOptions:
    """How to dump a tree as it was found: only what it needs is allowed.

    Connections are kept (`tcp_established`) where all of them have both ends in the tree, else closed: nobody outside
    would wait for the restore.

    Args:
        processes: the whole tree, root first.
        sockets: of the tree; without, they are looked at now.
    """
    # Only a dump needs them, and a restore is not to wait for them.
    from checkpoint.attachments import attachments_of
    from checkpoint.sockets import outside_peers, sockets_of

    if sockets is None:
        sockets = sockets_of(processes)
    inside = {one.pid for one in processes}
    running = [one for one in processes if not one.has_ended]
    descriptors = [one for process in running for one in process.descriptors]
    mappings = [one for process in running for one in process.mappings]
    connected = any(one.family == "tcp" and one.state == "established" for one in sockets.values())
    outside = outside_peers(processes, sockets)
    closes = any(one.family == "tcp" for one in outside)
    ghosts = [one.size for one in descriptors if one.is_deleted]
    ghosts += [one.offset + one.nbytes for one in mappings if one.is_deleted]
    own = namespaces_of("self")
    has_own_net = any(one.namespaces.get("net") != own.get("net") for one in running)
    external = [one.external for one in attachments_of(running, sockets) if one.external is not None]
    if running and running[0].namespaces.get("mnt") != own.get("mnt"):
        external.insert(0, OWN_MOUNTS)
    return DumpOptions(
        shell_job=any(one.session not in inside for one in running),
        link_remap=bool(ghosts),
        file_locks=any(one.locks for one in descriptors),
        ext_unix_sk=any(one.family == "unix" for one in outside),
        tcp_established=connected and not closes,
        tcp_close=closes,
        skip_in_flight=any(one.family == "tcp" and one.state == "listening" for one in sockets.values()),
        network_lock=has_own_net or (connected and not closes),
        external=tuple(external),
        ghost_limit_bytes=min(max(ghosts, default=0), GHOST_LIMIT_BYTES),
    )


def dump_argv(criu: Criu, pid: int, images: str, options: DumpOptions, *, work: str | None = None) -> list[str]:
    """The command that dumps the tree of `pid` into the folder `images`; its log goes to `work`, or to `images`."""
    o = options
    argv = [*_common(criu, "dump", images, work), "--tree", str(pid), "--timeout", str(o.timeout_s)]
    argv += _switches(o)
    if o.network_lock:
        argv += ["--network-lock", "nftables"]
    if o.skip_in_flight:
        argv.append("--skip-in-flight")
    if o.link_remap:
        argv.append("--link-remap")
    if o.leave_running:
        argv.append("--leave-running")
    if o.leave_stopped:
        argv.append("--leave-stopped")
    if o.ghost_limit_bytes > _DEFAULT_GHOST_BYTES:
        argv += ["--ghost-limit", str(o.ghost_limit_bytes)]
    return argv


def restore_argv(criu: Criu, images: str, options: RestoreOptions, *, work: str | None = None) -> list[str]:
    """The command that restores the tree in the folder `images` and returns once it runs, its pid in a file."""
    o = options
    argv = [
        *o.enter,
        *_common(criu, "restore", images, work),
        "--restore-detached",
        "--pidfile",
        PID_FILE,
        *_switches(o),
    ]
    for fd, resource in o.inherit:
        argv += ["--inherit-fd", f"fd[{fd}]:{resource}"]
    if o.root is not None:
        argv += ["--root", o.root]
    if o.sibling:
        argv.append("--restore-sibling")
    if o.lazy_pages:
        argv.append("--lazy-pages")
    if o.leave_stopped:
        argv.append("--leave-stopped")
    return argv


def _common(criu: Criu, command: Command, images: str, work: str | None) -> list[str]:
    argv = [criu.path, command, "--no-default-config", "--images-dir", images, "--work-dir", work or images]
    return [*argv, "--log-file", log_name(command), _VERBOSITY, "--libdir", criu.libdir]


def _switches(options: DumpOptions | RestoreOptions) -> list[str]:
    """What dump and restore must be told alike."""
    o = options
    argv = ["--manage-cgroups=ignore"]  # a restored tree is in the control group of whoever restores it
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
        external=tuple(one for one in options.external if one == OWN_MOUNTS),
        root="/" if OWN_MOUNTS in options.external else None,
    )


def options_kept(kept: dict[str, Any]) -> RestoreOptions:
    """What `criu_options` of a manifest stand for; options of a later version are left out.

    Raises:
        CorruptError: they are none.
    """
    try:
        return msgspec.convert(kept, RestoreOptions)
    except msgspec.ValidationError as e:
        raise CorruptError(f"holds CRIU options that are none: {e}", path="manifest.json") from e
