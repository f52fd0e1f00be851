"""What happens to processes under the driver's checkpoint functions, call by call.

A scenario runs the same on the real driver and on the double, and gives a trace: each call, the driver's code, and the
state after it. `tools/gpu/facts.py` records the traces of a real GPU in `facts.json`; a test without a GPU runs the
scenarios on the double and compares, so that the double can't promise what the driver does not do.

Those in `OBSERVED` the double does not play; their answers are recorded to be refused by name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from checkpoint.cuda_channel import Helper, HelperLostError
from checkpoint.cuda_program import Request
from checkpoint.errors import CudaError
from checkpoint.states import State

ASK_S = 15.0
MOVE_S = 120.0
HANGS = "hangs"
CHECK = "check"


class Victim(Protocol):
    """A process to be checkpointed."""

    pid: int

    def tell(self, command: str) -> str:
        """Have it do what `tests/gpu/child.py` lists; what it answers behind `ok`."""

    def end(self) -> None:
        """Kill it, and wait until it is gone."""


class Bench(Protocol):
    """Where a scenario's driver and processes come from."""

    def helper(self) -> Helper:
        """A helper with the driver open; the same each time while it lives."""

    def other_helper(self) -> Helper:
        """Another, which the caller closes."""

    def victim(self, kind: str, mib: int = 0, environment: Mapping[str, str] | None = None) -> Victim:
        """A process of a kind of `tests/gpu/child.py`; `environment` adds to ours."""

    def free_mib(self) -> int:
        """Memory free on the first GPU."""


class Trace:
    """Calls and what came of them. `seconds` beside them is not compared."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.calls: list[dict[str, Any]] = []

    def call(self, call: Any, name: str, pid: int, **more: Any) -> int | str:
        request = Request(call=call, pid=pid, **more)
        started = time.monotonic()
        result: int | str
        try:
            number = self.bench.helper().ask(request, MOVE_S if call in ("checkpoint", "restore") else ASK_S).number
            result = 0
        except HelperLostError:
            number, result = 0, HANGS
        except CudaError as error:
            number, result = 0, error.result
        entry: dict[str, Any] = {"call": call, "of": name, "result": result}
        if call == "state" and result == 0:
            entry["state"] = State(number).word
        self.calls.append(entry | {"seconds": round(time.monotonic() - started, 4)})
        return result

    def move(self, call: str, name: str, pid: int, **more: Any) -> int | str:
        """A call, and the state after it."""
        result = self.call(call, name, pid, **more)
        self.call("state", name, pid)
        return result

    def says(self, name: str, victim: Victim, command: str) -> str:
        started = time.monotonic()
        answer = victim.tell(command)
        said = answer.split()[0] if answer else ""
        self.calls.append({"tell": command, "of": name, "said": said, "seconds": round(time.monotonic() - started, 4)})
        if said != "ok":
            self.calls[-1]["why"] = answer
        return answer


def not_cuda(trace: Trace) -> None:
    """Processes that have no CUDA state, more or less of it, and none at all."""
    for kind in ("plain", "loaded"):
        victim = trace.bench.victim(kind)
        for call in ("state", "lock", "checkpoint", "restore", "unlock", "restore_thread"):
            trace.call(call, kind, victim.pid, **({"timeout_ms": 2000} if call == "lock" else {}))
        victim.end()
        trace.call("state", f"{kind}, ended", victim.pid)


def initialised(trace: Trace) -> None:
    """cuInit and no more, once around."""
    _around(trace, "initialised", trace.bench.victim("initialised"))


def once_around(trace: Trace) -> None:
    """A context with memory: running to running, and its memory is what it was."""
    _around(trace, "context", trace.bench.victim("context", 512))


def twice_around(trace: Trace) -> None:
    """The second time is as the first."""
    victim = trace.bench.victim("context", 1024)
    for _ in range(2):
        _around(trace, "context", victim)


def illegal(trace: Trace) -> None:
    """From every state every call that does not belong there."""
    victim = trace.bench.victim("context", 64)
    for call in ("checkpoint", "restore", "unlock"):
        trace.move(call, "running", victim.pid)
    trace.move("lock", "running", victim.pid, timeout_ms=5000)
    for call in ("lock", "restore"):
        trace.move(call, "locked", victim.pid, **({"timeout_ms": 1000} if call == "lock" else {}))
    trace.move("checkpoint", "locked", victim.pid)
    for call in ("lock", "checkpoint", "unlock"):
        trace.move(call, "checkpointed", victim.pid, **({"timeout_ms": 1000} if call == "lock" else {}))
    trace.move("restore", "checkpointed", victim.pid)
    trace.move("unlock", "locked", victim.pid)
    trace.says("context", victim, CHECK)


def lock_timeout(trace: Trace) -> None:
    """A GPU whose work does not end can't be locked in time; afterwards it can."""
    victim = trace.bench.victim("context", 64)
    trace.says("context", victim, "busy")
    trace.move("lock", "busy", victim.pid, timeout_ms=500)
    trace.says("context", victim, "rest")
    trace.move("lock", "at rest", victim.pid, timeout_ms=5000)
    trace.move("unlock", "at rest", victim.pid)
    trace.says("context", victim, CHECK)


def two_processes(trace: Trace) -> None:
    """Two that share nothing but the GPU, both away at once."""
    one, two = (trace.bench.victim("context", 512) for _ in range(2))
    for call in ("lock", "checkpoint", "restore", "unlock"):
        for name, victim in (("one", one), ("two", two)):
            trace.move(call, name, victim.pid, **({"timeout_ms": 5000} if call == "lock" else {}))
    for name, victim in (("one", one), ("two", two)):
        trace.says(name, victim, CHECK)


def forked(trace: Trace) -> None:
    """A child forked by a CUDA process, which can't use CUDA itself."""
    victim = trace.bench.victim("context", 64)
    child = int(trace.says("context", victim, "fork").split()[1])
    trace.call("state", "forked child", child)
    _around(trace, "context", victim)


def too_little_memory(trace: Trace) -> None:
    """A restore for which another process left too little, and again once there is enough."""
    mib = trace.bench.free_mib() // 4
    victim = trace.bench.victim("context", mib)
    trace.move("lock", "large", victim.pid, timeout_ms=5000)
    trace.move("checkpoint", "large", victim.pid)
    hog = trace.bench.victim("context", trace.bench.free_mib() - mib // 2)
    trace.move("restore", "large", victim.pid)
    trace.move("unlock", "large", victim.pid)
    hog.end()
    trace.move("restore", "large, enough free again", victim.pid)
    trace.move("unlock", "large, enough free again", victim.pid)
    victim.end()
    trace.call("state", "large, ended", victim.pid)


def ended_halfway(trace: Trace) -> None:
    """Processes killed while they are locked and while they are checkpointed."""
    for last in ("locked", "checkpointed"):
        victim = trace.bench.victim("context", 64)
        trace.move("lock", last, victim.pid, timeout_ms=5000)
        if last == "checkpointed":
            trace.move("checkpoint", last, victim.pid)
        victim.end()
        trace.call("state", f"{last}, ended", victim.pid)


def wrong_pairs(trace: Trace) -> None:
    """A restore onto a GPU that is not there; then one that names each GPU as its own successor."""
    uuids = [one.uuid for one in trace.bench.helper().ask(Request(call="devices"), ASK_S).devices]
    victim = trace.bench.victim("context", 64)
    trace.move("lock", "context", victim.pid, timeout_ms=5000)
    trace.move("checkpoint", "context", victim.pid)
    absent = "GPU-00000000-0000-0000-0000-000000000001"
    trace.move("restore", "to an absent GPU", victim.pid, pairs=tuple((one, absent) for one in uuids))
    trace.move("restore", "to itself", victim.pid, pairs=tuple((one, one) for one in uuids))
    trace.move("unlock", "context", victim.pid)
    trace.says("context", victim, CHECK)


def managed(trace: Trace) -> None:
    """With managed memory (UVM)."""
    victim = trace.bench.victim("context", 64)
    trace.calls.append({"seen": victim.tell("seen"), "of": "without"})
    trace.says("context", victim, "managed")
    trace.calls.append({"seen": victim.tell("seen"), "of": "with"})
    _around(trace, "with managed memory", victim)


def shared(trace: Trace) -> None:
    """Two that share GPU memory (CUDA IPC), the owner brought back first: the user of it stays away for ever."""
    _share(trace, ("owner", "user"))


def shared_user_first(trace: Trace) -> None:
    """The same, the one that only uses it brought back first."""
    _share(trace, ("user", "owner"))


def _share(trace: Trace, order: tuple[str, str]) -> None:
    both = {name: trace.bench.victim("context", 64) for name in ("owner", "user")}
    handle = trace.says("owner", both["owner"], "export").split()
    if len(handle) < 2:
        return
    trace.says("user", both["user"], f"import {handle[1]}")
    del trace.calls[-1]["tell"]  # the handle is another one each time
    for name, victim in both.items():
        trace.calls.append({"seen": victim.tell("seen"), "of": name})
    for name, victim in both.items():
        trace.move("lock", name, victim.pid, timeout_ms=5000)
    for name, victim in both.items():
        trace.move("checkpoint", name, victim.pid)
    for call in ("restore", "unlock", "restore", "unlock"):
        for name in order:
            trace.move(call, name, both[name].pid)
    for victim in both.values():
        victim.end()


def meanwhile(trace: Trace) -> None:
    """Asked by a second caller while a call of a first one about the same process is under way, and after it."""
    victim = trace.bench.victim("context", 16_384)
    trace.move("lock", "large", victim.pid, timeout_ms=5000)
    other = trace.bench.other_helper()
    for first in ("checkpoint", "restore"):
        thread = threading.Thread(target=lambda call=first: other.ask(Request(call=call, pid=victim.pid), MOVE_S))
        thread.start()
        time.sleep(0.3)  # the call is to be under way, and nothing shows that it is
        trace.call("state", f"during {first}", victim.pid)
        trace.call("unlock", f"during {first}", victim.pid)
        thread.join()
        trace.call("state", f"after {first}", victim.pid)
    trace.move("unlock", "large", victim.pid)
    trace.says("large", victim, CHECK)
    other.close()


def mps(trace: Trace) -> None:
    """A client of the multi-process service. Its daemon is started for it and ended; no mode of the GPU is changed."""
    control = "nvidia-cuda-mps-control"
    if shutil.which(control) is None:
        trace.calls.append({"lacks": control})
        return
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        where = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        subprocess.run([control, "-d"], env=os.environ | where, check=True, timeout=30)
        try:
            victim = trace.bench.victim("context", 64, where)
            _around(trace, "client", victim)
            victim.end()
        finally:
            subprocess.run([control], input=b"quit\n", env=os.environ | where, check=True, timeout=60)


def _around(trace: Trace, name: str, victim: Victim) -> None:
    trace.call("state", name, victim.pid)
    trace.move("lock", name, victim.pid, timeout_ms=5000)
    trace.move("checkpoint", name, victim.pid)
    trace.move("restore", name, victim.pid)
    trace.move("unlock", name, victim.pid)
    trace.says(name, victim, CHECK)


MODELLED: tuple[Callable[[Trace], None], ...] = (
    not_cuda,
    initialised,
    once_around,
    twice_around,
    illegal,
    lock_timeout,
    two_processes,
    forked,
    ended_halfway,
    wrong_pairs,
    too_little_memory,
)
OBSERVED: tuple[Callable[[Trace], None], ...] = (managed, meanwhile, shared, shared_user_first)
ASKED_FOR: tuple[Callable[[Trace], None], ...] = (mps,)
"""Not run unless named, because they start a service on the machine."""


def compared(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A trace without what differs from run to run, and without what only a GPU can be asked."""
    wanted = [one for one in calls if one.get("tell") != CHECK]
    return [{key: value for key, value in one.items() if key not in ("seconds", "why")} for one in wanted]


def intact(calls: list[dict[str, Any]]) -> bool:
    """Whether every process that was asked found its memory as it was."""
    return all(one["said"] == "ok" for one in calls if one.get("tell") == CHECK)
