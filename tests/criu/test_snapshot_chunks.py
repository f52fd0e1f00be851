"""Snapshots that hold no weights: what is stored, encrypted or not, and what happens when it is not as written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoint.processes import start_ticks
from tests.helpers.models import Tensor, write_safetensors
from tests.helpers.mounting import Mounter, wait_until, wait_until_settled
from tests.helpers.paged import needs_userfaultfd
from tests.helpers.served import Commands
from tests.helpers.targets import Target, end, needs_criu, target

pytestmark = [needs_criu, needs_userfaultfd]

WEIGHTS_BYTES = 8 << 20
ZEROS_BYTES = 8 << 20
OTHER_BYTES = 3 << 20
COPIES = """
import hashlib
held = open(sys.argv[2], "rb")
weights = mmap.mmap(-1, os.fstat(held.fileno()).st_size + 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
held.readinto(memoryview(weights)[512:])
if len(sys.argv) > 3:
    held.close()
zeros = mmap.mmap(-1, %d, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(0, len(zeros), 4096):
    zeros[at] = 1
    zeros[at] = 0
other = bytearray(os.urandom(%d))
spoken = b"a password that nobody else may read " * 1000
while True:
    tell(hashlib.sha256(b"".join((weights, zeros, other, spoken))).hexdigest())
    wait()
""" % (ZEROS_BYTES, OTHER_BYTES)


def add_weights(folder: Path, name: str = "model.safetensors") -> str:
    data = np.random.default_rng(3).integers(0, 255, WEIGHTS_BYTES, np.uint8).tobytes()
    path = write_safetensors(str(folder / "m" / name), {"w": Tensor("U8", (WEIGHTS_BYTES,), data)})
    wait_until_settled(path)
    return path


def new_key(folder: Path, name: str = "key") -> str:
    path = str(folder / name)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, os.urandom(32))
    os.close(fd)
    return path


class Keyed(Commands):
    """Commands that are given a key, or none.

    Attributes:
        key: the options.
    """

    def __init__(self, folder: Path, key: list[str]) -> None:
        super().__init__(folder)
        self.key = key

    def argv(self, action: str, *arguments: str, command: Any = ()) -> list[str]:
        argv = super().argv(action, *arguments, command=command)
        if "--no-encrypt" in argv:
            at = argv.index("--no-encrypt")
            argv[at : at + 1] = self.key
        return argv

    def stored(self) -> int:
        """What the store takes on the disk."""
        return sum(os.path.getsize(os.path.join(at, name)) for at, _, names in os.walk(self.store) for name in names)

    def holds(self, text: bytes) -> bool:
        """Whether a file of the store has these bytes."""
        return any(text in Path(at, name).read_bytes() for at, _, names in os.walk(self.store) for name in names)


@pytest.fixture
def it(tmp_path: Path) -> Iterator[Keyed]:
    commands = Keyed(tmp_path, ["--key-file", new_key(tmp_path)])
    try:
        yield commands
    finally:
        commands.close()


@pytest.mark.parametrize("encrypted", [True, False])
def test_a_process_that_has_copied_its_weights(tmp_path: Path, it: Keyed, mounter: Mounter, encrypted: bool) -> None:
    if not encrypted:
        it.key = ["--no-encrypt"]
    add_weights(tmp_path / "models")
    mount = mounter(str(tmp_path / "models"))
    with target(COPIES, tmp_path, mount.path("m", "model.safetensors")) as one:
        before = one.said()
        made = it.told("create", "warm", "--pid", str(one.pid))
        one.process.wait(10)
        assert made["bytes"]["logical"] > WEIGHTS_BYTES + ZEROS_BYTES + OTHER_BYTES
        assert OTHER_BYTES < it.stored() < OTHER_BYTES + (8 << 20)
        assert made["bytes"]["weights"] > WEIGHTS_BYTES - (1 << 20)
        assert made["bytes"]["zeros"] > ZEROS_BYTES - (1 << 20)
        assert sum(made["bytes"][kind] for kind in ("weights", "zeros", "chunks")) == made["bytes"]["logical"]
        assert abs(made["bytes"]["stored"] - it.stored()) < 1 << 20
        assert it.holds(b"a password that nobody else may read " * 2) is False, "it is compressed, if nothing else"
        it.told("verify", "warm")
        for _ in range(2):
            back = it.told("restore", "warm")
            assert back["memory"]["zero_bytes"] >= ZEROS_BYTES
            assert back["memory"]["bytes_copied"] >= WEIGHTS_BYTES + OTHER_BYTES
            assert one.ask() == before
            end(one.pid)
            wait_until(lambda: start_ticks(one.pid) is None, "its pid is free")
        back = it.told("restore", "warm", "--plain")
        assert back["memory"] is None
        assert one.ask() == before


@pytest.mark.parametrize("is_mounted", [True, False])
def test_weights_that_were_read_and_closed(tmp_path: Path, it: Keyed, mounter: Mounter, is_mounted: bool) -> None:
    path = add_weights(tmp_path / "models")
    unused = write_safetensors(
        str(tmp_path / "models" / "m" / "unused.safetensors"), {"w": Tensor("U8", (8,), b"8bytes..")}
    )
    wait_until_settled(unused)
    if is_mounted:
        path = mounter(str(tmp_path / "models")).path("m", "model.safetensors")
    options = ["--weights", os.path.dirname(path)]
    with target(COPIES, tmp_path, path, "closed", f"--model={os.path.dirname(path)}") as one:
        before = one.said()
        it.told("create", "warm", "--pid", str(one.pid), *([] if is_mounted else options))
        one.process.wait(10)
        assert it.stored() < OTHER_BYTES + (8 << 20)
        named = [weight["path"] for weight in it.told("show", "warm")["manifest"]["weights"]]
        assert [os.path.basename(each) for each in named] == ["model.safetensors"]
        os.unlink(unused)
        it.told("restore", "warm")
        assert one.ask() == before


def test_weights_that_are_not_there(tmp_path: Path, it: Keyed) -> None:
    with target("tell('on')\nwait()\ntell('and on')\nwait()", tmp_path) as one:
        one.said()
        error = it.refused("create", "warm", "--pid", str(one.pid), "--weights", "/nowhere", code=1)
        assert error["path"] == "/nowhere"
        assert one.ask() == "and on"


def test_a_second_snapshot_adds_little(tmp_path: Path, it: Keyed) -> None:
    path = add_weights(tmp_path)
    with target(COPIES, tmp_path, path) as one:
        before = one.said()
        it.told("create", "first", "--pid", str(one.pid), "--leave-running")
        after_first = it.stored()
        added = it.told("create", "second", "--pid", str(one.pid), "--leave-running")["bytes"]["stored"]
        assert added < after_first / 4
        assert it.stored() < after_first * 1.25
        it.told("rm", "first")
        freed = it.told("prune", *it.key)["bytes_freed"]
        assert 0 <= freed < after_first / 2
        it.told("verify", "second")
        end(one.pid)
        one.process.wait(10)
        it.told("restore", "second")
        assert one.ask() == before
        it.told("rm", "second")
        it.told("prune", *it.key)
        assert it.stored() < 1 << 20


def flip(path: Path, at: float = 0.5) -> None:
    """Change a bit."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 1
    path.write_bytes(content)


def pack_of(store: Path) -> Path:
    """The largest one: that of the first snapshot, of which the others need most."""
    return max(store.glob(".chunks/*.pack"), key=lambda path: path.stat().st_size)


def swap_chunks(store: Path) -> None:
    """Exchange two parts of a pack."""
    pack = pack_of(store)
    content = pack.read_bytes()
    start, half, nbytes = 8192, len(content) // 2, 4096
    one, other = content[start : start + nbytes], content[half : half + nbytes]
    rest, last = content[start + nbytes : half], content[half + nbytes :]
    pack.write_bytes(content[:start] + other + rest + one + last)


def truncate(store: Path) -> None:
    pack = pack_of(store)
    os.truncate(pack, pack.stat().st_size // 2)


def no_index_and_truncated(store: Path) -> None:
    pack_of(store).with_suffix(".index").unlink()
    truncate(store)


def manifest_of_another(store: Path) -> None:
    shutil.copy(store / "other" / "manifest.json", store / "warm" / "manifest.json")


def renamed(store: Path) -> None:
    shutil.rmtree(store / "warm")
    os.rename(store / "other", store / "warm")


def recipes_of_another(store: Path) -> None:
    shutil.copy(store / "other" / "recipes", store / "warm" / "recipes")


def changed_manifest(store: Path) -> None:
    """Another command, with the digest that any program can make."""
    from checkpoint import manifest

    path = store / "warm" / "manifest.json"
    said = manifest.decode(path.read_bytes(), str(path))
    said.command.append("--trust-me")
    path.write_bytes(manifest.encode(said))


def older(store: Path) -> None:
    """The snapshot of that name that was there before."""
    shutil.rmtree(store / "warm")
    os.rename(store / "before", store / "warm")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a bit in a pack": lambda store: flip(pack_of(store)),
    "a bit at the beginning of a pack": lambda store: flip(pack_of(store), 0.0),
    "a bit in the index": lambda store: flip(pack_of(store).with_suffix(".index")),
    "a bit in the store's key": lambda store: flip(store / ".chunks" / "key"),
    "a bit in the recipes": lambda store: flip(store / "warm" / "recipes"),
    "a bit in the manifest": lambda store: flip(store / "warm" / "manifest.json"),
    "no packs": lambda store: shutil.rmtree(store / ".chunks"),
    "swapped chunks": swap_chunks,
    "a truncated pack": truncate,
    "a truncated pack without its index": no_index_and_truncated,
    "another snapshot's manifest": manifest_of_another,
    "another snapshot's name": renamed,
    "another snapshot's recipes": recipes_of_another,
    "a changed manifest": changed_manifest,
    "an older snapshot": older,
}


@pytest.fixture(scope="module")
def gone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Keyed, Target, str]]:
    """An encrypted snapshot `warm` of a process that has ended, `other` ones of it, and what it told."""
    folder = tmp_path_factory.mktemp("gone")
    commands = Keyed(folder, ["--key-file", new_key(folder)])
    path = add_weights(folder)
    with target(COPIES, folder, path) as one:
        before = one.said()
        it = commands
        it.told("create", "warm", "--pid", str(one.pid), "--leave-running")
        shutil.copytree(folder / "snapshots" / "warm", folder / "before")
        it.told("create", "other", "--pid", str(one.pid), "--leave-running")
        it.told("create", "warm", "--replace", "--pid", str(one.pid))
        os.rename(folder / "before", folder / "snapshots" / "before")
        one.process.wait(10)
        yield commands, one, before


@contextmanager
def copied(gone: tuple[Keyed, Target, str], folder: Path) -> Iterator[tuple[Keyed, Path]]:
    """The commands, on a copy of the store."""
    commands, one, _ = gone
    mine = Keyed(folder, commands.key)
    shutil.copytree(commands.store, mine.store)
    try:
        yield mine, Path(mine.store)
    finally:
        mine.close()
        if start_ticks(one.pid) is not None:
            end(one.pid)


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_not_as_it_was_written(gone: tuple[Keyed, Target, str], tmp_path: Path, what: str) -> None:
    with copied(gone, tmp_path) as (it, store):
        DAMAGE[what](store)
        done = it.run("restore", "warm")
        if what == "a bit in the index":  # it is made of the pack's own heads
            assert done.returncode == 0, done.stderr
            assert gone[1].ask() == gone[2]
            return
        assert done.returncode == 4, (done.stdout, done.stderr)
        wait_until(lambda: start_ticks(gone[1].pid) is None, "nothing is left")
        assert it.told("recover")["recovered"] == []
        if what != "an older snapshot":
            assert it.run("verify", "warm").returncode == 4


def test_wrong_keys(gone: tuple[Keyed, Target, str], tmp_path: Path) -> None:
    with copied(gone, tmp_path) as (it, _):
        right, it.key = it.key, ["--key-file", new_key(tmp_path, "another")]
        for action in ("restore", "verify"):
            done = it.run(action, "warm")
            assert done.returncode == 4, done.stderr
        with target("tell('on')\nwait()\ntell('and on')\nwait()", tmp_path) as running:
            running.said()
            error = it.refused("create", "new", "--pid", str(running.pid), code=4)
            assert "key" in error["message"]
            assert running.ask() == "and on"
        it.key = ["--no-encrypt"]
        assert it.run("restore", "warm").returncode == 4
        it.key = ["--key-command", f"cat {right[1]}"]
        it.told("verify", "warm")
        it.key = ["--key-env", "THE_KEY"]
        it.env["THE_KEY"] = Path(right[1]).read_bytes().hex()
        it.told("restore", "warm")
        assert gone[1].ask() == gone[2]


def test_a_restore_without_lost_weights(gone: tuple[Keyed, Target, str], tmp_path: Path) -> None:
    with copied(gone, tmp_path) as (it, _):
        path = Path(gone[0].store).parent / "m" / "model.safetensors"
        content = path.read_bytes()
        try:
            flip(path)
            wait_until_settled(str(path))
            assert it.run("restore", "warm").returncode == 4
        finally:
            path.write_bytes(content)
        wait_until(lambda: start_ticks(gone[1].pid) is None, "nothing is left")
