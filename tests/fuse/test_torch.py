"""weightfs.torch from a mount: the same tensors as from the bare folder, and the daemon is asked for all of a model."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from prefetch.residency import drop, resident_bytes
from tests.helpers.models import model_tensors, write_sharded
from tests.helpers.mounting import Mounter, both_engines, run_python, wait_until

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("safetensors") is None,
    reason="this machine lacks torch or safetensors",
)

LOAD = """
import sys
import torch
from weightfs.torch import load_files
def raw(tensors):
    return {name: (one.dtype, one.shape, one.numpy().tobytes()) for name, one in tensors.items()}
bare, mounted, copied = load_files(sys.argv[1]), load_files(sys.argv[2]), load_files(sys.argv[2], backend="pread")
assert list(bare) == list(mounted) == list(copied)
assert raw(bare) == raw(mounted) == raw(copied)
print(len(bare))
"""

ASK = """
import sys
from weightfs.torch.asking import ask_for
thread = ask_for(sys.argv[1:])
assert thread is not None
thread.join()
assert ask_for(["/"]) is None
"""


def resident(path: str) -> float:
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        return resident_bytes(fd, 0, size) / size
    finally:
        os.close(fd)


@both_engines
def test_the_same_tensors(tmp_path: Path, mounter: Mounter, engine: str) -> None:
    source = str(tmp_path / "source")
    write_sharded(f"{source}/model", model_tensors(6, rows=500), 3)
    mount = mounter(source, engine)
    assert run_python(LOAD, f"{source}/model", mount.path("model")) == "15\n"


def test_the_daemon_reads_what_was_asked_for(tmp_path: Path, mounter: Mounter) -> None:
    source = str(tmp_path / "source")
    paths = write_sharded(f"{source}/model", model_tensors(6, rows=4000), 3)
    mount = mounter(source, "portable", "--prefetch", "off")
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        drop(fd)
        os.close(fd)
    run_python(ASK, mount.path(f"model/{os.path.basename(paths[0])}"))
    wait_until(lambda: all(resident(path) > 0.98 for path in paths), "the model is in memory")
