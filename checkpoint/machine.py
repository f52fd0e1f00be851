"""What of this machine counts for a restore, asked of CRIU, the kernel and the GPUs' driver."""

from __future__ import annotations

from collections.abc import Iterable

from checkpoint.criu import Criu, find_criu
from checkpoint.errors import CudaError
from checkpoint.fingerprint import Fingerprint, Gpu
from checkpoint.nvml import Nvml


def fingerprint_here(
    *, criu: Criu | None = None, mountpoint: str | None = None, command: Iterable[str] = (), root: str = "/"
) -> Fingerprint:
    """This machine's fingerprint; 20 ms, without a CUDA context.

    Args:
        criu: the one to be used, None to look for it.
        mountpoint, command, root: see `Fingerprint.here`.

    Raises:
        MisfitError: there is no CRIU that could restore anything.
    """
    version = (criu or find_criu(check=False)).version
    driver, gpus = gpus_here()
    return Fingerprint.here(
        criu=".".join(map(str, version)),
        driver=driver,
        gpus=gpus,
        mountpoint=mountpoint,
        command=command,
        root=root,
    )


def gpus_here() -> tuple[str | None, tuple[Gpu, ...]]:
    """The NVIDIA driver's version and its GPUs; None and none where there is no driver that answers."""
    try:
        library = Nvml()
        devices = library.devices()
        return library.driver_version(), tuple(
            Gpu(model=device.name, memory_bytes=device.total_bytes) for device in devices
        )
    except CudaError:
        return None, ()
