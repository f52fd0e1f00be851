"""The GPU side of a snapshot: every CUDA process of a tree is locked, checkpointed, restored and unlocked, or none is.

The driver is asked through a helper process (`checkpoint.cuda_channel`). Requests have deadlines; when the helper dies
or misses one, it is given up, and the next request, such as that of an undo, starts another.
"""

from __future__ import annotations

import glob
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Final, Self

import msgspec

from checkpoint.cuda import ILLEGAL_STATE, NOT_INITIALIZED, NOT_READY, NOT_SUPPORTED, OUT_OF_MEMORY, Pair
from checkpoint.cuda_channel import Helper, HelperLostError
from checkpoint.cuda_program import Answer, Request
from checkpoint.errors import CudaError, MisfitError, RetryError
from checkpoint.nvml import Device
from checkpoint.states import State, Step, way

REAL_DRIVER: Final = "checkpoint.cuda"
_TRIES: Final = 3
"""How often a way is begun anew because the process is not where it was a moment ago: a call whose helper or client was
killed may still be under way."""
_CONTROL_FILE: Final = "/dev/nvidiactl"
_GPU_FILES: Final = "/dev/nvidia[0-9]*"
_MEND_KINDS: Final = "the driver can't checkpoint managed memory (cudaMallocManaged): have the process do without"
_MEND_RECOVER: Final = "weightfs snapshot recover puts right what a snapshot left half done"

_log = logging.getLogger(__name__)


class Deadlines(msgspec.Struct, frozen=True, kw_only=True):
    """How long the driver may take before its helper is given up, in seconds.

    Attributes:
        open_s: to initialise: tens of seconds on hosts with many GPUs and no persistence mode.
        ask_s: to answer what takes it milliseconds.
        move_s: to bring one process's GPU memory to the host or back: 80 GB take 60 s (H100, driver 580). Also to
            answer about a process that may still be amid that, since the driver has every question wait.
        lock_s: to stop a process's calls on the way of an undo.
        margin_s: beyond a lock's own timeout, which the driver keeps.
    """

    open_s: float = 120.0
    ask_s: float = 20.0
    move_s: float = 600.0
    lock_s: float = 10.0
    margin_s: float = 10.0


class Cuda:
    """The GPU side of a process tree's snapshot. For one thread at a time; a context manager.

    Every operation on several processes either succeeds for all, or leaves each in the state it was found in and
    raises; processes that could not be brought back are named in the error's `stuck`.
    """

    def __init__(self, module: str | None = None, deadlines: Deadlines | None = None) -> None:
        """Begin to open the driver, as `module` has it; the first question waits for that.

        Every method raises CudaError if the driver can't be opened.
        """
        self._module = module or REAL_DRIVER
        self._deadlines = deadlines or Deadlines()
        self._helper: Helper | None = Helper(self._module, self._deadlines.open_s)

    @classmethod
    def detect(cls) -> Cuda | None:
        """The driver of this machine; None where there is no driver or no GPU. `absence` says which.

        One that is there and can't be used is not None: what is asked of it raises.
        """
        return cls() if absence() is None else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the helper process."""
        if self._helper is not None:
            self._helper.close()
            self._helper = None

    def version(self) -> str:
        """The driver's version, as `580.159.04`."""
        return self._ask(Request(call="version"), self._deadlines.ask_s).text

    def devices(self) -> tuple[Device, ...]:
        """Every GPU, with its memory as it is now."""
        return self._ask(Request(call="devices"), self._deadlines.ask_s).devices

    def moves(self) -> bool:
        """Whether the driver can restore onto other GPUs of the same model (driver 580, cuda-bindings 13)."""
        return self._ask(Request(call="moves"), self._deadlines.ask_s).number == 1

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
                # What the driver says of a process that never initialised CUDA, or was forked by one that did; of one
                # that has ended it says no more than that a system call failed (driver 580).
                if error.result != NOT_INITIALIZED and _alive(pid):
                    raise
        return found

    def restore_thread(self, pid: int) -> int:
        """The thread of a CUDA process that carries out what is asked of it, which must run while others are frozen."""
        return self._ask(Request(call="restore_thread", pid=pid), self._deadlines.ask_s).number

    def lock_all(self, pids: Sequence[int], timeout_s: float) -> None:
        """Let each finish the GPU work it has begun, and stop its CUDA calls.

        Args:
            pids: CUDA processes that run.
            timeout_s: for all of them together.

        Raises:
            MisfitError: one uses an instance of a GPU that is cut up (MIG). Nothing was done.
            RetryError: one did not come to rest in time; all run again.
            CudaError: see the class.
        """
        self._require_whole_gpus(pids)
        self._all(Step.LOCK, pids, deadline=time.monotonic() + timeout_s)

    def checkpoint_all(self, pids: Sequence[int]) -> None:
        """Bring the GPU memory of processes that are locked into their host memory."""
        self._all(Step.CHECKPOINT, pids)

    def restore_all(
        self,
        pids: Sequence[int],
        pairs: Sequence[Pair] = (),
        *,
        needed_bytes: Mapping[str, int] | None = None,
    ) -> None:
        """Bring it back onto the GPUs. The processes stay locked.

        Args:
            pids: CUDA processes that are checkpointed.
            pairs: which GPU here takes the place of which in the snapshot: none, or every GPU of the machine.
            needed_bytes: what they held of each GPU, by its UUID in the snapshot; looked for before anything is done.

        Raises:
            RetryError: a GPU has too little memory free now. Nothing was done.
            CudaError: see the class. A process whose restore failed for lack of memory can only be ended: the driver
                refuses it ever after. It counts as stuck.
        """
        self.require_free(needed_bytes or {}, pairs)
        self._all(Step.RESTORE, pids, pairs=tuple(pairs))

    def unlock_all(self, pids: Sequence[int]) -> None:
        """Let processes that are locked go on. One that can't be does not keep the others locked.

        Raises:
            CudaError: one was not locked, and nothing was done; or some are stuck, which it names.
        """
        self._require(Step.UNLOCK, pids)
        self._settle(dict.fromkeys(pids, State.RUNNING), self._deadlines.ask_s)

    def settle(self, wanted: Mapping[int, State]) -> None:
        """Bring each process into the state wanted, by whatever way leads there: what a journal or an undo asks for.

        A call that another helper, killed since, has begun is waited for.

        Raises:
            CudaError: some could not be; they are its `stuck`. The others are.
        """
        self._settle(wanted, self._deadlines.move_s)

    def _settle(self, wanted: Mapping[int, State], ask_s: float) -> None:
        stuck = {pid: word for pid, state in wanted.items() if (word := self._brought(pid, state, ask_s)) is not None}
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

    def _require_whole_gpus(self, pids: Sequence[int]) -> None:
        """Only a checkpoint would say of an instance that it can't be, and in words of its own: out of memory."""
        for device in self.devices():
            if device.mig and any(pid in device.used_bytes for pid in pids):
                raise MisfitError(
                    f"{device.name} ({device.uuid}) is cut into instances (MIG), which the driver can't checkpoint",
                    mend="run it on a whole GPU",
                )

    def _all(
        self,
        step: Step,
        pids: Sequence[int],
        *,
        pairs: tuple[Pair, ...] = (),
        deadline: float | None = None,
    ) -> None:
        self._require(step, pids)
        touched: list[int] = []
        for pid in pids:
            try:
                self._take(step, pid, pairs=pairs, deadline=deadline)
            except CudaError as error:
                raise self._undone(step, pid, error, touched) from error
            touched.append(pid)

    def _require(self, step: Step, pids: Sequence[int]) -> None:
        """See that each is in the state a step starts from, before the first one is touched."""
        for pid in pids:
            if (state := self._state(pid)) is not step.before:
                raise CudaError(f"process {pid} is {state.word}, and can't be {_PAST[step]}", mend=_MEND_RECOVER)

    def _take(self, step: Step, pid: int, *, pairs: tuple[Pair, ...] = (), deadline: float | None = None) -> None:
        timeout_ms = 0
        timeout_s = self._deadlines.ask_s if step is Step.UNLOCK else self._deadlines.move_s
        if step is Step.LOCK:
            left_s = self._deadlines.lock_s if deadline is None else deadline - time.monotonic()
            timeout_ms = max(1, int(left_s * 1000))  # 0 would wait for ever
            timeout_s = timeout_ms / 1000 + self._deadlines.margin_s
        self._ask(Request(call=step.value, pid=pid, timeout_ms=timeout_ms, pairs=pairs), timeout_s)

    def _undone(self, step: Step, failed: int, error: CudaError, touched: Sequence[int]) -> Exception:
        """Bring everything back to where it was, and say how that went."""
        # The one that failed last: a call about it may hang until those it shares GPU memory with are unlocked.
        order = [*reversed(touched), failed]
        # The driver goes on with what a helper that is gone has asked for, and has every question wait for that.
        last_s = self._deadlines.move_s if isinstance(error, HelperLostError) else self._deadlines.ask_s
        within = dict.fromkeys(order, self._deadlines.ask_s) | {failed: last_s}
        stuck = {pid: word for pid, ask_s in within.items() if (word := self._brought(pid, step.before, ask_s))}
        if step is Step.RESTORE and error.result == OUT_OF_MEMORY:
            stuck[failed] = State.CHECKPOINTED.word  # where it was found, but no way leads on from there any more
        if stuck:
            return CudaError(f"{error.message}; {_listed(stuck)}", mend=_mend(stuck), result=error.result, stuck=stuck)
        if step is Step.LOCK and error.result == NOT_READY:
            return RetryError(f"process {failed} did not come to rest in time: its GPU work or a CUDA call goes on")
        mend = _MEND_KINDS if step is Step.CHECKPOINT and error.result == NOT_SUPPORTED else error.mend
        return CudaError(error.message, mend=mend, result=error.result)

    def _brought(self, pid: int, wanted: State, ask_s: float) -> str | None:
        """None once a process is in a state or gone; else the word for where it stays.

        `ask_s`: how long its state may take, each of the `_TRIES`.
        """
        now: State | None = None
        failure = None
        for _ in range(_TRIES):
            try:
                now = self._state(pid, ask_s)
                steps = way(now, wanted)
                if steps is None:
                    return now.word
                for step in steps:
                    self._take(step, pid)
                    now = step.after
                return None
            except CudaError as error:
                failure = error
                if error.result != ILLEGAL_STATE:
                    break
        if not _alive(pid):
            return None
        _log.warning("process %d can't be brought to %s: %s", pid, wanted.word, failure)
        return now.word if now is not None else "unknown"

    def _state(self, pid: int, ask_s: float | None = None) -> State:
        return State(self._ask(Request(call="state", pid=pid), ask_s or self._deadlines.ask_s).number)

    def _ask(self, request: Request, timeout_s: float) -> Answer:
        # One that ended while nothing was asked of it has left nothing half done.
        if self._helper is None or not self._helper.alive:
            self.close()
            self._helper = Helper(self._module, self._deadlines.open_s)
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
    """Why this machine has no GPU to checkpoint, None if it has: by its device files, without opening anything."""
    if not os.path.exists(_CONTROL_FILE):
        return f"no Nvidia driver: there is no {_CONTROL_FILE}"
    if not glob.glob(_GPU_FILES):
        return f"no GPU: there is no {_GPU_FILES}"
    return None


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def _listed(stuck: Mapping[int, str]) -> str:
    return ", ".join(f"process {pid} is stuck: {word}" for pid, word in stuck.items())


def _mend(stuck: Mapping[int, str]) -> str:
    return f"end what is stuck: kill -9 {' '.join(str(pid) for pid in stuck)}"
