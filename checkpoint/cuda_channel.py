"""Our end of the CUDA helper process: starts it, asks it, gives it up when it does not answer.

A process of its own because opening the driver takes seconds where there are many GPUs, because a call into it can hang
(while one process of an NCCL group is locked, even the question for the state of another hangs) or crash, and because a
process that has the driver open could itself never be checkpointed. It has a session of its own, so that a Ctrl-C on
our terminal does not end it in the middle of a call, sees every GPU whatever CUDA_VISIBLE_DEVICES says, and ends when
our end of its socket is closed.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Final

import msgspec

from checkpoint.cuda_program import Answer, Request
from checkpoint.errors import CudaError
from weightfs import linux

_END_S: Final = 2.0
_RECEIVED_BYTES: Final = 1 << 16
_HIDING: Final = ("CUDA_VISIBLE_DEVICES", "CUDA_MPS_PIPE_DIRECTORY")
_MEND_HANGS: Final = "processes that share GPU memory with each other (NCCL) can't be checkpointed by this driver"


class HelperLostError(CudaError):
    """The helper ended or missed a deadline in the middle of a request. What the driver did of it is not known."""


class Helper:
    """The client's end of the helper process. For one thread at a time.

    It is started at once, and opens the driver while its client does something else: the first request waits for that.

    Args:
        module: the one whose `open_driver()` it calls.
        open_s: how long that may take.

    Raises:
        CudaError: it can't be started.
    """

    def __init__(self, module: str, open_s: float) -> None:
        ours, theirs = socket.socketpair()
        environment = {name: value for name, value in os.environ.items() if name not in _HIDING}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "checkpoint.cuda_program", str(theirs.fileno()), module],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # ours may be a JSON document
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=environment,
            )
        except OSError as e:
            ours.close()
            raise CudaError(f"the CUDA helper process can't be started: {e.strerror}") from e
        finally:
            theirs.close()
        self._socket = ours
        self._rest = b""
        self._serial = 0
        self._decoder = msgspec.json.Decoder(Answer)
        self._open_by = time.monotonic() + open_s
        self._version: str | None = None

    def version(self) -> str:
        """The driver's version, once it is open.

        Raises:
            CudaError: the driver can't be opened; says why and what to do.
            HelperLostError: the helper ended, or opening took too long.
        """
        if self._version is None:
            try:
                self._version = self._answer(self._open_by - time.monotonic(), "opening the driver").text
            except CudaError:
                self.close()
                raise
        return self._version

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """It can be asked: it neither ended nor missed a deadline."""
        return self._process.poll() is None and self._socket.fileno() >= 0

    def ask(self, request: Request, timeout_s: float) -> Answer:
        """One call into the driver.

        When it is left early, as by a KeyboardInterrupt, the call goes on, and the next request waits for it to end.

        Raises:
            CudaError: the driver refused; carries its code. Or it can't be opened, see `version`.
            HelperLostError: no answer in time, or the helper ended; it is gone then.
        """
        self.version()
        what = f"{request.call} of process {request.pid}" if request.pid else request.call
        try:
            self._serial += 1
            self._socket.settimeout(timeout_s)
            self._socket.sendall(msgspec.json.encode(msgspec.structs.replace(request, serial=self._serial)) + b"\n")
        except OSError as error:
            self.close()
            raise HelperLostError(f"the CUDA helper process is gone ({what} was to come): {error}") from error
        return self._answer(timeout_s, what)

    def close(self) -> None:
        """End it: at once if it has not been asked anything yet, or does not end by itself in 2 s."""
        self._socket.close()
        if self._version is None:
            self._process.kill()
        if not self._has_ended(_END_S):
            self._process.kill()
            self._has_ended(_END_S)  # a process in an uninterruptible call of the driver can't be waited for

    def _has_ended(self, timeout_s: float) -> bool:
        """Whether it ends in time; told at once, where `Popen.wait` looks every 50 ms."""
        with suppress(ProcessLookupError):
            pidfd = os.pidfd_open(self._process.pid)
            try:
                linux.is_readable(pidfd, timeout_s)
            finally:
                os.close(pidfd)
        return self._process.poll() is not None

    def _answer(self, timeout_s: float, what: str) -> Answer:
        deadline = time.monotonic() + timeout_s
        while True:
            answer = self._decoder.decode(self._line(deadline, timeout_s, what))
            if answer.serial < self._serial:
                continue  # nobody waited for it any more
            if answer.failure:
                raise CudaError(answer.failure, mend=answer.mend, result=answer.result)
            return answer

    def _line(self, deadline: float, timeout_s: float, what: str) -> bytes:
        while b"\n" not in self._rest:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                received = self._socket.recv(_RECEIVED_BYTES)
            except TimeoutError as error:
                self._process.kill()
                self.close()
                raise HelperLostError(
                    f"{what}: the CUDA driver did not answer within {timeout_s:.0f} s",
                    mend=_MEND_HANGS,
                ) from error
            except OSError as error:
                received = b""
                reason = str(error)
            else:
                reason = "it ended"
            if not received:
                self.close()
                status = self._process.poll()
                raise HelperLostError(f"{what}: the CUDA helper process is gone: {reason}, status {status}")
            self._rest += received
        line, self._rest = self._rest.split(b"\n", 1)
        return line
