"""What this machine can do for weightfs, found out by trying; and the command that mends what it can't."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, Final

from weightfs import linux, memory_checks, mounts, surroundings
from weightfs.checks import Check
from weightfs.config import MountConfig
from weightfs.errors import WeightfsError

_GOOD_READAHEAD_KIB: Final = 1024


def examine(path: str, start: Callable[[MountConfig], dict[str, Any]], end: Callable[[int], bool]) -> list[Check]:
    """Every check, for a source at `path`.

    `start` starts a mount and gives its document, `end` waits for the end of a supervisor whose mount is gone.
    """
    checks = [_kernel(), _fuse_device(), _privileges(), _libfuse()]
    if not any(check.needed and check.state == "missing" for check in checks):
        checks.append(_mount(start, end))
    return [*checks, *surroundings.checks(), _readahead(path), _cuda(), *memory_checks.checks()]


def _kernel() -> Check:
    release = os.uname().release
    version = linux.kernel_version()
    if version >= (6, 9):
        return Check("kernel", "ok", release)
    if version >= (5, 12):
        return Check("kernel", "degraded", f"{release}: no FUSE passthrough before 6.9", "install a newer kernel")
    return Check(
        "kernel", "missing", f"{release}: 5.12 is the oldest that works", "install a newer kernel", needed=True
    )


def _fuse_device() -> Check:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as e:
        return Check("fuse", "missing", f"/dev/fuse: {os.strerror(e.errno or 0)}", "modprobe fuse", needed=True)
    return Check("fuse", "ok", "/dev/fuse opens")


def _privileges() -> Check:
    refusal = mounts.passthrough_refusal()
    if refusal is None:
        return Check("privileges", "ok", "CAP_SYS_ADMIN: passthrough and mounts for everyone")
    if mounts.is_privileged():
        return Check("privileges", "degraded", f"portable engine: {refusal}")
    if shutil.which("fusermount3"):
        return Check(
            "privileges", "degraded", "no CAP_SYS_ADMIN: portable engine, mounts for yourself", "run it as root"
        )
    return Check("privileges", "missing", "neither CAP_SYS_ADMIN nor fusermount3", "apt-get install fuse3", needed=True)


def _libfuse() -> Check:
    name = ctypes.util.find_library("fuse3")
    if name is None:
        return Check("libfuse", "missing", "libfuse 3 is not installed", "apt-get install libfuse3-dev", needed=True)
    version = ctypes.CDLL(name).fuse_pkgversion
    version.restype = ctypes.c_char_p
    adapter = importlib.metadata.version("pyfuse3")
    return Check("libfuse", "ok", f"libfuse {version().decode()}, pyfuse3 {adapter}")


def _mount(start: Callable[[MountConfig], dict[str, Any]], end: Callable[[int], bool]) -> Check:
    """Mount a folder with one file and read it: nothing else shows that passthrough works."""
    content = os.urandom(1 << 16)
    with tempfile.TemporaryDirectory(prefix="weightfs-doctor-") as folder:
        source, mountpoint = os.path.join(folder, "source"), os.path.join(folder, "mount")
        os.mkdir(source)
        os.mkdir(mountpoint)
        with open(os.path.join(source, "probe"), "wb") as probe:
            probe.write(content)
        try:
            document = start(MountConfig(source=source, mountpoint=mountpoint, state_dir=os.path.join(folder, "state")))
        except WeightfsError as e:
            return Check("passthrough", "missing", f"a trial mount failed: {e}", e.mend, needed=True)
        try:
            with open(os.path.join(mountpoint, "probe"), "rb") as probe:
                right = probe.read() == content
            with open(os.path.join(mountpoint, ".weightfs", "status.json"), "rb") as status:
                refused = b'"passthrough_refused": {}' not in status.read()
        finally:
            with contextlib.suppress(WeightfsError):
                mounts.unmount(mountpoint, lazy=True)
            end(int(document["supervisor_pid"]))
    if not right:
        return Check("passthrough", "missing", "a trial mount gave wrong bytes: do not use it", needed=True)
    if document["engine"] != "passthrough":
        return Check("passthrough", "degraded", f"portable engine: {document['reason']}")
    if refused:
        return Check(
            "passthrough", "degraded", f"the kernel refuses it for files below {tempfile.gettempdir()} (stacked?)"
        )
    return Check("passthrough", "ok", "a trial mount was read by the kernel itself")


def _readahead(path: str) -> Check:
    device = os.stat(path).st_dev
    setting = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    try:
        with open(setting) as file:
            kib = int(file.read())
    except OSError:
        return Check("read-ahead", "degraded", f"{path} lies on no block device: its read-ahead is not known")
    if kib >= _GOOD_READAHEAD_KIB:
        return Check("read-ahead", "ok", f"{kib} KiB on the disk of {path}")
    return Check(
        "read-ahead",
        "degraded",
        f"{kib} KiB on the disk of {path}: loaders that use mmap read it cold in small pieces",
        f"echo 4096 > {setting}",
    )


def _cuda() -> Check:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Check("cuda", "missing", "no NVIDIA driver: no GPU loading and no GPU snapshots; mounts do not need it")
    version = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDriverGetVersion(ctypes.byref(version)):
        return Check("cuda", "degraded", "the NVIDIA driver is there and does not start", "nvidia-smi")
    return Check("cuda", "ok", f"driver for CUDA {version.value // 1000}.{version.value % 1000 // 10}")
