"""Decides who serves a mount.

It starts the daemon as its child, and a second one beside it that has imported everything and waits. When the daemon
dies, or must be replaced, the other gets the word to go. One thread, no waiting but in `poll` (and half a second where
a version is examined), and nothing in it that parses what a stranger wrote: it must not fail.

    daemon dies                 the standby goes at once; one that dies young is followed after a pause, 10 s at most
    daemon does not go round    SIGKILL after 10 s; one that is not dead a second later (D state) is passed over
    `replace` on the socket     a candidate of the new version prepares; if it can, the daemon retires and it goes; then
                                this process becomes the new version's supervisor by exec, descriptors and all
    SIGTERM, SIGINT             the mount is taken away (lazily if it is in use), then everything ends; with a service
                                manager that keeps descriptors the mount stays, for the next start
    unmounted                   everything ends
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from weightfs import control, ledger, mounts, systemd
from weightfs.config import MountConfig
from weightfs.errors import BusyError, UnfitError, WeightfsError
from weightfs.link import Message
from weightfs.supervision import replacement
from weightfs.supervision.daemon import Daemon, Version
from weightfs.supervision.estate import Estate
from weightfs.supervision.loop import Loop

log = logging.getLogger(__name__)

_TICK_S: Final = 1.0
_BATCH_S: Final = 0.01
_STUCK_TICKS: Final = 10
_DEAD_S: Final = 1.0  # after SIGKILL; longer is D state
_YOUNG_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 10.0
_STANDBY_AFTER_S: Final = 1.0  # not while the first programs start, which need the processors
_PREPARE_S: Final = 30.0
_RETIRE_S: Final = 2.0
_CHECK_S: Final = 90.0  # walking a damaged index takes 60 s at most
_ENDING: Final = frozenset({signal.SIGTERM, signal.SIGINT})
_LAZY_S: Final = 2.0
_END_S: Final = 1.5
_SUSPECT_DEATHS: Final = 2
"""Deaths in a row of daemons that had just begun: the index is walked before the next one maps it."""

Said = Callable[[Mapping[str, Any]], None]


class Supervisor:
    """One mount's owner.

    Args:
        settings: of the mount.
        said: called once with the mount document, or with an `error`.
        log_file: where daemons log; None is stderr.

    Attributes:
        settings: see above.
        log_file: see above.
    """

    def __init__(self, settings: MountConfig, said: Said, log_file: str | None = None) -> None:
        self.settings = settings
        self.log_file = log_file
        self._said = said
        self._version = Version.own(dataclasses.asdict(settings))
        self._loop = Loop()
        self._serving: Daemon | None = None
        self._standby: Daemon | None = None
        self._candidate: Daemon | None = None
        self._dismissed: list[Daemon] = []
        self._unreaped: list[Daemon] = []
        self._client: socket.socket | None = None
        self._resends = True
        self._early_deaths = 0
        self._beats = (0, 0)
        self._index_is_sound = False
        self._has_served = False
        self._may_mount_anew = False
        self._status: int | None = None

    # Life

    def run(self) -> int:
        """Mount, or take over what the service manager kept, and serve until the end; gives the exit status."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._loop.on_signals(_ENDING, self._stop)
        estate = Estate.from_manager(self.settings)
        self._index_is_sound = estate is not None
        try:
            self._estate = estate or Estate.mount(self.settings)
        except WeightfsError as e:
            log.error("%s", e)
            self._said({"error": control.error_document(e)})
            return e.exit_code
        self._may_mount_anew = estate is not None
        return self._live()

    @classmethod
    def resume(cls, handoff: int) -> Supervisor:
        """The supervisor that a predecessor described before it became this process.

        Raises:
            UnfitError: it can't go on from there.
        """
        document = replacement.read_handoff(handoff)
        self = cls(MountConfig(**document["settings"]), lambda _: None, document["log_file"])
        self._estate = Estate.from_handoff(document)
        self._index_is_sound = self._has_served = True
        self._resends = document["resends"]
        self._serving = Daemon.adopt(document["daemon"], self._version)
        return self

    def run_on(self) -> int:
        """After `resume`: serve until the end; gives the exit status."""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self._loop.on_signals(_ENDING, self._stop)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)  # see `_become`
        assert self._serving is not None
        self._watch(self._serving)
        self._loop.after("standby", _STANDBY_AFTER_S, self._have_standby)
        return self._live()

    def _live(self) -> int:
        self._estate.listen(self.settings)
        if self._estate.listener is not None:
            replacement.Door(self._loop, self._estate.listener, self._asked)
        self._loop.after("tick", _TICK_S, self._tick)
        if self._serving is None:
            self._promote()
        while self._status is None:
            self._loop.turn()
        return self._status

    # Daemons

    def _start(self, version: Version) -> Daemon:
        daemon = Daemon.start(version, self._estate, self.log_file)
        self._watch(daemon)
        return daemon

    def _watch(self, daemon: Daemon) -> None:
        self._loop.watch(daemon.link.fileno(), lambda: self._hear(daemon))
        self._loop.watch(daemon.pidfd, lambda: self._died(daemon))
        self._watch_canary(daemon)

    def _watch_canary(self, daemon: Daemon) -> None:
        if daemon.canary is not None:
            self._loop.watch(daemon.canary[1], lambda: self._died(daemon))

    def _unwatch(self, daemon: Daemon) -> None:
        self._loop.unwatch(daemon.pidfd)
        if daemon.canary is not None:
            self._loop.unwatch(daemon.canary[1])
        self._loop.unwatch(daemon.link.fileno())
        for name in ("flush", "hear"):
            self._loop.cancel(f"{name}-{daemon.pid}")

    def _hear(self, daemon: Daemon) -> None:
        number, holdings = daemon.link.fileno(), False
        while True:
            try:
                message = daemon.link.receive()
            except BlockingIOError:
                break
            if message is None:  # its end is told by the pidfd
                self._loop.unwatch(number)
                return
            holdings |= message.words is None
            self._obey(daemon, message)
        if holdings:  # more will come, one with each open; in the socket they are safe
            self._loop.unwatch(number)
            hear = lambda: self._loop.watch(number, lambda: self._hear(daemon))  # noqa: E731
            self._loop.after(f"hear-{daemon.pid}", _BATCH_S, hear)

    def _obey(self, daemon: Daemon, message: Message) -> None:
        if message.hold is not None:
            for fd in message.fds:
                self._estate.hold(message.hold, fd)
        elif message.drop is not None:
            self._estate.drop(message.drop)
        elif message.words is not None:
            if "prepared" in message.words and not daemon.is_dead:
                daemon.prepared = True
                daemon.set_canary(message.words["prepared"].get("canary"))
                self._watch_canary(daemon)
                if daemon is self._candidate:
                    self._replace()
                elif daemon is self._serving:
                    self._go(daemon)
            elif "serving" in message.words:
                self._serves(daemon, message.words)
            elif "error" in message.words:
                daemon.error = message.words["error"]

    def _promote(self) -> None:
        """Have the standby serve, or a new daemon where there is none; it goes as soon as it is prepared."""
        daemon, self._standby = self._standby, None
        if daemon is None or daemon.version != self._version:
            self._dismiss(daemon)
            daemon = self._start(self._version)
        self._serving = daemon
        if daemon.prepared:
            self._go(daemon)

    def _succeed(self) -> None:
        """Nobody serves: the candidate goes, or else the standby."""
        if self._candidate is not None and self._candidate.prepared:
            self._serving, self._candidate = self._candidate, None
            self._go(self._serving)
        else:
            self._promote()

    def _go(self, daemon: Daemon) -> None:
        if daemon.went_at is None:
            self._beats = (0, 0)
            check = not self._index_is_sound or self._early_deaths >= _SUSPECT_DEATHS
            daemon.go(self._estate, check_index=check)
            self._flush(daemon)

    def _flush(self, daemon: Daemon) -> None:
        if not daemon.link.flush():
            self._loop.after(f"flush-{daemon.pid}", 0.005, lambda: self._flush(daemon))

    def _serves(self, daemon: Daemon, words: Mapping[str, Any]) -> None:
        daemon.served_at = time.monotonic()
        self._index_is_sound = self._has_served = True
        self._resends = words["resends"]
        log.info("daemon %d serves", daemon.pid)
        self._loop.after("standby", _STANDBY_AFTER_S, self._have_standby)
        systemd.notify("READY=1")
        if daemon.is_asked_for:
            self._answer({"serving": words["serving"]})
            self._loop.after("become", 0, lambda: self._become(daemon))
        said, self._said = self._said, lambda _: None
        said(words["serving"])

    def _have_standby(self) -> None:
        if self._standby is None and self._candidate is None and self._resends:
            self._standby = self._start(self._version)

    def _died(self, daemon: Daemon) -> None:
        daemon.is_dead = True
        self._hear(daemon)  # what it said last
        self._unwatch(daemon)
        how = daemon.reap()
        if not daemon.is_reaped:
            self._unreaped.append(daemon)
        else:
            daemon.close()
        if daemon in self._dismissed:
            self._dismissed.remove(daemon)
        elif daemon is self._standby:
            self._standby = None
            log.warning("the standby daemon %d ended with %s", daemon.pid, how)
            self._loop.after("standby", _LONGEST_PAUSE_S, self._have_standby)
        elif daemon is self._candidate:
            self._candidate = None
            log.warning("the candidate %d ended with %s", daemon.pid, how)
            self._answer({"error": daemon.error or _failed(f"the new version ended with {how}")})
            self._have_standby()
        elif daemon is self._serving:
            self._serving = None
            self._serving_died(daemon, how)

    def _serving_died(self, daemon: Daemon, how: str) -> None:
        if not self._estate.is_ours or self._estate.is_dead():
            self._finish(0)
            return
        if self._candidate is not None and self._candidate.prepared:  # it retired
            self._succeed()
            return
        log.warning("daemon %d ended with %s", daemon.pid, how)
        if daemon.served_at is None:
            error = daemon.error or _failed(f"the daemon ended with {how} before it served")
            if daemon.is_asked_for:  # the new version can't: the old one goes on
                self._answer({"error": error})
            elif not self._has_served and (daemon.error is not None or self._early_deaths >= _SUSPECT_DEATHS):
                if self._may_mount_anew:
                    self._mount_anew(error)
                else:  # nobody can go on in its place
                    self._give_up(error)
                return
        if not self._resends:
            self._give_up(_failed("the daemon died, and this kernel can't send again what it had not answered"))
            return
        self._index_is_sound = not daemon.died_of_memory
        is_young = daemon.served_at is None or time.monotonic() - daemon.served_at < _YOUNG_S
        self._early_deaths = self._early_deaths + 1 if is_young else 0
        pause = min(0.1 * 2 ** (self._early_deaths - 2), _LONGEST_PAUSE_S) if self._early_deaths > 1 else 0.0
        if pause:
            log.warning("%d daemons died young: the next goes in %.1f s", self._early_deaths, pause)
        self._loop.after("promote", pause, self._promote)

    def _mount_anew(self, error: Mapping[str, Any]) -> None:
        """What the service manager kept can't be gone on with: another version made it, or with other settings."""
        log.error("the mount that was kept can't be served (%s): it is taken away and made anew", error["message"])
        self._may_mount_anew = self._index_is_sound = False
        try:
            self._estate = self._estate.mount_anew(self.settings)
        except WeightfsError as e:
            self._give_up(control.error_document(e))
            return
        self._promote()

    def _dismiss(self, daemon: Daemon | None) -> None:
        """End a daemon that does not serve, or not any more."""
        if daemon is not None:
            self._dismissed.append(daemon)
            daemon.kill()

    # A daemon that does not go round

    def _tick(self) -> None:
        self._loop.after("tick", _TICK_S, self._tick)
        self._reap_late()
        daemon = self._serving
        if daemon is not None and daemon.served_at is not None and not self._loop.is_due("standby"):
            self._loop.after("standby", 0, self._have_standby)
        if daemon is None:
            if self._estate.is_dead():
                self._finish(0)
            elif not self._loop.is_due("promote"):  # a daemon could not be started
                self._loop.after("promote", 0, self._promote)
        elif daemon.served_at is None:
            longest = _PREPARE_S if daemon.went_at is None else _CHECK_S if daemon.checks_index else _STUCK_TICKS
            if time.monotonic() - (daemon.went_at or daemon.since) > longest:
                self._kill(daemon)
                log.error("daemon %d does not begin to serve: it is killed", daemon.pid)
        else:
            beat = ledger.heartbeat(self._estate.ledger_fd)
            last, missed = self._beats
            # Counted in rounds of our own: a machine that slept, or gave us no time, gave it none either.
            self._beats = (beat, missed + 1 if beat == last else 0)
            if self._beats[1] >= _STUCK_TICKS:
                self._kill(daemon)
                log.error("daemon %d has not gone round for %d s: it is killed", daemon.pid, _STUCK_TICKS)

    def _kill(self, daemon: Daemon) -> None:
        self._beats = (0, 0)
        daemon.kill()
        self._loop.after("pass-over", _DEAD_S, lambda: self._pass_over(daemon))

    def _pass_over(self, daemon: Daemon) -> None:
        if self._serving is daemon:
            log.warning("daemon %d does not die: it is passed over", daemon.pid)
            self._dismissed.append(daemon)
            self._serving = None
            self._succeed()

    # Replacement

    def _asked(self, connection: socket.socket, said: bytes) -> None:
        try:
            version = replacement.requested(said, self.settings)
            if self._client is not None or self._candidate is not None:
                raise BusyError("it is being replaced already", path=self.settings.mountpoint)
            if self._serving is None or self._serving.served_at is None:
                raise BusyError("its daemon is not up at this moment", path=self.settings.mountpoint)
            if not self._resends:
                raise UnfitError(
                    "this kernel can't send again what a daemon had not answered (6.9 can)",
                    path=self.settings.mountpoint,
                    mend="umount it, then mount again",
                )
            try:
                candidate = self._start(version)
            except (OSError, TypeError, ValueError) as e:
                raise UnfitError(f"the new version can't be started: {e}", path=version.interpreter) from e
        except WeightfsError as e:
            replacement.refuse(connection, e)
            return
        log.info("a new version is to take over: %s", version.interpreter)
        self._client, self._candidate = connection, candidate
        candidate.is_asked_for = True
        self._loop.after("candidate", _PREPARE_S, self._candidate_late)

    def _candidate_late(self) -> None:
        if self._candidate is not None and not self._candidate.prepared:
            error = BusyError(f"the new version was not prepared within {_PREPARE_S:g} s")
            self._candidate.error = control.error_document(error)
            self._candidate.kill()

    def _replace(self) -> None:
        self._loop.cancel("candidate")
        retiring = self._serving
        if retiring is None:  # it died meanwhile
            self._loop.cancel("promote")
            self._succeed()
            return
        retiring.retire()
        self._loop.after("retire", _RETIRE_S, lambda: self._kill(retiring) if self._serving is retiring else None)

    def _answer(self, document: Mapping[str, Any]) -> None:
        if self._client is not None:
            replacement.reply(self._client, document)
            self._client = None

    def _become(self, daemon: Daemon) -> None:
        """Go on as the supervisor of the version that serves now, unless that can't take over from this one."""
        self._version = daemon.version
        if daemon is self._serving and self._estate.is_ours:
            self._dismiss(self._standby)
            self._standby = None
            self._reap_dismissed()
            # One that comes from now on is for whom this process becomes.
            signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
            try:
                if not self._loop.is_signalled():
                    replacement.become(daemon.version, self._estate, daemon, self.log_file, resends=self._resends)
            except (OSError, subprocess.SubprocessError):
                log.exception("could not become the new version's supervisor")
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
        self._have_standby()

    # The end

    def _stop(self) -> None:
        if not self._estate.is_ours:
            return
        systemd.notify("STOPPING=1")
        if self._estate.is_kept and mounts.find(self.settings.mountpoint):  # a stop has unmounted it before
            self._estate.is_ours, self._estate.is_left = False, True
            self._end_daemons()
            return
        log.info("ends on a signal")
        lazily = self._estate.unmount(self.settings.mountpoint)
        # Whoever has files open gets some time; what the kernel reads by itself goes on even after.
        self._loop.after("end", _LAZY_S if lazily else _END_S, self._end_daemons)

    def _end_daemons(self) -> None:
        serving = self._serving
        if serving is None:
            self._finish(0)
            return
        serving.retire()
        self._loop.after("end", _END_S, lambda: self._finish(0))

    def _give_up(self, error: Mapping[str, Any]) -> None:
        log.error("the mount ends: %s", error["message"])
        self._estate.unmount(self.settings.mountpoint)
        self._finish(int(error["exit_code"]))
        self._said({"error": error})

    def _finish(self, status: int) -> None:
        for daemon in (self._serving, self._standby, self._candidate):
            self._dismiss(daemon)
        self._reap_dismissed()
        if self._estate.is_left:
            self._estate.leave_to_manager()
        elif self._unreaped:
            self._estate.turn_away()
        self._answer({"error": _failed("the mount has ended")})
        self._estate.wind_up(self.settings)
        self._loop.stop()
        self._status = status

    def _reap_late(self) -> None:
        for daemon in self._unreaped:
            daemon.reap()
            if daemon.is_reaped:
                daemon.close()
        self._unreaped = [daemon for daemon in self._unreaped if not daemon.is_reaped]

    def _reap_dismissed(self) -> None:
        for daemon in self._dismissed:
            self._unwatch(daemon)
            daemon.reap()
            if daemon.is_reaped:
                daemon.close()
            else:
                self._unreaped.append(daemon)
        self._dismissed.clear()


def _failed(message: str) -> dict[str, Any]:
    return control.error_document(WeightfsError(message))
