"""The process that owns a mount, whoever serves it.

It holds what must not die with a daemon: the kernel's descriptor, the ledger, a descriptor of every open file. It
starts the daemon as its child and a second one beside it that has imported everything and waits. When the daemon dies,
or must be replaced, the other gets the word to go. One thread, no waiting but in `poll`, and nothing in it that parses
what a stranger wrote: it must not fail.

    daemon dies                 the standby goes at once; one that dies young is followed after a pause, 10 s at most
    daemon does not go round    SIGKILL after `stuck_s`; one that is not dead a second later (D state) is passed over
    `replace` on the socket     a candidate of the new version prepares; if it can, the daemon retires and it goes; then
                                this process becomes the new version's supervisor by exec, descriptors and all
    SIGTERM, SIGINT             the mount is taken away (lazily if it is in use), then everything ends; with a service
                                manager that keeps descriptors the mount stays, for the next start
    unmounted                   everything ends
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from weightfs import control, ledger, mounts, systemd
from weightfs.config import MountConfig
from weightfs.errors import BusyError, UnfitError, UsageError, WeightfsError
from weightfs.link import MOST_DESCRIPTORS, Link, Message

log = logging.getLogger(__name__)

HANDOFF_VERSION: Final = 1
_TICK_S: Final = 1.0
_REQUEST_S: Final = 5.0
_BATCH_S: Final = 0.01
_STUCK_TICKS: Final = 10
_DEAD_S: Final = 1.0  # after SIGKILL; longer is D state
_YOUNG_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 10.0
_STANDBY_AFTER_S: Final = 0.3
_PREPARE_S: Final = 30.0
_RETIRE_S: Final = 2.0
_BEGIN_S: Final = 90.0  # walking a damaged index takes 60 s at most
_LAZY_S: Final = 2.0
_END_S: Final = 1.5
_SUSPECT_DEATHS: Final = 2
"""Deaths in a row of daemons that had just begun: the index is walked before the next one maps it."""
_PASSED_ON: Final = frozenset({"PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV"})
_PREFIXES: Final = ("PYTHON", "LC_", "XDG_", "WEIGHTFS_", "COVERAGE_", "PYENV_")
_HANDED_OFF: Final = (
    "kernel_fd", "ledger_fd", "held", "child", "listener_fd", "control_fd", "mounted_at", "is_kept", "log_file",
)  # fmt: skip
_KERNEL_NAME: Final = "weightfs-kernel"
_LEDGER_NAME: Final = "weightfs-ledger"
_HELD_NAME: Final = "weightfs-held-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """How to start a version of weightfs.

    Attributes:
        interpreter: path of Python, with which `-m weightfs.cli...` is run.
        environment: of the daemons and of the supervisor it may become.
    """

    interpreter: str
    environment: Mapping[str, str]

    @classmethod
    def own(cls) -> Version:
        """The one that runs now."""
        return cls(interpreter=sys.executable, environment=_for_children(os.environ))


def _for_children(environment: Mapping[str, str]) -> dict[str, str]:
    """What a daemon needs of an environment: it is written down and sent, and secrets have no business in it."""
    return {name: value for name, value in environment.items() if name in _PASSED_ON or name.startswith(_PREFIXES)}


@dataclass(slots=True, eq=False)
class _Child:
    """A daemon: candidate, standby, serving or ending."""

    pid: int
    pidfd: int
    link: Link
    version: Version
    settings: MountConfig
    process: subprocess.Popen[bytes] | None = None
    prepared: bool = False
    went_at: float | None = None
    served_at: float | None = None
    error: dict[str, Any] | None = None
    since: float = field(default_factory=time.monotonic)


class Supervisor:
    """One mount's owner.

    Args:
        settings: of the mount.
        said: called once with the mount document, or with an `error`.
        log_file: where daemons log; None is stderr.

    Attributes:
        settings: of the mount, as it is served now.
        log_file: see above.
    """

    def __init__(
        self, settings: MountConfig, said: Callable[[dict[str, Any]], None], log_file: str | None = None
    ) -> None:
        self.settings = settings
        self._said = said
        self.log_file = log_file
        self._version = Version.own()
        self._kernel_fd = -1
        self._ledger_fd = -1
        self._held: dict[int, int] = {}
        self._serving: _Child | None = None
        self._standby: _Child | None = None
        self._candidate: _Child | None = None
        self._passed_over: list[_Child] = []
        self._listener: socket.socket | None = None
        self._control: socket.socket | None = None
        self._client: socket.socket | None = None
        self._poll = select.poll()
        self._on: dict[int, Callable[[], None]] = {}
        self._timers: dict[str, tuple[float, Callable[[], None]]] = {}
        self._resends = True
        self._early_deaths = 0
        self._beats = (0, 0)
        self._mounted_at = time.monotonic()
        self._is_mounted = False
        self._is_kept = bool(os.environ.get("WEIGHTFS_FD_STORE")) and bool(os.environ.get("NOTIFY_SOCKET"))
        self._is_known_clean = False
        self._ends: int | None = None
        self._become: Version | None = None

    # Life

    def run(self) -> int:
        """Mount, or take over what the service manager kept, and serve until the end; gives the exit status.

        Raises:
            WeightfsError: it could not be mounted.
        """
        self._catch_signals()
        if not self._take_kept():
            self._ledger_fd = ledger.create()
            try:
                mounts.clear_stale(self.settings.mountpoint)
                self._kernel_fd = mounts.mount(
                    self.settings.source, self.settings.mountpoint, for_others=self.settings.for_others
                )
            except WeightfsError as e:
                self._say_error(e)
                return e.exit_code
            if self._is_kept:
                systemd.keep(_KERNEL_NAME, self._kernel_fd)
                systemd.keep(_LEDGER_NAME, self._ledger_fd)
        self._is_mounted = True
        return self._loop()

    def _loop(self) -> int:
        self._listen()
        self._after("tick", _TICK_S, self._tick)
        if self._serving is None:
            self._promote()
        while self._ends is None:
            try:
                self._turn()
            except Exception:
                log.exception("the supervisor goes on after")
                time.sleep(0.1)  # what failed may be tried again at once
        return self._ends

    def _turn(self) -> None:
        due = min((at for at, _ in self._timers.values()), default=time.monotonic() + 60)
        for fd, _ in self._poll.poll(max(0.0, due - time.monotonic()) * 1000):
            if (handler := self._on.get(fd)) is not None and self._ends is None:
                handler()
        now = time.monotonic()
        for name in [name for name, (at, _) in self._timers.items() if at <= now]:
            _, call = self._timers.pop(name)
            if self._ends is None:
                call()

    def _watch(self, fd: int, call: Callable[[], None]) -> None:
        self._on[fd] = call
        self._poll.register(fd, select.POLLIN)

    def _unwatch(self, fd: int) -> None:
        if self._on.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def _after(self, name: str, seconds: float, call: Callable[[], None]) -> None:
        self._timers[name] = time.monotonic() + seconds, call

    def _catch_signals(self) -> None:
        outlet, inlet = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(inlet, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

        def come() -> None:
            numbers = os.read(outlet, 64)
            if signal.SIGTERM in numbers or signal.SIGINT in numbers:
                self._stop()

        self._watch(outlet, come)

    # Daemons

    def _start(self, version: Version, settings: MountConfig) -> _Child:
        link, theirs = Link.pair()
        with theirs:
            fds = [theirs.fileno(), self._kernel_fd, self._ledger_fd]
            fds += [self._control.fileno()] if self._control is not None else []
            process = subprocess.Popen(
                [version.interpreter, "-P", "-m", "weightfs.cli.daemon", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=fds,
                env=dict(version.environment),
                start_new_session=True,
                cwd="/",
            )
        child = _Child(process.pid, os.pidfd_open(process.pid), link, version, settings, process)
        link.say(
            {
                "start": {
                    "settings": dataclasses.asdict(settings),
                    "kernel_fd": self._kernel_fd,
                    "ledger_fd": self._ledger_fd,
                    "control_fd": self._control.fileno() if self._control is not None else None,
                    "log_file": self.log_file,
                }
            }
        )
        self._watch_child(child)
        return child

    def _watch_child(self, child: _Child) -> None:
        self._watch(child.link.fileno(), lambda: self._hear(child))
        self._watch(child.pidfd, lambda: self._died(child))

    def _hear(self, child: _Child) -> None:
        link, holdings = child.link.fileno(), False
        while True:
            try:
                message = child.link.receive()
            except BlockingIOError:
                break
            if message is None:  # its end is told by the pidfd
                self._unwatch(link)
                return
            holdings |= message.words is None
            self._obey(child, message)
        if holdings:  # more will come, one with each open; in the socket they are safe
            self._unwatch(link)
            self._after(f"hear-{child.pid}", _BATCH_S, lambda: self._watch(link, lambda: self._hear(child)))

    def _obey(self, child: _Child, message: Message) -> None:
        if message.hold is not None:
            for fd in message.fds:
                self._drop(message.hold)
                self._held[message.hold] = fd
        elif message.drop is not None:
            self._drop(message.drop)
        elif message.words is not None:
            if "prepared" in message.words:
                child.prepared = True
                if child is self._candidate:
                    self._replace_now()
                elif child is self._serving:
                    self._go(child)
            elif "serving" in message.words:
                self._serves(child, message.words)
            elif "error" in message.words:
                child.error = message.words["error"]

    def _drop(self, inode: int) -> None:
        if (fd := self._held.pop(inode, None)) is not None:
            os.close(fd)

    def _promote(self) -> None:
        """Have the standby serve, or a new daemon where there is none; it goes as soon as it is prepared."""
        child, self._standby = self._standby, None
        if child is None or child.version != self._version or child.settings != self.settings:
            self._dismiss(child)
            child = self._start(self._version, self.settings)
        self._serving = child
        if child.prepared:
            self._go(child)

    def _succeed(self) -> None:
        """Nobody serves: the candidate goes, or else the standby."""
        if self._candidate is not None and self._candidate.prepared:
            self._serving, self._candidate = self._candidate, None
            self._go(self._serving)
        else:
            self._promote()

    def _go(self, child: _Child) -> None:
        if child.went_at is not None:
            return
        child.went_at = time.monotonic()
        self._beats = (0, 0)
        inodes = list(self._held)
        for start in range(0, len(inodes), MOST_DESCRIPTORS):
            part = inodes[start : start + MOST_DESCRIPTORS]
            child.link.say({"held": part}, [self._held[inode] for inode in part])
        child.link.say({
            "go": {
                "check_index": not self._is_known_clean or self._early_deaths >= _SUSPECT_DEATHS,
                "kept_by_manager": self._is_kept,
                "mounted_at": self._mounted_at,
            }
        })  # fmt: skip
        self._flush(child)

    def _flush(self, child: _Child) -> None:
        if not child.link.flush():
            self._after(f"flush-{child.pid}", 0.005, lambda: self._flush(child))

    def _serves(self, child: _Child, words: dict[str, Any]) -> None:
        child.served_at = time.monotonic()
        self._is_known_clean = True
        self._resends = words["resends"]
        document = words["serving"]
        systemd.notify("READY=1")
        log.info("daemon %d serves", child.pid)
        self._said(document)
        self._said = lambda _: None
        if self._client is not None:
            self._answer({"serving": document})
            self._become = child.version
            self._after("become", 0, self._become_version)
        self._after("standby", _STANDBY_AFTER_S, self._have_standby)

    def _have_standby(self) -> None:
        if self._standby is None and self._candidate is None and self._resends:
            self._standby = self._start(self._version, self.settings)

    def _died(self, child: _Child) -> None:
        self._hear(child)  # what it said last
        self._unwatch(child.pidfd)
        self._unwatch(child.link.fileno())
        status = _reap(child)
        os.close(child.pidfd)
        child.link.close()
        for name in ("flush", "hear"):
            self._timers.pop(f"{name}-{child.pid}", None)
        if child in self._passed_over:
            self._passed_over.remove(child)
        if child is self._standby:
            self._standby = None
            log.warning("the standby daemon %d ended with %s%s", child.pid, status, _because(child))
            self._after("standby", _LONGEST_PAUSE_S, self._have_standby)
        elif child is self._candidate:
            self._candidate = None
            log.warning("the candidate %d ended with %s%s", child.pid, status, _because(child))
            error = child.error or {"code": "failed", "message": f"the new version ended with {status}"}
            self._answer({"error": error})
            self._have_standby()
        elif child is self._serving:
            self._serving = None
            self._serving_died(child, status)

    def _serving_died(self, child: _Child, status: str) -> None:
        if not self._is_mounted or _is_dead(self._kernel_fd):
            self._finish(0)
            return
        if self._candidate is not None and self._candidate.prepared:  # it retired
            self._succeed()
            return
        served = child.served_at is not None
        if not served and (not self._is_known_clean or self._client is not None):
            error = child.error or {"code": "failed", "message": f"the daemon ended with {status} before it served"}
            if self._client is not None and self._is_known_clean:  # the new version can't: the old one goes on
                self._answer({"error": error})
            elif child.error is not None or self._early_deaths >= _SUSPECT_DEATHS:
                self._give_up(error)
                return
        log.warning("daemon %d ended with %s%s", child.pid, status, _because(child))
        if not self._resends:
            message = "the daemon died, and this kernel can't send again what it had not answered: the mount ends"
            log.error("%s", message)
            self._give_up({"code": "failed", "message": message})
            return
        is_young = child.served_at is None or time.monotonic() - child.served_at < _YOUNG_S
        self._early_deaths = self._early_deaths + 1 if is_young else 0
        pause = min(0.1 * 2 ** (self._early_deaths - 2), _LONGEST_PAUSE_S) if self._early_deaths > 1 else 0.0
        if pause:
            log.warning("%d daemons died young: the next goes in %.1f s", self._early_deaths, pause)
        self._after("promote", pause, self._promote)

    def _dismiss(self, child: _Child | None) -> None:
        """End a daemon that does not serve."""
        if child is not None:
            self._passed_over.append(child)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)

    def _reap_dismissed(self) -> None:
        for child in self._passed_over:
            waiting = select.poll()
            waiting.register(child.pidfd, select.POLLIN)
            waiting.poll(200)  # in D state it takes longer, and is left to whoever reaps orphans
            _reap(child)

    # A daemon that does not go round

    def _tick(self) -> None:
        self._after("tick", _TICK_S, self._tick)
        child = self._serving
        if child is None:
            if _is_dead(self._kernel_fd):
                self._finish(0)
            elif "promote" not in self._timers:  # a daemon could not be started
                self._after("promote", 0, self._promote)
            return
        if child.served_at is None:
            if time.monotonic() - (child.went_at or child.since) > _BEGIN_S:
                log.error("daemon %d does not begin to serve: it is killed", child.pid)
                self._kill(child)
            return
        beat = ledger.heartbeat(self._ledger_fd)
        last, missed = self._beats
        # Counted in rounds of our own: a machine that slept, or gave us no time, gave it none either.
        self._beats = (beat, missed + 1 if beat == last else 0)
        if self._beats[1] >= _STUCK_TICKS:
            log.error("daemon %d has not gone round for %d s: it is killed", child.pid, _STUCK_TICKS)
            self._kill(child)

    def _kill(self, child: _Child) -> None:
        self._beats = (0, 0)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(child.pidfd, signal.SIGKILL)

        def pass_over() -> None:
            if self._serving is child:
                log.error("daemon %d does not die: it is passed over", child.pid)
                self._passed_over.append(child)
                self._serving = None
                self._succeed()

        self._after("pass-over", _DEAD_S, pass_over)

    # Replacement

    def _listen(self) -> None:
        try:
            if self._listener is None:
                self._listener = control.bind(self.settings.supervisor_socket, None)
            if self._control is None:
                self._control = control.bind(self.settings.control_socket, self.settings.control_group)
        except BusyError:  # another mount of this very mountpoint has them
            log.warning("no --replace and no control: somebody listens at %s", self.settings.supervisor_socket)
        if self._listener is not None:
            self._listener.setblocking(False)
            self._watch(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        said = bytearray()
        self._watch(connection.fileno(), lambda: self._asked(connection, said))
        self._after(f"asked-{connection.fileno()}", _REQUEST_S, lambda: self._hang_up(connection))

    def _hang_up(self, connection: socket.socket) -> None:
        self._unwatch(connection.fileno())
        self._timers.pop(f"asked-{connection.fileno()}", None)
        connection.close()

    def _asked(self, connection: socket.socket, said: bytearray) -> None:
        part = connection.recv(1 << 16)
        said += part
        if not part or len(said) > control.LONGEST_REQUEST_BYTES:
            self._hang_up(connection)
        if not said.endswith(b"\n"):
            return
        self._unwatch(connection.fileno())
        self._timers.pop(f"asked-{connection.fileno()}", None)
        try:
            request = json.loads(said)
            settings = MountConfig(**request["settings"])
            version = Version(interpreter=request["interpreter"], environment=_for_children(request["environment"]))
        except (ValueError, TypeError, KeyError, AttributeError, WeightfsError) as e:
            error = UsageError(f"the running version does not understand the request: {e!r}")
            _reply(connection, {"error": control.error_document(error)})
            return
        refusal = self._refusal(settings)
        if refusal is not None:
            _reply(connection, {"error": control.error_document(refusal)})
            return
        self._client = connection
        log.info("a new version is to take over: %s", version.interpreter)
        self._dismiss(self._standby)
        self._standby = None
        self._candidate = self._start(version, settings)
        self._after("candidate", _PREPARE_S, self._candidate_late)

    def _refusal(self, settings: MountConfig) -> WeightfsError | None:
        if self._client is not None or self._candidate is not None:
            return BusyError("it is being replaced already", path=self.settings.mountpoint)
        if self._serving is None or self._serving.served_at is None:
            return BusyError("its daemon is not up at this moment", path=self.settings.mountpoint)
        for name in ("source", "mountpoint", "state_folder", "for_others"):
            if getattr(settings, name) != getattr(self.settings, name):
                return UnfitError(
                    f"the running mount has another {name.replace('_', ' ')}: {getattr(self.settings, name)}",
                    path=self.settings.mountpoint,
                    mend="umount it, then mount again",
                )
        return None

    def _candidate_late(self) -> None:
        if self._candidate is not None and not self._candidate.prepared:
            self._candidate.error = {
                "code": "busy",
                "message": f"was not prepared within {_PREPARE_S:g} s",
                "exit_code": 75,
            }
            self._kill(self._candidate)

    def _replace_now(self) -> None:
        self._timers.pop("candidate", None)
        retiring = self._serving
        if retiring is None:  # it died meanwhile
            self._timers.pop("promote", None)
            self._succeed()
            return
        retiring.link.say({"retire": {}})
        self._after("retire", _RETIRE_S, lambda: self._kill(retiring) if self._serving is retiring else None)

    def _answer(self, document: dict[str, Any]) -> None:
        if self._client is not None:
            _reply(self._client, document)
            self._client = None

    def _become_version(self) -> None:
        """Go on as the supervisor of the version that serves now, unless that can't take over."""
        version, self._become = self._become, None
        serving = self._serving
        if version is None or serving is None:
            return
        self._version, self.settings = version, serving.settings
        self._dismiss(self._standby)
        self._standby = None
        self._reap_dismissed()
        document = {
            "version": HANDOFF_VERSION,
            "settings": dataclasses.asdict(self.settings),
            "kernel_fd": self._kernel_fd,
            "ledger_fd": self._ledger_fd,
            "held": list(self._held.items()),
            "child": {"pid": serving.pid, "link_fd": serving.link.fileno(), "went_at": serving.went_at},
            "listener_fd": self._listener.fileno() if self._listener is not None else None,
            "control_fd": self._control.fileno() if self._control is not None else None,
            "log_file": self.log_file,
            "mounted_at": self._mounted_at,
            "is_kept": self._is_kept,
        }
        handoff = os.memfd_create("weightfs-handoff", 0)
        os.write(handoff, json.dumps(document).encode())
        command = [version.interpreter, "-P", "-m", "weightfs.cli.supervise"]
        environment = {**version.environment, **{k: v for k, v in os.environ.items() if k in ("NOTIFY_SOCKET",)}}
        examined = subprocess.run(
            [*command, "--examine", str(handoff)], env=environment, pass_fds=[handoff], cwd="/", check=False
        )
        if examined.returncode:
            log.error("the new version's supervisor can't go on from this one: it stays, the new daemon serves")
            os.close(handoff)
            self._have_standby()
            return
        listeners = [listener.fileno() for listener in (self._listener, self._control) if listener is not None]
        kept = [self._kernel_fd, self._ledger_fd, serving.link.fileno(), *listeners, *self._held.values()]
        for fd in kept:
            os.set_inheritable(fd, True)
        log.info("becomes %s", version.interpreter)
        try:
            os.execve(version.interpreter, [*command, "--resume", str(handoff)], environment)
        except OSError as e:
            log.error("could not become it: %s", e.strerror)
            os.close(handoff)
            self._have_standby()

    # The end

    def _stop(self) -> None:
        if not self._is_mounted:
            return
        systemd.notify("STOPPING=1")
        if self._is_kept:
            self._leave_to_manager()
            return
        log.info("ends on a signal")
        lazily = self._unmount()
        # Whoever has files open gets some time; what the kernel reads by itself goes on even after.
        self._after("end", _LAZY_S if lazily else _END_S, self._end_daemons)

    def _leave_to_manager(self) -> None:
        """The service manager keeps the mount for whom it starts next."""
        for inode, fd in self._held.items():
            systemd.keep(f"{_HELD_NAME}{inode:x}", fd)
        self._is_mounted = False
        self._dismiss(self._standby)
        if self._serving is None:
            self._finish(0)
            return
        self._serving.link.say({"retire": {}})
        self._after("end", _RETIRE_S, self._end_daemons)

    def _take_kept(self) -> bool:
        """Go on with what the service manager kept, if that still is a mount."""
        kept = systemd.kept(os.environ, os.getpid())
        kernel, book = kept.pop(_KERNEL_NAME, None), kept.pop(_LEDGER_NAME, None)
        held = {int(name[len(_HELD_NAME) :], 16): fd for name, fd in kept.items() if name.startswith(_HELD_NAME)}
        for name in (_KERNEL_NAME, _LEDGER_NAME) if kernel is None or book is None else ():
            systemd.discard(name)
        for inode in held:
            systemd.discard(f"{_HELD_NAME}{inode:x}")
        if kernel is None or book is None:
            return False
        if _is_dead(kernel) or mounts.find(self.settings.mountpoint) is None:
            for name in (_KERNEL_NAME, _LEDGER_NAME):
                systemd.discard(name)
            for fd in (kernel, book, *held.values()):
                os.close(fd)
            return False
        self._kernel_fd, self._ledger_fd, self._held = kernel, book, held
        self._is_known_clean = True
        return True

    def _unmount(self) -> bool:
        """Take the mountpoint away, once; gives whether that had to be done lazily."""
        self._is_mounted = False
        if mounts.find(self.settings.mountpoint) is None:
            return False
        try:
            mounts.unmount(self.settings.mountpoint)
        except WeightfsError:
            with contextlib.suppress(WeightfsError):
                mounts.unmount(self.settings.mountpoint, lazy=True)
            return True
        return False

    def _end_daemons(self) -> None:
        serving = self._serving
        if serving is None:
            self._finish(0)
            return
        serving.link.say({"retire": {}})
        self._after("end", _END_S, lambda: self._kill_and_finish(serving))

    def _kill_and_finish(self, serving: _Child) -> None:
        self._dismiss(serving)
        self._finish(0)

    def _give_up(self, error: dict[str, Any]) -> None:
        self._unmount()
        self._finish(int(error.get("exit_code", 1)))
        self._said({"error": error})

    def _finish(self, status: int) -> None:
        for child in (self._standby, self._candidate):
            self._dismiss(child)
        self._reap_dismissed()
        self._answer({"error": {"code": "failed", "message": "the mount has ended"}})
        for listener, path in (
            (self._listener, self.settings.supervisor_socket),
            (self._control, self.settings.control_socket),
        ):
            if listener is not None:
                with contextlib.suppress(OSError):
                    os.unlink(path)
        if self._is_kept and not mounts.find(self.settings.mountpoint):
            systemd.discard(_KERNEL_NAME)
            systemd.discard(_LEDGER_NAME)
        self._ends = status

    def _say_error(self, error: WeightfsError) -> None:
        log.error("%s", error)
        self._said({"error": control.error_document(error)})

    # Going on after exec

    @classmethod
    def resume(cls, handoff: int) -> Supervisor:
        """The supervisor that a predecessor described before it became this process."""
        document = _read_handoff(handoff)
        self = cls(MountConfig(**document["settings"]), lambda _: None, document["log_file"])
        self._kernel_fd, self._ledger_fd = document["kernel_fd"], document["ledger_fd"]
        self._held = {int(inode): fd for inode, fd in document["held"]}
        self._mounted_at = document["mounted_at"]
        self._is_kept = document["is_kept"]
        self._is_mounted = self._is_known_clean = True
        self._listener, self._control = (
            socket.socket(fileno=document[key]) if document[key] is not None else None
            for key in ("listener_fd", "control_fd")
        )
        told = document["child"]
        link = Link(socket.socket(fileno=told["link_fd"]))
        listeners = [listener.fileno() for listener in (self._listener, self._control) if listener is not None]
        for fd in (self._kernel_fd, self._ledger_fd, link.fileno(), *listeners, *self._held.values()):
            os.set_inheritable(fd, False)
        child = _Child(told["pid"], os.pidfd_open(told["pid"]), link, self._version, self.settings, prepared=True)
        child.went_at = child.served_at = told["went_at"]
        self._serving = child
        self._catch_signals()
        self._watch_child(child)
        self._after("standby", _STANDBY_AFTER_S, self._have_standby)
        return self

    def run_on(self) -> int:
        """After `resume`: serve until the end; gives the exit status."""
        return self._loop()


def _read_handoff(fd: int) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
    if document["version"] != HANDOFF_VERSION:
        raise UnfitError(f"the running supervisor's handoff has version {document['version']}")
    return document


def examine(handoff: int) -> None:
    """Whether `resume` could go on from this, changing nothing.

    Raises:
        WeightfsError, ValueError, TypeError, KeyError: it could not.
    """
    document = _read_handoff(handoff)
    MountConfig(**document["settings"])
    for key in (
        "kernel_fd",
        "ledger_fd",
        "held",
        "child",
        "listener_fd",
        "control_fd",
        "mounted_at",
        "is_kept",
        "log_file",
    ):
        document[key]


def _is_dead(kernel_fd: int) -> bool:
    poll = select.poll()
    poll.register(kernel_fd, 0)
    return bool(poll.poll(0))


def _reap(child: _Child) -> str:
    """How a child that has ended did; it is waited for by its pid, since exec may have lost its `Popen`."""
    try:
        pid, status = os.waitpid(child.pid, os.WNOHANG)
    except ChildProcessError:
        return "an unknown status"
    if child.process is not None:
        child.process.returncode = 0
    code = os.waitstatus_to_exitcode(status) if pid else 0
    return f"signal {-code}" if code < 0 else f"status {code}"


def _because(child: _Child) -> str:
    return f": {child.error['message']}" if child.error else ""


def _reply(connection: socket.socket, document: dict[str, Any]) -> None:
    with connection, contextlib.suppress(OSError):
        connection.send(json.dumps(document).encode() + b"\n")


def ask_to_replace(settings: MountConfig, timeout_s: float) -> dict[str, Any]:
    """Ask a mount's supervisor to have this version take over; gives the mount document.

    Raises:
        WeightfsError: it refused, and why, and the running mount goes on; or nobody could be asked.
        BusyError: it did not answer in time.
    """
    version = Version.own()
    request = {
        "command": "replace",
        "settings": dataclasses.asdict(settings),
        "interpreter": version.interpreter,
        "environment": dict(version.environment),
    }
    return dict(control.ask(settings.supervisor_socket, request, timeout_s)["serving"])
