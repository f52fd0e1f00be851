"""What runs in the CUDA helper process: reads requests from a socket, asks the driver, answers.

    python -m checkpoint.cuda_program FD MODULE

FD is one end of a stream socket pair. MODULE is the one whose `open_driver()` gives the driver: `checkpoint.cuda`, and
in tests the double. One JSON document a line each way, one answer a request, in order. The first line it sends is the
answer to no request: how opening the driver went. It ends when the other end of the socket is closed, by whatever; a
call into the driver that is under way then is finished first, since nobody could say what state one cut short leaves.
"""

from __future__ import annotations

import atexit
import importlib
import os
import signal
import socket
import sys
from typing import Literal

import msgspec

from checkpoint.cuda import Driver
from checkpoint.errors import CudaError
from checkpoint.nvml import Device
from weightfs.errors import WeightfsError


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A call into the driver.

    Attributes:
        call: which one.
        pid: the process it is about; 0 where it is about none.
        timeout_ms: of a lock; 0 waits for ever.
        pairs: of a restore: GPU of the snapshot, GPU here.
        serial: counts up; the answer has the same.
    """

    call: Literal["version", "devices", "moves", "state", "lock", "checkpoint", "restore", "unlock", "restore_thread"]
    pid: int = 0
    timeout_ms: int = 0
    pairs: tuple[tuple[str, str], ...] = ()
    serial: int = 0


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What came of it.

    Attributes:
        failure: why it failed, empty if it did not; `result` and `mend` are then those of the CudaError.
        number: a state, a thread, or 1 for yes.
        text: the version.
        devices: the GPUs.
        serial: that of the request.
    """

    failure: str = ""
    result: int = 0
    mend: str | None = None
    number: int = 0
    text: str = ""
    devices: tuple[Device, ...] = ()
    serial: int = 0


def answer(driver: Driver, request: Request) -> Answer:
    """Carry a request out. Never raises what the driver raised: it is in the answer."""
    try:
        match request.call:
            case "version":
                return Answer(text=driver.version())
            case "devices":
                return Answer(devices=driver.devices())
            case "moves":
                return Answer(number=int(driver.moves()))
            case "state":
                return Answer(number=int(driver.process_state(request.pid)))
            case "lock":
                driver.lock(request.pid, request.timeout_ms)
            case "checkpoint":
                driver.checkpoint(request.pid)
            case "restore":
                driver.restore(request.pid, request.pairs)
            case "unlock":
                driver.unlock(request.pid)
            case "restore_thread":
                return Answer(number=driver.restore_thread_id(request.pid))
    except CudaError as error:
        return _failed(error)
    return Answer()


def _failed(error: WeightfsError) -> Answer:
    return Answer(failure=error.message, result=error.result if isinstance(error, CudaError) else 0, mend=error.mend)


def serve(channel: socket.socket, module: str) -> None:
    """Answer until the other end is closed."""
    encoder = msgspec.json.Encoder()
    requests = msgspec.json.Decoder(Request)

    def send(message: Answer) -> None:
        channel.sendall(encoder.encode(message) + b"\n")

    try:
        driver: Driver = importlib.import_module(module).open_driver()
    except CudaError as error:
        send(_failed(error))
        return
    send(Answer(text=driver.version()))
    with channel.makefile("rb") as lines:
        for line in lines:
            request = requests.decode(line)
            send(msgspec.structs.replace(answer(driver, request), serial=request.serial))


def main() -> None:
    """Run it. The client may be gone at any time: that is the usual end, not a fault.

    What the driver would do at a process's end is left to the kernel: its client waits for that end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        try:
            serve(channel, sys.argv[2])
        except (BrokenPipeError, ConnectionResetError):
            pass
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
