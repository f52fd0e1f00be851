"""A CUDA driver that is none: the real one's state machine, over processes that are registered with it.

The CUDA helper process loads it by its module name. What the real driver keeps in its kernel module and in the
processes is kept in a file here, so that it outlives helpers; the environment names that file. The test's end of it is
`World`. What the real driver answers is recorded in tests/gpu/facts.json, to which this is held by a test.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, Final, Literal, NoReturn

from checkpoint.cuda import (
    ILLEGAL_STATE,
    INVALID_VALUE,
    NOT_INITIALIZED,
    NOT_READY,
    OPERATING_SYSTEM,
    OUT_OF_MEMORY,
    Pair,
    refusal,
    uuid_bytes,
)
from checkpoint.nvml import Device
from checkpoint.states import State, Step

MODULE: Final = __name__
FILE_VARIABLE: Final = "CUDA_DOUBLE_WORLD"
UUID: Final = "GPU-11111111-2222-3333-4444-555555555555"
MODEL: Final = "Double"
_MIB: Final = 1 << 20
_LOOK_S: Final = 0.002
_NAMES: Final = {
    INVALID_VALUE: "CUDA_ERROR_INVALID_VALUE",
    NOT_INITIALIZED: "CUDA_ERROR_NOT_INITIALIZED",
    OUT_OF_MEMORY: "CUDA_ERROR_OUT_OF_MEMORY",
    OPERATING_SYSTEM: "CUDA_ERROR_OPERATING_SYSTEM",
    ILLEGAL_STATE: "CUDA_ERROR_ILLEGAL_STATE",
    NOT_READY: "CUDA_ERROR_NOT_READY",
}
_FUNCTIONS: Final = {
    "state": "cuCheckpointProcessGetState",
    "lock": "cuCheckpointProcessLock",
    "checkpoint": "cuCheckpointProcessCheckpoint",
    "restore": "cuCheckpointProcessRestore",
    "unlock": "cuCheckpointProcessUnlock",
    "restore_thread": "cuCheckpointProcessGetRestoreThreadId",
    "open": "cuInit",
}

Deed = Literal["refuse", "die", "die_after", "die_amid", "hang", "hang_after"]
"""`die_amid`: the helper dies, the driver goes on; every call about the process waits until it is through."""


class World:
    """The GPUs, the CUDA processes on them and the faults to come, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def new(cls, path: Path, gpus: dict[str, int] | None = None) -> World:
        """One without processes. `gpus`: memory in MiB by UUID."""
        devices = gpus if gpus is not None else {UUID: 80_000}
        path.write_text(
            json.dumps(
                {
                    "gpus": devices,
                    "models": {},
                    "moves": True,
                    "processes": {},
                    "faults": [],
                    "calls": [],
                    "helpers": [],
                    "mig": [],
                }
            )
        )
        return cls(path)

    @contextmanager
    def change(self) -> Iterator[dict[str, Any]]:
        """What is in the file; written back, unless the block raises."""
        with open(self.path, "r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            content = json.load(file)
            yield content
            text = json.dumps(content)
            file.seek(0)
            file.write(text)
            file.truncate()

    def add(self, pid: int, mib: int = 64, *, uuid: str = UUID, group: str = "") -> int:
        """Register a running process as a CUDA one. While one of a `group` is not running, calls on others hang."""
        with self.change() as world:
            world["processes"][str(pid)] = {
                "state": int(State.RUNNING),
                "memory": {uuid: mib} if mib else {},
                "busy": False,
                "until": 0.0,
                "broken": False,
                "group": group,
            }
        return pid

    def set(self, pid: int, **values: Any) -> None:
        with self.change() as world:
            world["processes"][str(pid)].update(values)

    def fail(
        self,
        call: str,
        deed: Deed,
        *,
        pid: int = 0,
        code: int = OPERATING_SYSTEM,
        times: int = 1,
        seconds: float = 0.0,
    ) -> None:
        """Let the next `times` calls of a name go wrong, of a process or of any; `seconds` it goes on amid a death."""
        fault = {"call": call, "deed": deed, "pid": pid, "code": code, "times": times, "seconds": seconds}
        with self.change() as world:
            world["faults"].append(fault)

    def cut(self, uuid: str) -> None:
        """Cut a GPU into instances."""
        with self.change() as world:
            world["mig"].append(uuid)

    def become(self, gpus: dict[str, str], *, moves: bool = True) -> None:
        """Have other GPUs, given by UUID and model, of 80 GB each; `moves` is whether the driver moves processes."""
        with self.change() as world:
            world.update(gpus=dict.fromkeys(gpus, 80_000), models=gpus, moves=moves)

    def states(self) -> dict[int, State]:
        with self.change() as world:
            return {int(pid): State(one["state"]) for pid, one in world["processes"].items()}

    def calls(self) -> list[tuple[str, int]]:
        """The calls that change something, in order."""
        with self.change() as world:
            return [(name, pid) for name, pid in world["calls"] if name in ("lock", "checkpoint", "restore", "unlock")]

    def helpers(self) -> list[int]:
        """The processes that opened the driver, in order."""
        with self.change() as world:
            return list(world["helpers"])


def open_driver() -> CudaDouble:
    """What the helper process calls."""
    return CudaDouble(World(Path(os.environ[FILE_VARIABLE])))


class CudaDouble:
    """See `checkpoint.cuda.Driver`."""

    def __init__(self, world: World) -> None:
        self._world = world
        with world.change() as content:
            content["helpers"].append(os.getpid())
        self._after(self._fault("open", 0))

    def version(self) -> str:
        return "580.00.00"

    def devices(self) -> tuple[Device, ...]:
        with self._world.change() as world:
            return tuple(self._device(world, uuid) for uuid in world["gpus"])

    def moves(self) -> bool:
        with self._world.change() as world:
            return bool(world["moves"])

    def process_state(self, pid: int) -> State:
        after = self._fault("state", pid)
        with self._world.change() as world:
            state = State(self._process(world, "state", pid)["state"])
        self._after(after)
        return state

    def lock(self, pid: int, timeout_ms: int) -> None:
        after = self._fault("lock", pid)
        deadline = time.monotonic() + (timeout_ms / 1000 if timeout_ms else float("inf"))
        while True:
            with self._world.change() as world:
                one = self._moving(world, Step.LOCK, pid)
                if not one["busy"]:
                    one["state"] = int(State.LOCKED)
                    break
            if time.monotonic() > deadline:
                raise _refused("lock", pid, NOT_READY)
            time.sleep(_LOOK_S)
        self._after(after)

    def checkpoint(self, pid: int) -> None:
        after = self._fault("checkpoint", pid)
        with self._world.change() as world:
            self._moving(world, Step.CHECKPOINT, pid)["state"] = int(State.CHECKPOINTED)
        self._after(after)

    def restore(self, pid: int, pairs: Sequence[Pair]) -> None:
        after = self._fault("restore", pid)
        full = False
        with self._world.change() as world:
            one = self._moving(world, Step.RESTORE, pid)
            if one["broken"]:
                raise _refused("restore", pid, OPERATING_SYSTEM)
            onto = {_plain(old): _plain(new) for old, new in pairs}
            here = {_plain(uuid): uuid for uuid in world["gpus"]}
            if pairs and (set(onto) < set(here) or not set(onto.values()) <= set(here)):
                raise _refused("restore", pid, INVALID_VALUE)
            wanted = {here.get(onto.get(_plain(uuid), _plain(uuid)), uuid): mib for uuid, mib in one["memory"].items()}
            if any(uuid not in world["gpus"] for uuid in wanted):
                raise _refused("restore", pid, INVALID_VALUE)
            full = any(self._device(world, uuid).free_bytes < mib * _MIB for uuid, mib in wanted.items())
            if full:
                one["broken"] = True
            else:
                one.update(memory=wanted, state=int(State.LOCKED))
        if full:
            raise _refused("restore", pid, OUT_OF_MEMORY)
        self._after(after)

    def unlock(self, pid: int) -> None:
        after = self._fault("unlock", pid)
        with self._world.change() as world:
            self._moving(world, Step.UNLOCK, pid)["state"] = int(State.RUNNING)
        self._after(after)

    def restore_thread_id(self, pid: int) -> int:
        with self._world.change() as world:
            self._process(world, "restore_thread", pid)
        return pid + 1

    def _process(self, world: dict[str, Any], call: str, pid: int) -> dict[str, Any]:
        one: dict[str, Any] | None = world["processes"].get(str(pid))
        if not _alive(pid):
            raise _refused(call, pid, OPERATING_SYSTEM)
        if one is None:
            raise _refused(call, pid, NOT_INITIALIZED)
        return one

    def _moving(self, world: dict[str, Any], step: Step, pid: int) -> dict[str, Any]:
        one = self._process(world, step.value, pid)
        if one["state"] != int(step.before):
            raise _refused(step.value, pid, ILLEGAL_STATE)
        return one

    def _device(self, world: dict[str, Any], uuid: str) -> Device:
        used = {
            int(pid): one["memory"].get(uuid, 0) * _MIB
            for pid, one in world["processes"].items()
            if one["state"] != int(State.CHECKPOINTED) and _alive(int(pid)) and one["memory"].get(uuid)
        }
        total = world["gpus"][uuid] * _MIB
        return Device(
            uuid=uuid,
            name=world["models"].get(uuid, MODEL),
            total_bytes=total,
            free_bytes=total - sum(used.values()),
            used_bytes=used,
            mig=uuid in world["mig"],
        )

    def _fault(self, call: str, pid: int) -> Deed | None:
        """Note the call, and let go wrong what goes wrong before it; what is left is for `_after`."""
        self._wait_for_the_last(pid)
        with self._world.change() as world:
            world["calls"].append((call, pid))
            fault = next(
                (one for one in world["faults"] if one["call"] == call and one["times"] and one["pid"] in (0, pid)),
                None,
            )
            if fault is not None:
                fault["times"] -= 1
                if fault["deed"] == "die_amid":
                    moved = {"state": int(Step(call).after), "until": time.monotonic() + fault["seconds"]}
                    world["processes"][str(pid)].update(moved)
            waits = _waits_for_another(world["processes"], pid)
        if waits:
            _hang()
        if fault is None:
            return None
        match fault["deed"]:
            case "refuse":
                raise _refused(call, pid, fault["code"])
            case "die" | "die_amid":
                os._exit(7)
            case "hang":
                _hang()
        deed: Deed = fault["deed"]
        return deed

    def _wait_for_the_last(self, pid: int) -> None:
        """As the driver does, where the helper of an earlier call about the process died amid it."""
        with self._world.change() as world:
            until = world["processes"].get(str(pid), {}).get("until", 0.0)
        while (left := until - time.monotonic()) > 0:
            time.sleep(left)

    def _after(self, deed: Deed | None) -> None:
        if deed == "die_after":
            os._exit(7)
        if deed == "hang_after":
            _hang()


def _waits_for_another(processes: dict[str, Any], pid: int) -> bool:
    """As NCCL's processes: while one of a group does not run, every call about another of it hangs."""
    group = processes.get(str(pid), {}).get("group")
    others = (one for key, one in processes.items() if key != str(pid) and one["group"] == group)
    return bool(group) and any(one["state"] != int(State.RUNNING) for one in others)


def _hang() -> NoReturn:
    Event().wait()
    raise AssertionError


def _refused(call: str, pid: int, code: int) -> Exception:
    return refusal(_FUNCTIONS[call], code, _NAMES.get(code, ""), (pid,))


def _plain(uuid: str) -> bytes:
    return uuid_bytes(uuid)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False
