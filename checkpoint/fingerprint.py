"""What a snapshot needs of a machine."""

from __future__ import annotations

import msgspec


class Gpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A GPU as a snapshot needs it.

    Attributes:
        model: as the driver names it, such as `NVIDIA H100 80GB HBM3`.
        memory_bytes: all of it, free or not.
    """

    model: str
    memory_bytes: int


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine and the surroundings of a process on it, as far as a restore depends on them.

    Attributes:
        architecture: as uname(2) says it, such as `x86_64`.
        page_bytes: of a page of memory.
        cpu: the processor's name; for people only.
        cpu_features: what /proc/cpuinfo lists as flags, sorted.
        kernel: its release, such as `6.18.5-amd64`.
        criu: CRIU's version, such as `4.1.1`.
        driver: the NVIDIA driver's version, None where there is none.
        gpus: in the order in which the driver numbers them.
        image: the id of the container image the process runs from, None where none is known.
        mountpoint: where the weights are mounted, None where no process has any open.
        command: the command line of the root process.
    """

    architecture: str
    page_bytes: int
    cpu: str
    cpu_features: list[str]
    kernel: str
    criu: str
    driver: str | None = None
    gpus: list[Gpu] = []
    image: str | None = None
    mountpoint: str | None = None
    command: list[str] = []
