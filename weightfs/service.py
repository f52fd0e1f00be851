"""A daemon's life: put the parts together, take over, serve, hand over or end.

It serves a kernel descriptor that its supervisor owns. It prepares everything that needs no right to serve, says so,
and waits for the word to go. From then on it alone reads the kernel's requests, until it is told to retire, the mount
is gone, or the supervisor is: then it takes the mount away with it.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import pyfuse3
import trio

from prefetch.budget import effective_budget
from prefetch.orders import read_order
from prefetch.scheduler import Scheduler, SchedulerConfig
from weightfs import control_server, metrics, mounts
from weightfs.beliefs import Beliefs, resynchronise
from weightfs.catalogue import Catalogue
from weightfs.channel import Channel, ChannelConfig
from weightfs.config import MountConfig, listen_address
from weightfs.control import Peer
from weightfs.errors import UnfitError, UsageError, WeightfsError
from weightfs.filesystem import Filesystem, FilesystemConfig
from weightfs.fuse import FuseOperations, errno_of
from weightfs.handles import HandleTable
from weightfs.index.history import History
from weightfs.index.opening import can_open
from weightfs.index.store import IndexStore
from weightfs.indexing import Indexer
from weightfs.keeping import SupervisedKeeper, adopt
from weightfs.ledger import Ledger
from weightfs.link import Link
from weightfs.notifier import Notifier
from weightfs.source.base import SourceStat
from weightfs.source.local import LocalSource
from weightfs.watch import Watcher

log = logging.getLogger(__name__)

_READAHEAD_KIB: Final = 4096
_LAZY_S: Final = 2.0
_FLUSH_S: Final = 0.25
_FLUSHES: Final = 50
_CRAWL_AFTER_TAKEOVER_S: Final = 30.0
_STACKED: Final = frozenset({0x794C7630})  # overlayfs
_FUSE: Final = 0x65735546
STATUS_SCHEMA: Final = 1
_READS_AT_ONCE: Final = 1 << 14  # a few milliseconds of the trio thread
_PREFETCH_COMMANDS: Final = ("warm", "progress", "evict", "residency")


class Descriptors(NamedTuple):
    """What a daemon inherits; all of it stays the supervisor's as well.

    Attributes:
        kernel: /dev/fuse, mounted, non-blocking.
        ledger: see `weightfs.ledger`.
        source: the source folder.
        control: the listening control socket, if there is one.
    """

    kernel: int
    ledger: int
    source: int
    control: int | None


class Service:
    """One mount, served by this process."""

    def __init__(self, config: MountConfig, inherited: Descriptors, link: Link) -> None:
        """Prepare, without touching what a daemon that still serves may use.

        Args:
            config: of the mount.
            inherited: from the supervisor.
            link: to the supervisor.

        Raises:
            UsageError, UnfitError.
        """
        self.config = config
        self._kernel_fd = inherited.kernel
        self._ledger = ledger = Ledger(inherited.ledger)
        self._control = socket.socket(fileno=inherited.control) if inherited.control is not None else None
        self._link = link
        self._keeper = SupervisedKeeper(ledger, link)
        self._source = LocalSource(config.source, descriptor=inherited.source)
        self._handles = HandleTable(keeper=self._keeper)
        self._operations = FuseOperations(timeout_s=config.attribute_timeout_s)
        self._index: IndexStore | None = None
        self._filesystem: Filesystem | None = None
        self._indexer: Indexer | None = None
        self._prefetch: Scheduler | None = None
        self._took_over = False
        self._held: dict[int, int] = {}
        self._orders: dict[str, Any] = {}
        self._goes = trio.Event()
        self._serves = trio.Event()
        self._retires = False
        self._notifier: Notifier | None = None
        self._watcher: Watcher | None = None
        self._beliefs: Beliefs | None = None
        self._unwatched = "asked for"
        self._channel = Channel(
            inherited.kernel,
            self._handles,
            lambda nodeid: self._serving().listing_end(nodeid),
            lambda nodeid: self._serving().reopen(nodeid),
            errno_of,
            ledger,
            ChannelConfig(
                passthrough=config.engine != "portable" and mounts.passthrough_refusal() is None,
                stack_depth=2 if self._source.filesystem_type in _STACKED else 1,
                deadline_s=config.deadline_s,
            ),
        )

    def _serving(self) -> Filesystem:
        assert self._filesystem is not None
        return self._filesystem

    async def run(self) -> None:
        """Prepare, serve, end.

        Raises:
            UnfitError: it can't be served, or not as the kernel was told it is.
            IndexStoreError: the index can't be kept.
        """
        if self._ledger.init_request:
            can_open(self.config.state_folder)
        channel = self._channel
        pyfuse3.init(self._operations, channel.mountpoint, set(pyfuse3.default_options))
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, nursery.cancel_scope)
                nursery.start_soon(self._flush_link)
                nursery.start_soon(self._retire_on_signal)
                nursery.start_soon(pyfuse3.main)
                nursery.start_soon(self._announce, nursery)
                nursery.start_soon(self._index_behind)
                nursery.start_soon(self._prefetch_ahead)
                await channel.run(self._may_read)
                if self._retires:
                    self._hand_over()
                nursery.cancel_scope.cancel()
        finally:
            self._stop_watching()
            pyfuse3.close(unmount=False)
            channel.close()
            self._handles.close()
            if self._index is not None:
                self._index.close()
            self._source.close()

    async def _may_read(self) -> list[int]:
        """Wait for the word, then take over."""
        gc.collect()
        gc.freeze()  # what is there now stays: no collection looks at it again
        canary = threading.Thread(target=threading.Event().wait, name="canary", daemon=True)
        canary.start()  # the supervisor hears of its end, when another thread hangs in the kernel
        self._link.say({"prepared": {"canary": canary.native_id}})
        await self._goes.wait()
        self._took_over = bool(self._ledger.init_request)
        after_death = self._ledger.begin()
        if after_death:
            log.warning("takes over from a daemon that died, the %d. of this mount", self._ledger.deaths)
        self._index = IndexStore(
            self.config.state_folder, self.config.source, journal=self._ledger, check=self._orders["check_index"]
        )
        self._filesystem = Filesystem(
            self._source,
            self._index,
            self._handles,
            {b"status.json": self._status_text, b"metrics": lambda: metrics.exposition(self.status())},
            FilesystemConfig(deadline_s=self.config.deadline_s),
        )
        self._operations.attach(self._filesystem)
        self._indexer = Indexer(
            self._source, self._index, self._handles, self._filesystem, lambda: self._channel.requests.total()
        )
        self._prefetch = Scheduler(
            Catalogue(self._source, self._filesystem.library, self._shown_as),
            SchedulerConfig(
                mode=self.config.prefetch,
                budget_bytes=effective_budget(self.config.memory_budget_bytes).nbytes,
                pinned=self.config.pinned_layers,
                learned=lambda folder, files: read_order(self.config.state_folder, os.fsdecode(folder), files),
                drafts=self.config.draft,
            ),
            self._channel.is_asked,
            History(self._index.database) if self.config.predict != "off" else None,
        )
        self._filesystem.wanted = self._prefetch.opened
        self._start_watching()
        orphans = adopt(self._handles, self._ledger, self._keeper, self._held)
        self._held = {}
        self._serves.set()
        return orphans

    def _shown_as(self, entry: SourceStat) -> tuple[int, int] | None:
        """(device, inode) that /proc shows for a file of the mount that is mapped."""
        assert self._index is not None
        inode = self._index.number_of(entry.inode_key)
        if inode is None or (here := mounts.find(self.config.mountpoint)) is None:
            return None
        major, _, minor = here.device.partition(":")
        return os.makedev(int(major), int(minor)), inode

    def _start_watching(self) -> None:
        self._notifier = notifier = Notifier(self._kernel_fd, self._channel.held_s)
        if self.config.watch == "off":
            return
        try:
            self._watcher = Watcher(self.config.source)
        except OSError as e:
            self._unwatched = f"no inotify: {os.strerror(e.errno or 0)}"
            log.warning("changes show after %g s: %s", self.config.attribute_timeout_s, self._unwatched)
            return
        self._beliefs = self._serving().watch(
            self._source, self._watcher, notifier, short_s=self.config.attribute_timeout_s
        )
        self._watcher.start(self._serving().source_changed, trio.lowlevel.current_trio_token())

    def _stop_watching(self) -> None:
        if self._watcher is not None:
            self._watcher.close()
        if self._notifier is not None and not self._notifier.close():
            # It waits for a folder's lock, which someone holds who waits for us.
            self._channel.abandon()

    async def _announce(self, nursery: trio.Nursery) -> None:
        await self._serves.wait()
        with trio.fail_after(self.config.deadline_s):
            await self._channel.ready.wait()
        if self.config.engine == "passthrough" and not self._channel.passthrough:
            raise UnfitError(
                f"passthrough does not work here: {self._engine()[1]}", mend="--engine portable, or see weightfs doctor"
            )
        if self._took_over:
            assert self._index is not None
            assert self._notifier is not None
            told = functools.partial(resynchronise, self._index, self._notifier)
            nursery.start_soon(functools.partial(trio.to_thread.run_sync, told, abandon_on_cancel=True))
        self._link.say({"serving": self.mount_document(), "resends": self._channel.resends})
        if (here := mounts.find(self.config.mountpoint)) is not None:
            # Not through the mount: the kernel may be asking us something at this very moment.
            await trio.to_thread.run_sync(mounts.raise_readahead, here, _READAHEAD_KIB)
        if self._control is not None:
            nursery.start_soon(control_server.serve, self._control, self._commands())
        if self.config.metrics_listen:
            metrics.serve(listen_address(self.config.metrics_listen), self.status)

    async def _index_behind(self) -> None:
        """Crawl once the mount serves; not at once after a takeover, when the predecessor's crawl is likely done."""
        await self._serves.wait()
        if self._indexer is not None:
            if self._took_over:
                await trio.sleep(_CRAWL_AFTER_TAKEOVER_S)
            await self._indexer.run()

    async def _prefetch_ahead(self) -> None:
        await self._serves.wait()
        if self._prefetch is not None:
            await self._prefetch.run()

    async def _listen(self, scope: trio.CancelScope) -> None:
        """Do what the supervisor says; without one, end the mount."""
        while True:
            try:
                message = self._link.receive()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._link)
                continue
            if message is None:
                await self._end_orphaned()
                scope.cancel()
                return
            words = message.words or {}
            if "held" in words:
                self._held.update(zip(words["held"], message.fds, strict=True))
            elif "go" in words:
                self._orders = words["go"]
                self._goes.set()
            elif "retire" in words:
                self._retire()

    async def _flush_link(self) -> None:
        """Send what the supervisor had no room for."""
        while True:
            await trio.sleep(_FLUSH_S)
            self._link.flush()

    async def _retire_on_signal(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM) as received:
            async for _ in received:
                log.info("hands over on SIGTERM")
                self._retire()

    def _retire(self) -> None:
        if not self._serves.is_set():
            os._exit(0)
        self._retires = True
        self._channel.retire()

    def _hand_over(self) -> None:
        """Leave everything as it is for the successor: open files stay open in the kernel, and in the ledger."""
        assert self._index is not None
        if self._prefetch is not None:
            self._prefetch.remember()
        self._index.commit()  # a successor may use another schema than the journal's
        for _ in range(_FLUSHES):
            if self._link.flush():
                break
            time.sleep(0.01)
        self._ledger.end()
        logging.shutdown()
        os._exit(0)

    async def _end_orphaned(self) -> None:
        """The supervisor is gone. A mount that nobody would revive is taken away, unless systemd holds on to it."""
        if not self._serves.is_set():
            os._exit(0)
        if self._orders["kept_by_manager"]:
            self._hand_over()
        log.warning("the supervisor is gone: ends the mount")
        lazily = await trio.to_thread.run_sync(mounts.take_away, self.config.mountpoint, self._orders["device"])
        if lazily:
            # Whoever has files open gets some time; what the kernel reads by itself goes on even after.
            await trio.sleep(_LAZY_S)

    # What it says of itself

    def _engine(self) -> tuple[str, str]:
        """Engine and why."""
        if self._channel.passthrough:
            if self._source.filesystem_type == _FUSE:
                return "passthrough", "the source lies on FUSE: its files may take the portable path"
            return "passthrough", "the kernel reads the files itself"
        if self.config.engine == "portable":
            return "portable", "asked for"
        if (refusal := mounts.passthrough_refusal()) is not None:
            return "portable", refusal
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
            "supervisor_pid": os.getppid(),
            "daemon_pid": os.getpid(),
        }

    def status(self) -> dict[str, Any]:
        """The live state. Callable from any thread."""
        filesystem, index, channel = self._serving(), self._index, self._channel
        library = filesystem.library
        assert index is not None
        assert self._prefetch is not None
        ahead = self._prefetch.status()
        return {
            **self.mount_document(),
            "uptime_s": round(time.monotonic() - self._orders["mounted_at"], 3),
            "models": library.models,
            "headers_parsed": library.headers_parsed,
            "opens": filesystem.opens,
            "open_inodes": len(self._handles),
            "bytes_read": channel.bytes_read,
            "requests": metrics.by_name(channel.requests.copy()),
            "hints": channel.hints,
            "requests_expired": channel.expired,
            "requests_poisoned": channel.poisoned,
            "deaths": self._ledger.deaths,
            "passthrough_refused": {os.strerror(number): count for number, count in channel.fallbacks.copy().items()},
            "changed_in_place": filesystem.changed_files(),
            "faults": [
                {"path": fault.path, "code": fault.reason, "offset": fault.offset, "message": fault.message}
                for fault in library.current_faults()
            ],
            "indexing": self._indexer.status() if self._indexer is not None else None,
            "watch": self._beliefs.status() if self._beliefs else {"state": "off", "reason": self._unwatched},
            "index": {"epoch": index.epoch, "set_aside": index.set_aside},
            "control_socket": self.config.control_socket if self._control is not None else None,
            "resident_bytes": sum(model["resident_bytes"] for model in ahead["models"]),
            "prefetch": ahead,
        }

    def _commands(self) -> dict[str, control_server.Command]:
        return {
            "status": self._control_status,
            "crawl": self._control_crawl,
            "timeline": self._control_timeline,
            "reads": self._control_reads,
            **{name: functools.partial(self._control_prefetch, name) for name in _PREFETCH_COMMANDS},
        }

    async def _control_prefetch(self, name: str, request: Mapping[str, Any], peer: Peer) -> dict[str, Any]:
        """`warm`, `evict`, `residency` of a path below the mountpoint; `progress` of models."""
        assert self._prefetch is not None
        models, path, layers = request.get("models", []), request.get("path", ""), request.get("layers")
        if not isinstance(path, str) or not isinstance(models, list) or not isinstance(layers, list | None):
            raise UsageError("path is text, models and layers are lists of text")
        below = os.fsencode(path)
        call: Callable[[], list[dict[str, Any]]]
        match name:
            case "warm":
                call = functools.partial(self._prefetch.warm, below, layers)
            case "progress":
                call = functools.partial(self._prefetch.progress, models)
            case "evict":
                call = functools.partial(self._prefetch.evict, below)
            case _:
                call = functools.partial(self._prefetch.residency, below)
        return {"models": await self._prefetch.in_thread(call)}

    async def _control_crawl(self, request: Mapping[str, Any], peer: Peer) -> dict[str, Any]:
        assert self._indexer is not None
        self._indexer.again()
        return {"indexing": self._indexer.status()}

    async def _control_timeline(self, request: Mapping[str, Any], peer: Peer) -> dict[str, Any]:
        assert self._prefetch is not None
        return await trio.to_thread.run_sync(self._prefetch.timeline)

    async def _control_reads(self, request: Mapping[str, Any], peer: Peer) -> dict[str, Any]:
        """READs since this was asked before; see `weightfs record`."""
        reads, passed_over = self._channel.observed_reads(_READS_AT_ONCE)
        return {"reads": reads, "passed_over": passed_over}

    async def _control_status(self, request: Mapping[str, Any], peer: Peer) -> dict[str, Any]:
        return await trio.to_thread.run_sync(self.status)

    def _status_text(self) -> bytes:
        return json.dumps(self.status(), indent=1).encode() + b"\n"


def serve(config: MountConfig, inherited: Descriptors, link: Link) -> None:
    """Prepare, and serve a mounted kernel descriptor when the supervisor says so, until the end.

    Raises:
        WeightfsError: it can't be served.
    """
    os.umask(0o077)
    # At the default of 5 ms a thread that computes makes every reply wait that long for the interpreter.
    sys.setswitchinterval(0.0005)
    service = Service(config, inherited, link)
    try:
        trio.run(service.run)
    except* WeightfsError as group:
        raise _first(group) from None


def _first(group: BaseExceptionGroup[WeightfsError]) -> WeightfsError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, WeightfsError)
    return error
