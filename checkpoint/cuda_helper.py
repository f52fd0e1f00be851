"""The helper process that owns the CUDA driver, and what a snapshot asks of it: whole trees, all or nothing.

A process of its own because opening the driver takes seconds where there are many GPUs, because a call into it can hang
(another process of an NCCL group that is locked makes even the question for a state hang) or crash, and because what
opens the driver could itself never be checkpointed. It has a session of its own, so that a Ctrl-C on our terminal does
not end it in the middle of a call, and sees every GPU whatever CUDA_VISIBLE_DEVICES says. It ends with our end of its
socket. Requests have deadlines; a helper that misses one is killed, and the next request starts another.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, Self

import msgspec

from checkpoint.cuda import INVALID_VALUE, NO_DEVICE, NOT_INITIALIZED, NOT_READY, OUT_OF_MEMORY, Pair
from checkpoint.cuda_program import Answer, Request
from checkpoint.errors import CudaError, RetryError
from checkpoint.nvml import Device
from checkpoint.states import State, Step, way

REAL_DRIVER: Final = "checkpoint.cuda"
_OPEN_S: Final = 120.0  # cuInit was seen to take tens of seconds on hosts with 8 GPUs and no persistence mode
_ASK_S: Final = 20.0
_MOVE_S: Final = 600.0
_LOCK_MARGIN_S: Final = 10.0
_END_S: Final = 2.0
_NO_CUDA: Final = frozenset({INVALID_VALUE, NOT_INITIALIZED})
"""What the driver answers for a process that has no CUDA state."""
_DEVICE_FILE: Final = "/dev/nvidiactl"
_HIDING: Final = ("CUDA_VISIBLE_DEVICES", "CUDA_MPS_PIPE_DIRECTORY")


class HelperLostError(CudaError):
    """The helper ended or missed a deadline in the middle of a request. What the driver did of it is not known."""


class Helper:
    """The client's end of the helper process. For one thread at a time.

    Args:
        module: the one whose `open_driver()` it calls.

    Raises:
        CudaError: the driver can't be opened; says why and what to do.
        HelperLostError: it ended, or opening took more than 120 s.
    """

    def __init__(self, module: str = REAL_DRIVER) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            environment = {name: value for name, value in os.environ.items() if name not in _HIDING}
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "checkpoint.cuda_program", str(theirs.fileno()), module],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # ours may be a JSON document
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=environment,
            )
        self._socket = ours
        self._rest = b""
        self._decoder = msgspec.json.Decoder(Answer)
        try:
            self.version = self._answer(_OPEN_S, "opening the driver").text
        except CudaError:
            self.close()
            raise

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

        Raises:
            CudaError: the driver refused; carries its code.
            HelperLostError: no answer in time, or the helper ended; it is gone then.
        """
        what = f"{request.call} of process {request.pid}" if request.pid else request.call
        try:
            self._socket.sendall(msgspec.json.encode(request) + b"\n")
        except OSError as error:
            self.close()
            raise HelperLostError(f"the CUDA helper process is gone ({what} was to come): {error}") from error
        return self._answer(timeout_s, what)

    def close(self) -> None:
        """End it: at once if it does not end by itself in 2 s."""
        self._socket.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            # A process in an uninterruptible call of the driver can't be waited for.
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_END_S)

    def _answer(self, timeout_s: float, what: str) -> Answer:
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                received = self._socket.recv(65536)
            except TimeoutError as error:
                self._process.kill()
                self.close()
                raise HelperLostError(
                    f"{what}: the CUDA driver did not answer within {timeout_s:.0f} s",
                    mend="processes that share GPU memory with each other (NCCL) can't be checkpointed by this driver",
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
        answer = self._decoder.decode(line)
        if answer.failure:
            raise CudaError(answer.failure, mend=answer.mend, result=answer.result)
        return answer


class Cuda:
    """The GPU side of a process tree's snapshot. For one thread at a time; a context manager.

    Every operation on several processes either succeeds for all, or leaves each in the state it was found in and
    raises; processes that could not be brought back are named in the error's `stuck`.
    """

    def __init__(self, module: str = REAL_DRIVER) -> None:
        """Open the driver, as `module` has it.

        Raises:
            CudaError: it can't be opened.
        """
        self._module = module
        self._helper: Helper | None = Helper(module)
        self.version = self._helper.version

    @classmethod
    def detect(cls) -> Cuda | None:
        """The driver of this machine; None where there is none. `absence` says why.

        Raises:
            CudaError: there is one, but it can't be used: a GPU's process can't be snapshotted then.
        """
        if absence() is not None:
            return None
        try:
            return cls()
        except CudaError as error:
            if error.result == NO_DEVICE:
                return None
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the helper process."""
        if self._helper is not None:
            self._helper.close()
            self._helper = None

    def devices(self) -> tuple[Device, ...]:
        """Every GPU, with its memory as it is now."""
        return self._ask(Request(call="devices"), _ASK_S).devices

    def used_bytes(self, pids: Sequence[int]) -> dict[str, int]:
        """What these processes hold of each GPU, by UUID: what a restore needs there. GPUs not used are left out."""
        used = {one.uuid: sum(one.used_bytes.get(pid, 0) for pid in pids) for one in self.devices()}
        return {uuid: count for uuid, count in used.items() if count}

    def find(self, pids: Sequence[int]) -> list[int]:
        """Which of these processes are CUDA processes, in the order given.

        Raises:
            CudaError: the driver can't tell of one.
        """
        return list(self.states(pids))

    def states(self, pids: Sequence[int]) -> dict[int, State]:
        """The state of each CUDA process among these; others are left out."""
        found = {}
        for pid in pids:
            try:
                found[pid] = self._state(pid)
            except CudaError as error:
                if error.result not in _NO_CUDA:
                    raise
        return found

    def restore_thread(self, pid: int) -> int:
        """The thread of a CUDA process that carries out what is asked of it, which must run while others are frozen."""
        return self._ask(Request(call="restore_thread", pid=pid), _ASK_S).number

    def lock_all(self, pids: Sequence[int], timeout_s: float) -> None:
        """Let each finish the GPU work it has begun, and stop its CUDA calls.

        Args:
            pids: CUDA processes that run.
            timeout_s: for all of them together.

        Raises:
            RetryError: one did not come to rest in time; all run again.
            CudaError: see the class.
        """
        deadline = time.monotonic() + timeout_s
        self._all(Step.LOCK, pids, deadline=deadline)

    def checkpoint_all(self, pids: Sequence[int], timeout_s: float = _MOVE_S) -> None:
        """Bring the GPU memory of processes that are locked into their host memory; `timeout_s` is for each."""
        self._all(Step.CHECKPOINT, pids, timeout_s=timeout_s)

    def restore_all(
        self,
        pids: Sequence[int],
        pairs: Sequence[Pair] = (),
        *,
        needed_bytes: Mapping[str, int] | None = None,
        timeout_s: float = _MOVE_S,
    ) -> None:
        """Bring it back onto the GPUs. The processes stay locked.

        Args:
            pids: CUDA processes that are checkpointed.
            pairs: which GPU here takes the place of which in the snapshot: none, or every GPU of the machine.
            needed_bytes: what they held of each GPU, by its UUID in the snapshot; looked for before anything is done.
            timeout_s: for each of them.

        Raises:
            RetryError: a GPU has too little memory free now. Nothing was done.
            CudaError: see the class. A process whose restore failed for lack of memory can only be ended: the driver
                refuses it ever after. It counts as stuck.
        """
        self.require_free(needed_bytes or {}, pairs)
        self._all(Step.RESTORE, pids, pairs=tuple(pairs), timeout_s=timeout_s)

    def unlock_all(self, pids: Sequence[int]) -> None:
        """Let processes that are locked go on."""
        self._all(Step.UNLOCK, pids)

    def settle(self, wanted: Mapping[int, State]) -> None:
        """Bring each process into the state wanted, by whatever way leads there: what a journal or an undo asks for.

        Raises:
            CudaError: some could not be; they are its `stuck`. The others are.
        """
        stuck = {pid: word for pid, state in wanted.items() if (word := self._brought(pid, state)) is not None}
        if stuck:
            raise CudaError(_listed(stuck), mend=_mend(stuck), stuck=stuck)

    def require_free(self, needed_bytes: Mapping[str, int], pairs: Sequence[Pair] = ()) -> None:
        """See that each GPU has the memory free that a restore needs there.

        Raises:
            RetryError: one has not. The figures of a GPU that is not here are left to `checkpoint.fingerprint`.
        """
        if not needed_bytes:
            return
        onto = dict(pairs)
        free = {one.uuid: one for one in self.devices()}
        for uuid, needed in needed_bytes.items():
            device = free.get(onto.get(uuid, uuid))
            if device is not None and device.free_bytes < needed:
                raise RetryError(
                    f"{device.name} ({device.uuid}) has {device.free_bytes >> 20} MiB free,"
                    f" and {needed >> 20} MiB are needed",
                    mend="nvidia-smi shows who uses it",
                )

    def _all(
        self,
        step: Step,
        pids: Sequence[int],
        *,
        pairs: tuple[Pair, ...] = (),
        timeout_s: float = _ASK_S,
        deadline: float | None = None,
    ) -> None:
        # Every state is read before the first process is touched: with one locked, asking for another's can hang.
        found = {pid: self._state(pid) for pid in pids}
        for pid, state in found.items():
            if state is not step.before:
                raise CudaError(
                    f"process {pid} is {state.word}, and can't be {_PAST[step]}",
                    mend="weightfs snapshot recover puts right what a snapshot left half done",
                )
        touched: dict[int, State] = {}
        for pid in pids:
            touched[pid] = found[pid]
            try:
                self._take(step, pid, pairs=pairs, timeout_s=timeout_s, deadline=deadline)
            except CudaError as error:
                raise self._undone(step, pid, error, touched) from error

    def _take(
        self, step: Step, pid: int, *, pairs: tuple[Pair, ...] = (), timeout_s: float, deadline: float | None = None
    ) -> None:
        timeout_ms = 0
        if step is Step.LOCK:
            left_s = _LOCK_MARGIN_S if deadline is None else deadline - time.monotonic()
            timeout_ms = max(1, int(left_s * 1000))  # 0 would wait for ever
            timeout_s = timeout_ms / 1000 + _LOCK_MARGIN_S
        self._ask(Request(call=step.value, pid=pid, timeout_ms=timeout_ms, pairs=pairs), timeout_s)

    def _undone(self, step: Step, failed: int, error: CudaError, touched: Mapping[int, State]) -> Exception:
        """Bring everything back to where it was, and say how that went."""
        # The one that failed last: a call about it may hang until those it shares GPU memory with are unlocked.
        order = [*(pid for pid in reversed(touched) if pid != failed), failed]
        stuck = {pid: word for pid in order if (word := self._brought(pid, touched[pid])) is not None}
        if step is Step.RESTORE and error.result == OUT_OF_MEMORY:
            stuck[failed] = f"{State.CHECKPOINTED.word} for good"
        if stuck:
            return CudaError(f"{error.message}; {_listed(stuck)}", mend=_mend(stuck), result=error.result, stuck=stuck)
        if step is Step.LOCK and error.result == NOT_READY:
            return RetryError(f"process {failed} did not come to rest in time: its GPU work or a CUDA call goes on")
        return CudaError(error.message, mend=error.mend, result=error.result)

    def _brought(self, pid: int, wanted: State) -> str | None:
        """None once a process is in a state or gone; else the word for where it is."""
        try:
            now = self._state(pid)
        except CudaError:
            return None if not _alive(pid) else "not known"
        steps = way(now, wanted)
        if steps is None:
            return now.word
        for step in steps:
            try:
                self._take(step, pid, timeout_s=_MOVE_S)
            except CudaError:
                return now.word if _alive(pid) else None
            now = step.after
        return None

    def _state(self, pid: int) -> State:
        return State(self._ask(Request(call="state", pid=pid), _ASK_S).number)

    def _ask(self, request: Request, timeout_s: float) -> Answer:
        if self._helper is None:
            self._helper = Helper(self._module)
        try:
            return self._helper.ask(request, timeout_s)
        except HelperLostError:
            self._helper = None
            raise


_PAST: Final = {
    Step.LOCK: "locked",
    Step.CHECKPOINT: "checkpointed",
    Step.RESTORE: "restored",
    Step.UNLOCK: "unlocked",
}


def absence() -> str | None:
    """Why this machine has no GPU to checkpoint, None if it has: by its device file, without opening anything."""
    if not os.path.exists(_DEVICE_FILE):
        return f"no Nvidia driver: there is no {_DEVICE_FILE}"
    return None


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def _listed(stuck: Mapping[int, str]) -> str:
    return ", ".join(f"process {pid} is stuck: {word}" for pid, word in stuck.items())


def _mend(stuck: Mapping[int, Any]) -> str:
    return f"end what is stuck: kill -9 {' '.join(str(pid) for pid in stuck)}"
