"""The GPU side of a snapshot on the real driver, with real processes: `tools/gpu/run tests/gpu`."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoint.cuda_helper import Cuda
from checkpoint.errors import CudaError, RetryError
from checkpoint.states import State
from tests.gpu import scenarios
from tests.gpu.bench import RealBench
from tests.gpu.scenarios import MODELLED, Trace, compared, intact

FACTS = Path(scenarios.__file__).with_name("facts.json")
WEIGHTS_MIB = 6867  # 7.2 GB
SUSPEND_RESUME_S = 8.0
AMID_MIB = 8192
"""A checkpoint of it takes 4 s, a restore 1.3 s and more (H100): `AMID_S` is in the middle of both."""
AMID_S = 0.4


@pytest.mark.parametrize("scenario", MODELLED)
def test_this_driver_answers_as_recorded(scenario: Callable[[Trace], None], bench: RealBench) -> None:
    """Else the double is that of another driver: record anew with tools/gpu/facts.py, and look at what changed."""
    facts: dict[str, Any] = json.loads(FACTS.read_text(encoding="utf-8"))
    trace = Trace(bench)
    scenario(trace)
    assert compared(trace.calls) == compared(facts["traces"][scenario.__name__])
    assert intact(trace.calls)


def test_every_cuda_process_is_found_and_no_other(bench: RealBench, cuda: Cuda) -> None:
    plain, first, loaded, second = (bench.victim(kind, 64) for kind in ("plain", "context", "loaded", "context"))
    assert cuda.find([one.pid for one in (plain, first, loaded, second)]) == [first.pid, second.pid]
    assert cuda.find([os.getpid(), 1]) == []


def test_suspend_and_resume_in_place(
    bench: RealBench, cuda: Cuda, record_property: Callable[[str, object], None]
) -> None:
    victim = bench.victim("context", WEIGHTS_MIB)
    assert victim.tell("check") == "ok"
    held = sum(cuda.used_bytes([victim.pid]).values())
    assert held >= WEIGHTS_MIB << 20
    free = cuda.devices()[0].free_bytes
    phases: dict[str, float] = {}
    steps: dict[str, Callable[[], None]] = {
        "lock": lambda: cuda.lock_all([victim.pid], 10),
        "checkpoint": lambda: cuda.checkpoint_all([victim.pid]),
        "restore": lambda: cuda.restore_all([victim.pid]),
        "unlock": lambda: cuda.unlock_all([victim.pid]),
    }
    for name, move in steps.items():
        started = time.monotonic()
        move()
        phases[name] = round(time.monotonic() - started, 4)
        if name == "checkpoint":
            assert cuda.devices()[0].free_bytes - free >= WEIGHTS_MIB << 20
    print(f"\nsuspend and resume of {WEIGHTS_MIB} MiB:", phases)
    record_property("phases", phases)
    assert victim.tell("check") == "ok"
    assert sum(phases.values()) < SUSPEND_RESUME_S


def test_two_processes_go_and_come_back_together(bench: RealBench, cuda: Cuda) -> None:
    victims = [bench.victim("context", 1024) for _ in range(2)]
    pids = [one.pid for one in victims]
    for _ in range(2):
        cuda.lock_all(pids, 10)
        cuda.checkpoint_all(pids)
        assert cuda.used_bytes(pids) == {}
        cuda.restore_all(pids)
        cuda.unlock_all(pids)
        assert [one.tell("check") for one in victims] == ["ok", "ok"]


def test_two_helpers_at_once(bench: RealBench) -> None:
    """Whether the driver takes two calls at once, and what it gains: the figures decide how a tree is checkpointed."""
    victims = [bench.victim("context", 4096) for _ in range(2)]
    helpers = [Cuda() for _ in victims]
    took: dict[str, float] = {}

    def timed(name: str, work: Callable[[Cuda, int], None], *, together: bool) -> None:
        started = time.monotonic()
        if together:
            threads = [
                threading.Thread(target=work, args=(cuda, one.pid)) for cuda, one in zip(helpers, victims, strict=True)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        else:
            for one in victims:
                work(helpers[0], one.pid)
        took[f"{name} {'together' if together else 'in turn'}"] = round(time.monotonic() - started, 3)

    try:
        for together in (False, True):
            timed("lock", lambda cuda, pid: cuda.lock_all([pid], 10), together=together)
            timed("checkpoint", lambda cuda, pid: cuda.checkpoint_all([pid]), together=together)
            timed("restore", lambda cuda, pid: cuda.restore_all([pid]), together=together)
            timed("unlock", lambda cuda, pid: cuda.unlock_all([pid]), together=together)
            assert [one.tell("check") for one in victims] == ["ok", "ok"]
    finally:
        for cuda in helpers:
            cuda.close()
    print("\ntwice 4 GiB:", took)


def test_one_that_is_busy_does_not_keep_the_other_locked(bench: RealBench, cuda: Cuda) -> None:
    quiet, busy = bench.victim("context", 64), bench.victim("context", 64)
    assert busy.tell("busy") == "ok"
    with pytest.raises(RetryError, match=str(busy.pid)):
        cuda.lock_all([quiet.pid, busy.pid], 1.0)
    assert quiet.tell("check") == "ok"
    assert busy.tell("rest") == "ok"
    assert busy.tell("check") == "ok"
    cuda.lock_all([quiet.pid, busy.pid], 10.0)
    cuda.unlock_all([quiet.pid, busy.pid])


def test_too_little_memory_is_seen_before_the_driver_is_asked(bench: RealBench, cuda: Cuda) -> None:
    victim = bench.victim("context", bench.free_mib() // 4)
    needed = cuda.used_bytes([victim.pid])
    cuda.lock_all([victim.pid], 10)
    cuda.checkpoint_all([victim.pid])
    hog = bench.victim("context", bench.free_mib() - 2048)
    with pytest.raises(RetryError, match="MiB are needed"):
        cuda.restore_all([victim.pid], needed_bytes=needed)
    hog.end()
    cuda.restore_all([victim.pid], needed_bytes=needed)
    cuda.unlock_all([victim.pid])
    assert victim.tell("check") == "ok"


@pytest.mark.parametrize("step", ["checkpoint", "restore"])
def test_a_helper_killed_in_the_middle_of_a_call(step: str, bench: RealBench, cuda: Cuda) -> None:
    """Whatever the driver then does: the process is where it was, or it is said to be stuck and can be ended."""
    began = time.monotonic()
    victim = bench.victim("context", AMID_MIB)
    cuda.lock_all([victim.pid], 10)
    before = State.LOCKED
    if step == "restore":
        cuda.checkpoint_all([victim.pid])
        before = State.CHECKPOINTED
    assert cuda._helper is not None
    killer = threading.Timer(AMID_S, os.kill, (cuda._helper.pid, signal.SIGKILL))
    killer.start()
    stuck: dict[int, str] = {}
    try:
        with pytest.raises(CudaError) as caught:
            cuda.checkpoint_all([victim.pid]) if step == "checkpoint" else cuda.restore_all([victim.pid])
        stuck = caught.value.stuck
        print(f"\nhelper killed during {step}: {caught.value.message}, stuck {stuck}", end="")
        print(f"; undone after {time.monotonic() - began:.1f} s", end="", flush=True)
    finally:
        killer.join()
    if not stuck:
        assert cuda.states([victim.pid]) == {victim.pid: before}
        cuda.settle({victim.pid: State.RUNNING})
        print(f", running after {time.monotonic() - began:.1f} s", end="", flush=True)
        assert victim.tell("check") == "ok"
        print(f", intact after {time.monotonic() - began:.1f} s", flush=True)
    victim.end()
    assert cuda.find([victim.pid]) == []


def test_a_killed_process_gives_its_memory_back_whatever_its_state(bench: RealBench, cuda: Cuda) -> None:
    free = cuda.devices()[0].free_bytes
    for state in (State.RUNNING, State.LOCKED, State.CHECKPOINTED):
        victim = bench.victim("context", 1024)
        cuda.settle({victim.pid: state})
        victim.end()
        assert abs(cuda.devices()[0].free_bytes - free) < 64 << 20
