"""Containers of crun, from Debian: a bundle whose root filesystem is this machine's, seen through an overlay."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import pytest

from weightfs import linux

needs_crun = pytest.mark.skipif(shutil.which("crun") is None, reason="this machine lacks crun")

_MNT_DETACH = 2
_CGROUP2 = 'umount -l -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; exec crun --cgroup-manager=disabled "$@"'
"""crun refuses control groups of both versions side by side."""


_CAPABILITIES = re.findall(
    r"\w+",
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE "
    "NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN "
    "SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE "
    "MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE",
)
"""By number (capabilities(7))."""


class Bundle:
    """A folder that crun runs containers from, all of them with the capabilities this process has.

    Attributes:
        rootfs: where the containers' root filesystem is mounted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rootfs = folder / "rootfs"

    def write(self, command: Sequence[str]) -> None:
        """Have the next container run a command."""
        config = self.folder / "config.json"
        config.unlink(missing_ok=True)
        subprocess.run(["crun", "spec"], cwd=self.folder, check=True)
        spec = json.loads(config.read_text())
        process = spec["process"]
        process.update(terminal=False, args=list(command), cwd="/", noNewPrivileges=False)
        process["env"] = [f"PATH={os.environ['PATH']}", f"PYTHONPATH={os.getcwd()}"]
        names = [f"CAP_{name}" for number, name in enumerate(_CAPABILITIES) if linux.has_capability(number)]
        process["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), names)
        process.pop("rlimits", None)
        spec["root"] = {"path": str(self.rootfs), "readonly": False}
        spec["mounts"] = [one for one in spec["mounts"] if "cgroup" not in one["type"]]
        spec["linux"] = {"namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")]}
        config.write_text(json.dumps(spec))

    def start(self, name: str, output: IO[bytes] | int) -> subprocess.Popen[bytes]:
        """Run the container; what is returned ends with it, and has its exit status."""
        return subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", _CGROUP2, "crun", "run", name],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )


@contextlib.contextmanager
def bundle(folder: Path) -> Iterator[Bundle]:
    """A bundle in an empty folder; its root filesystem goes with the context."""
    made = Bundle(folder)
    for name in ("rootfs", "upper", "work"):
        (folder / name).mkdir()
    layers = f"lowerdir=/,upperdir={folder}/upper,workdir={folder}/work"
    linux.mount("overlay", str(made.rootfs), "overlay", 0, layers)
    try:
        yield made
    finally:
        linux.umount(str(made.rootfs), _MNT_DETACH)


def pid_1(container: subprocess.Popen[bytes]) -> int | None:
    """The pid, as seen from here, of the process that is pid 1 in a container; None before it is there."""
    for child in Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{child}/status").read_text()
            if next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:] == [child, "1"]:
                return int(child)
    return None
