"""Who uses a file of a mount: a mapping left by a closed handle, through the bare path and through the mount."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prefetch.usage import Key, files_in_use
from tests.helpers.models import every_dtype, write_safetensors
from tests.helpers.mounting import Daemon, Mount, Mounter, both_engines, child

HOLD = """
import ctypes, os, sys
how, path = sys.argv[1:]
fd = os.open(path, os.O_RDONLY)
if how != "open":
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    private = 2
    address = libc.mmap(None, 4096, 1, private if how == "private" else 1, fd, 0)
    assert address != ctypes.c_void_p(-1).value
    ctypes.string_at(address, 8)
    os.close(fd)
print("holds", flush=True)
sys.stdin.read(1)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    write_safetensors(f"{folder}/model.safetensors", every_dtype())
    write_safetensors(f"{folder}/other.safetensors", every_dtype())
    return folder


def key_of(path: str | os.PathLike[str]) -> Key:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def both_keys(mount: Mount, name: str) -> set[Key]:
    """What a user of either path is known by."""
    return {key_of(mount.path(name)), key_of(os.path.join(mount.source, name))}


@both_engines
@pytest.mark.parametrize("how", ["open", "shared", "private"])
@pytest.mark.parametrize("through_mount", [True, False], ids=["mount", "bare"])
def test_a_user_is_found(source: Path, mounter: Mounter, engine: str, how: str, through_mount: bool) -> None:
    mount = mounter(str(source), engine)
    asked = both_keys(mount, "model.safetensors") | both_keys(mount, "other.safetensors")
    ours = {mount.supervisor.pid, mount.daemon_pid()}
    assert not files_in_use(asked, ours).in_use
    path = mount.path("model.safetensors") if through_mount else f"{source}/model.safetensors"
    with child(HOLD, how, path) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == "holds\n"
        found = files_in_use(asked, ours).in_use
        assert found
        assert found <= both_keys(mount, "model.safetensors"), "and not the other file"
        print(engine, how, through_mount, "mount's" if key_of(mount.path("model.safetensors")) in found else "backing")
    assert not files_in_use(asked, ours).in_use


@both_engines
def test_no_mount_has_to_answer(source: Path, mounter: Mounter, engine: str) -> None:
    """All of the mount's processes stand still while it is looked; the look is a child, ended if it does not return."""
    mount = mounter(str(source), engine)
    asked = both_keys(mount, "model.safetensors")
    code = """
import json, sys
from prefetch.usage import files_in_use
keys, excluded = json.loads(sys.argv[1])
print(len(files_in_use({tuple(key) for key in keys}, excluded).in_use))
"""
    daemon = Daemon(mount.daemon_pid())
    arguments = json.dumps([sorted(asked), [mount.supervisor.pid, daemon.pid]])
    with child(HOLD, "open", mount.path("model.safetensors")) as user:
        assert user.stdout is not None
        assert user.stdout.readline() == "holds\n"
        mount.supervisor.signal(signal.SIGSTOP)
        daemon.signal(signal.SIGSTOP)
        try:
            done = subprocess.run(
                [sys.executable, "-c", code, arguments], capture_output=True, text=True, timeout=20, check=False
            )
        finally:
            daemon.signal(signal.SIGCONT)
            mount.supervisor.signal(signal.SIGCONT)
            daemon.close()
        assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
