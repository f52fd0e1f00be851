"""A mount's life in one process: put the parts together, serve, end cleanly.

Order at the end: the mountpoint goes first (lazily if it is in use), then pyfuse3, then the descriptors, then the
index. A daemon that is killed leaves a dead mount, which the next `mount` takes away.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import pyfuse3
import trio

from weightfs import metrics, mounts
from weightfs.beliefs import Beliefs
from weightfs.channel import Channel, ChannelConfig
from weightfs.config import MountConfig, listen_address
from weightfs.errors import UnfitError, WeightfsError
from weightfs.filesystem import Filesystem, FilesystemConfig
from weightfs.fuse import FuseOperations, errno_of
from weightfs.handles import HandleTable
from weightfs.index.store import IndexStore
from weightfs.notifier import Notifier
from weightfs.source.local import LocalSource
from weightfs.watch import Watcher

log = logging.getLogger(__name__)

_READAHEAD_KIB: Final = 4096
_END_S: Final = 4.0
_STACKED: Final = frozenset({0x794C7630})  # overlayfs
_FUSE: Final = 0x65735546
STATUS_SCHEMA: Final = 1


class Service:
    """One mount, not yet served."""

    def __init__(self, config: MountConfig) -> None:
        """Open the source and the index.

        Raises:
            UsageError, UnfitError, IndexStoreError.
        """
        self.config = config
        self._started = time.monotonic()
        self._source = LocalSource(config.source)
        self._index = IndexStore(config.state_folder, config.source)
        self._handles = HandleTable()
        texts = {b"status.json": self._status_text, b"metrics": lambda: metrics.exposition(self.status())}
        self._filesystem = Filesystem(
            self._source, self._index, self._handles, texts, FilesystemConfig(deadline_s=config.deadline_s)
        )
        self._channel: Channel | None = None
        self._notifier: Notifier | None = None
        self._watcher: Watcher | None = None
        self._beliefs: Beliefs | None = None
        self._unwatched = "asked for"
        self._is_mounted = False

    async def run(self, mounted: Callable[[dict[str, Any]], None]) -> None:
        """Mount, call `mounted` with the mount document once it answers, serve until it is unmounted or signalled.

        Raises:
            UnfitError: it can't be mounted, or not with the engine asked for.
        """
        mounts.clear_stale(self.config.mountpoint)
        kernel_fd = mounts.mount(self.config.source, self.config.mountpoint, for_others=self.config.for_others)
        self._is_mounted = True
        try:
            await self._serve(kernel_fd, mounted)
        finally:
            self._unmount()
            self._handles.close()
            os.close(kernel_fd)
            self._index.close()
            self._source.close()

    async def _serve(self, kernel_fd: int, mounted: Callable[[dict[str, Any]], None]) -> None:
        self._channel = channel = Channel(
            kernel_fd,
            self._handles,
            self._filesystem.listing_end,
            lambda nodeid: self._filesystem.open(nodeid, os.O_RDONLY),
            errno_of,
            ChannelConfig(
                passthrough=self.config.engine != "portable" and mounts.is_privileged(),
                stack_depth=2 if self._source.filesystem_type in _STACKED else 1,
                deadline_s=self.config.deadline_s,
            ),
        )
        self._notifier = Notifier(kernel_fd, channel.held_s)
        self._start_watching(self._notifier)
        operations = FuseOperations(self._filesystem, timeout_s=self.config.attribute_timeout_s)
        pyfuse3.init(operations, channel.mountpoint, set(pyfuse3.default_options))
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end_on_signal, nursery.cancel_scope)
                nursery.start_soon(pyfuse3.main)
                nursery.start_soon(self._announce, channel, mounted)
                await channel.run()  # returns when the kernel says that the mount is gone
                self._is_mounted = False
                nursery.cancel_scope.cancel()
        finally:
            self._stop_watching(channel)
            pyfuse3.close(unmount=False)
            channel.close()

    def _start_watching(self, notifier: Notifier) -> None:
        if self.config.watch == "off":
            return
        try:
            self._watcher = Watcher(self.config.source)
        except OSError as e:
            self._unwatched = f"no inotify: {os.strerror(e.errno or 0)}"
            log.warning("changes show after %g s: %s", self.config.attribute_timeout_s, self._unwatched)
            return
        self._beliefs = self._filesystem.watch(
            self._source, self._watcher, notifier, short_s=self.config.attribute_timeout_s
        )
        self._watcher.start(self._filesystem.source_changed, trio.lowlevel.current_trio_token())

    def _stop_watching(self, channel: Channel) -> None:
        if self._watcher is not None:
            self._watcher.close()
        if self._notifier is not None and not self._notifier.close():
            # It waits for a folder's lock, which someone holds who waits for us.
            channel.abandon()

    async def _announce(self, channel: Channel, mounted: Callable[[dict[str, Any]], None]) -> None:
        with trio.fail_after(self.config.deadline_s):
            await channel.ready.wait()
        if self.config.engine == "passthrough" and not channel.passthrough:
            raise UnfitError(
                f"passthrough does not work here: {self._engine()[1]}", mend="--engine portable, or see weightfs doctor"
            )
        if (here := mounts.find(self.config.mountpoint)) is not None:
            # Not through the mount: the kernel may be asking us something at this very moment.
            await trio.to_thread.run_sync(mounts.raise_readahead, here, _READAHEAD_KIB)
        if self.config.metrics_listen:
            metrics.serve(listen_address(self.config.metrics_listen), self.status)
        notify("READY=1")
        mounted(self.mount_document())

    async def _end_on_signal(self, scope: trio.CancelScope) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            async for number in received:
                log.info("ending on %s", signal.Signals(number).name)
                notify("STOPPING=1")
                lazily = await trio.to_thread.run_sync(self._unmount)
                if lazily:
                    # Whoever has files open gets some time; what the kernel reads by itself goes on even after.
                    await trio.sleep(_END_S / 2)
                scope.cancel()

    def _unmount(self) -> bool:
        """Take the mountpoint away while it is ours; gives whether it had to be done lazily.

        Once, and not after the kernel has said that it is gone: by then another daemon may be mounted there.
        """
        if not self._is_mounted or mounts.find(self.config.mountpoint) is None:
            return False
        self._is_mounted = False
        try:
            mounts.unmount(self.config.mountpoint)
        except WeightfsError:
            with contextlib.suppress(WeightfsError):
                mounts.unmount(self.config.mountpoint, lazy=True)
            return True
        return False

    # What it says of itself

    def _engine(self) -> tuple[str, str]:
        """Engine and why."""
        channel = self._channel
        if channel is not None and channel.passthrough:
            if self._source.filesystem_type == _FUSE:
                return "passthrough", "the source lies on FUSE: its files may take the portable path"
            return "passthrough", "the kernel reads the files itself"
        if self.config.engine == "portable":
            return "portable", "asked for"
        if not mounts.is_privileged():
            return "portable", "passthrough needs CAP_SYS_ADMIN"
        return "portable", f"kernel {os.uname().release} has no FUSE passthrough (6.9 has)"

    def mount_document(self) -> dict[str, Any]:
        """The `mount` document of the interface."""
        engine, reason = self._engine()
        return {
            "schema": STATUS_SCHEMA,
            "mountpoint": self.config.mountpoint,
            "source": self.config.source,
            "engine": engine,
            "reason": reason,
            "supervisor_pid": None,
            "daemon_pid": os.getpid(),
        }

    def status(self) -> dict[str, Any]:
        """The live state. Callable from any thread."""
        channel, library = self._channel, self._filesystem.library
        assert channel is not None
        return {
            **self.mount_document(),
            "uptime_s": round(time.monotonic() - self._started, 3),
            "models": library.models,
            "headers_parsed": library.headers_parsed,
            "opens": self._filesystem.opens,
            "open_inodes": len(self._handles),
            "bytes_read": channel.bytes_read,
            "requests": metrics.by_name(channel.requests.copy()),
            "hints": channel.hints,
            "requests_expired": channel.expired,
            "passthrough_refused": {os.strerror(number): count for number, count in channel.fallbacks.copy().items()},
            "changed_in_place": self._filesystem.changed_files(),
            "faults": [
                {"path": fault.path, "code": fault.reason, "offset": fault.offset, "message": fault.message}
                for fault in library.current_faults()
            ],
            "watch": self._beliefs.status() if self._beliefs else {"state": "off", "reason": self._unwatched},
            "index": {"epoch": self._index.epoch, "set_aside": self._index.set_aside},
            "resident_bytes": None,
            "prefetch": None,
        }

    def _status_text(self) -> bytes:
        return json.dumps(self.status(), indent=1).encode() + b"\n"


def notify(state: str) -> None:
    """Tell systemd, if it listens (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as outlet, contextlib.suppress(OSError):
        outlet.connect("\0" + address[1:] if address.startswith("@") else address)
        outlet.send(state.encode())


def serve(config: MountConfig, mounted: Callable[[dict[str, Any]], None]) -> None:
    """Mount and serve until unmounted or signalled.

    Raises:
        WeightfsError: it could not be mounted.
    """
    os.umask(0o077)
    # At the default of 5 ms a thread that computes makes every reply wait that long for the interpreter.
    sys.setswitchinterval(0.0005)
    service = Service(config)

    async def main() -> None:
        await service.run(mounted)

    try:
        trio.run(main)
    except* WeightfsError as group:
        raise _first(group) from None


def _first(group: BaseExceptionGroup[WeightfsError]) -> WeightfsError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, WeightfsError)
    return error
