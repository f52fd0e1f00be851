"""What the driver's checkpoint can't take along, as far as it shows from outside of the process.

Managed memory (UVM) and memory shared by handle (CUDA IPC) do not show in /proc: of those the driver's own answer tells
when it is asked to lock or checkpoint. Nor does a part of a GPU (MIG) show: every process of an H100 has files below
/dev/nvidia-caps open. Of that the management library tells (`checkpoint.cuda_helper`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from checkpoint.findings import Finding
from checkpoint.processes import Process
from checkpoint.sockets import Socket

_GPU: Final = ("/dev/nvidia", "/dev/dri/")
_RDMA: Final = "/dev/infiniband/"
_MPS: Final = "nvidia-mps"
_SHARED: Final = ("/dev/shm/nccl-", "/dev/shm/cuda.shm")


def is_gpu_device(path: str) -> bool:
    """Whether it is a device that the driver closes when it checkpoints a process, and opens again."""
    return path.startswith("/dev/nvidia")


def gpu_findings(processes: Sequence[Process], sockets: Mapping[int, Socket]) -> Iterator[Finding]:
    """MPS, RDMA and shared memory of several GPU processes."""
    for process in processes:
        opened = [one.target for one in process.descriptors] + [one.path for one in process.mappings]
        inodes = {one.inode for one in process.descriptors if one.kind == "socket"}
        uses_gpu = any(path.startswith(_GPU) for path in opened)
        if any(_MPS in sockets[one].remote for one in inodes & sockets.keys()):
            yield Finding(
                code="mps",
                pid=process.pid,
                what="it is a client of the CUDA multi-process service (MPS)",
                why="the driver does not checkpoint such processes",
                mend="start it where no MPS daemon runs (unset CUDA_MPS_PIPE_DIRECTORY)",
                fatal=True,
            )
        if rdma := next((path for path in opened if path.startswith(_RDMA)), None):
            yield Finding(
                code="rdma",
                pid=process.pid,
                what=f"it has {rdma} open",
                why="neither the driver nor CRIU can take RDMA along",
                mend="NCCL_IB_DISABLE=1",
                fatal=True,
            )
        if uses_gpu and (shared := next((path for path in opened if path.startswith(_SHARED)), None)):
            yield Finding(
                code="gpu-shared-memory",
                pid=process.pid,
                what=f"it shares GPU buffers with other processes ({shared})",
                why="the driver may refuse to checkpoint memory shared between processes (CUDA IPC)",
                mend="end the communicator before the snapshot, and make it anew after a restore",
                fatal=False,
            )
