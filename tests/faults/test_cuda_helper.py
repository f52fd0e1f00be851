"""The GPU side of a snapshot, on the driver double: all processes or none, whatever goes wrong at whichever step."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from checkpoint import cuda_channel, cuda_helper
from checkpoint.cuda import ILLEGAL_STATE, NO_DEVICE, NOT_SUPPORTED, OPERATING_SYSTEM, OUT_OF_MEMORY
from checkpoint.cuda_channel import HelperLostError
from checkpoint.cuda_helper import Cuda, Deadlines
from checkpoint.errors import CudaError, MisfitError, RetryError
from checkpoint.states import State, Step
from tests.helpers import cuda_double
from tests.helpers.cuda_bench import DoubleBench, double_bench
from tests.helpers.cuda_double import UUID, Deed, World

SECOND = "GPU-22222222-2222-3333-4444-555555555555"
SHORT = Deadlines(open_s=60.0, ask_s=3.0, move_s=3.0, lock_s=1.0, margin_s=2.0)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DoubleBench]:
    with double_bench(tmp_path, monkeypatch) as one:
        yield one


@pytest.fixture
def cuda(bench: DoubleBench) -> Iterator[Cuda]:
    with bench.cuda() as one:
        one.version()  # is open
        yield one


def bring(world: World, pids: Sequence[int], state: State) -> None:
    for pid in pids:
        world.set(pid, state=int(state))


def take(cuda: Cuda, step: Step, pids: Sequence[int]) -> None:
    calls: dict[Step, Callable[[], None]] = {
        Step.LOCK: lambda: cuda.lock_all(pids, 10.0),
        Step.CHECKPOINT: lambda: cuda.checkpoint_all(pids),
        Step.RESTORE: lambda: cuda.restore_all(pids),
        Step.UNLOCK: lambda: cuda.unlock_all(pids),
    }
    calls[step]()


def test_a_tree_goes_all_the_way_and_back(bench: DoubleBench, cuda: Cuda) -> None:
    pids = bench.pids(3)
    plain = bench.victim("plain").pid
    assert cuda.find([plain, *pids]) == pids
    assert cuda.version() == "580.00.00"
    for step in (Step.LOCK, Step.CHECKPOINT, Step.RESTORE, Step.UNLOCK):
        take(cuda, step, pids)
        assert cuda.states(pids) == dict.fromkeys(pids, step.after)
    steps = ("lock", "checkpoint", "restore", "unlock")
    assert bench.world.calls() == [(step, pid) for step in steps for pid in pids]
    assert len(bench.world.helpers()) == 1


def test_what_is_no_cuda_process_and_what_is_gone_is_not_found(bench: DoubleBench, cuda: Cuda) -> None:
    victim = bench.victim()
    victim.end()
    assert cuda.find([bench.victim("plain").pid, victim.pid, 1]) == []


def test_a_process_the_driver_can_not_tell_of_is_not_taken_for_a_plain_one(bench: DoubleBench, cuda: Cuda) -> None:
    pids = bench.pids(2)
    bench.world.fail("state", "refuse", pid=pids[1], code=OPERATING_SYSTEM)
    with pytest.raises(CudaError) as caught:
        cuda.find(pids)
    assert caught.value.result == OPERATING_SYSTEM
    assert str(pids[1]) in caught.value.message


@pytest.mark.parametrize("step", list(Step))
@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_nothing_is_done_if_one_is_not_where_the_step_starts(
    bench: DoubleBench, cuda: Cuda, step: Step, wrong: int
) -> None:
    pids = bench.pids(3)
    bring(bench.world, pids, step.before)
    bench.world.set(pids[wrong], state=int(step.after))
    with pytest.raises(CudaError, match=f"process {pids[wrong]} is {step.after.word}") as caught:
        take(cuda, step, pids)
    assert bench.world.calls() == []
    assert caught.value.stuck == {}
    assert "recover" in (caught.value.mend or "")


@pytest.mark.parametrize("step", [Step.LOCK, Step.CHECKPOINT, Step.RESTORE])
@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("deed", ["refuse", "die", "die_after"])
def test_a_step_that_fails_for_one_is_undone_for_all(
    bench: DoubleBench, cuda: Cuda, step: Step, failing: int, deed: Deed
) -> None:
    pids = bench.pids(3)
    bring(bench.world, pids, step.before)
    bench.world.fail(step.value, deed, pid=pids[failing])
    with pytest.raises(CudaError) as caught:
        take(cuda, step, pids)
    assert caught.value.stuck == {}
    assert bench.world.states() == dict.fromkeys(pids, step.before)
    if deed == "refuse":
        assert caught.value.result == OPERATING_SYSTEM
        assert len(bench.world.helpers()) == 1
    else:
        assert "helper process is gone" in caught.value.message
        assert len(bench.world.helpers()) == 2
    take(cuda, step, pids)
    assert bench.world.states() == dict.fromkeys(pids, step.after)


@pytest.mark.parametrize("step", [Step.CHECKPOINT, Step.RESTORE])
def test_a_call_that_goes_on_without_its_helper_is_waited_for_and_undone(bench: DoubleBench, step: Step) -> None:
    """For longer than a question may take else: 80 GB take a minute."""
    pids = bench.pids(2)
    bring(bench.world, pids, step.before)
    bench.world.fail(step.value, "die_amid", pid=pids[1], seconds=2.0)
    with bench.cuda(Deadlines(open_s=30.0, ask_s=1.0, move_s=20.0, lock_s=2.0, margin_s=5.0)) as cuda:
        with pytest.raises(CudaError, match="helper process is gone") as caught:
            take(cuda, step, pids)
        assert caught.value.stuck == {}
        assert bench.world.states() == dict.fromkeys(pids, step.before)
        assert len(bench.world.helpers()) == 2


def test_what_a_killed_command_left_amid_a_call_is_settled(bench: DoubleBench) -> None:
    (pid,) = bench.pids(1)
    bring(bench.world, [pid], State.CHECKPOINTED)
    bench.world.set(pid, until=time.monotonic() + 2.0)
    with bench.cuda(Deadlines(open_s=30.0, ask_s=1.0, move_s=20.0, lock_s=2.0, margin_s=5.0)) as cuda:
        cuda.settle({pid: State.RUNNING})
    assert bench.world.states() == {pid: State.RUNNING}


@pytest.mark.parametrize("deed", ["hang", "hang_after"])
@pytest.mark.parametrize("step", [Step.LOCK, Step.CHECKPOINT, Step.RESTORE])
def test_a_step_that_hangs_is_given_up_and_undone(bench: DoubleBench, step: Step, deed: Deed) -> None:
    pids = bench.pids(2)
    bring(bench.world, pids, step.before)
    bench.world.fail(step.value, deed, pid=pids[1])
    started = time.monotonic()
    with bench.cuda(SHORT) as cuda:
        with pytest.raises(CudaError, match="did not answer"):
            # The lock's own timeout does not save us: this driver does not keep it.
            cuda.lock_all(pids, 0.2) if step is Step.LOCK else take(cuda, step, pids)
        assert time.monotonic() - started < 30
        assert bench.world.states() == dict.fromkeys(pids, step.before)
        hung = bench.world.helpers()[0]
        assert not os.path.exists(f"/proc/{hung}")


@pytest.mark.parametrize("deed", ["refuse", "die", "die_after"])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_one_that_can_not_be_unlocked_does_not_keep_the_others(
    bench: DoubleBench, cuda: Cuda, failing: int, deed: Deed
) -> None:
    pids = bench.pids(3)
    bring(bench.world, pids, State.LOCKED)
    bench.world.fail("unlock", deed, pid=pids[failing])
    with pytest.raises(CudaError) as caught:
        cuda.unlock_all(pids)
    others = {pid: State.RUNNING for pid in pids if pid != pids[failing]}
    states = bench.world.states()
    assert {pid: states[pid] for pid in others} == others
    assert set(caught.value.stuck) == {pids[failing]}
    assert f"kill -9 {pids[failing]}" in (caught.value.mend or "")


def test_what_the_undo_can_not_bring_back_is_named_with_where_it_is(bench: DoubleBench, cuda: Cuda) -> None:
    pids = bench.pids(3)
    bring(bench.world, pids, State.LOCKED)
    bench.world.fail("checkpoint", "refuse", pid=pids[2])
    bench.world.fail("restore", "refuse", pid=pids[0], times=5)
    with pytest.raises(CudaError) as caught:
        cuda.checkpoint_all(pids)
    assert caught.value.stuck == {pids[0]: "checkpointed"}
    assert f"process {pids[0]} is stuck: checkpointed" in caught.value.message
    assert f"kill -9 {pids[0]}" in (caught.value.mend or "")
    assert bench.world.states() == {pids[0]: State.CHECKPOINTED, pids[1]: State.LOCKED, pids[2]: State.LOCKED}


def test_a_process_that_moved_on_meanwhile_is_looked_at_again(bench: DoubleBench, cuda: Cuda) -> None:
    """A call whose helper was killed may still be under way, and the state just read is the one before."""
    pid = bench.pids(1)[0]
    bring(bench.world, [pid], State.LOCKED)
    bench.world.fail("unlock", "refuse", pid=pid, code=ILLEGAL_STATE, times=2)
    cuda.settle({pid: State.RUNNING})
    assert bench.world.states() == {pid: State.RUNNING}
    bring(bench.world, [pid], State.LOCKED)
    bench.world.fail("unlock", "refuse", pid=pid, code=ILLEGAL_STATE, times=9)
    with pytest.raises(CudaError) as caught:
        cuda.settle({pid: State.RUNNING})
    assert caught.value.stuck == {pid: "locked"}


def test_a_process_that_failed_in_the_driver_is_stuck(bench: DoubleBench, cuda: Cuda) -> None:
    pids = bench.pids(2)
    bench.world.set(pids[0], state=int(State.FAILED))
    with pytest.raises(CudaError) as caught:
        cuda.settle(dict.fromkeys(pids, State.RUNNING))
    assert caught.value.stuck == {pids[0]: "failed"}


def test_a_process_that_ends_during_a_step_is_not_stuck(bench: DoubleBench, cuda: Cuda) -> None:
    first, second = bench.victim(), bench.victim()
    cuda.lock_all([first.pid, second.pid], 5.0)
    second.end()
    with pytest.raises(CudaError) as caught:
        cuda.checkpoint_all([first.pid, second.pid])
    assert caught.value.stuck == {}
    assert cuda.states([first.pid, second.pid]) == {first.pid: State.LOCKED}
    cuda.settle({first.pid: State.RUNNING, second.pid: State.RUNNING})


def test_a_busy_process_is_worth_another_try_and_all_run_on(bench: DoubleBench, cuda: Cuda) -> None:
    pids = bench.pids(3)
    bench.world.set(pids[2], busy=True)
    started = time.monotonic()
    with pytest.raises(RetryError, match=f"process {pids[2]} did not come to rest"):
        cuda.lock_all(pids, 0.3)
    assert 0.25 < time.monotonic() - started < 20
    assert bench.world.states() == dict.fromkeys(pids, State.RUNNING)
    bench.world.set(pids[2], busy=False)
    cuda.lock_all(pids, 5.0)


def test_no_time_at_all_is_not_for_ever(bench: DoubleBench, cuda: Cuda) -> None:
    pids = bench.pids(2)
    bench.world.set(pids[0], busy=True)
    with pytest.raises(RetryError):
        cuda.lock_all(pids, 0.0)  # which is not the driver's 0: that waits for ever
    assert bench.world.states() == dict.fromkeys(pids, State.RUNNING)


def test_a_process_whose_lock_fails_and_can_not_be_undone_is_not_worth_another_try(
    bench: DoubleBench, cuda: Cuda
) -> None:
    pids = bench.pids(2)
    bench.world.set(pids[1], busy=True)
    bench.world.fail("unlock", "refuse", pid=pids[0])
    with pytest.raises(CudaError) as caught:
        cuda.lock_all(pids, 0.1)
    assert caught.value.stuck == {pids[0]: "locked"}


def test_processes_that_share_gpu_memory_are_refused_and_run_on(bench: DoubleBench) -> None:
    pids = bench.pids(2)
    for pid in pids:
        bench.world.set(pid, group="nccl")
    with bench.cuda(SHORT) as cuda:
        with pytest.raises(CudaError, match="did not answer") as caught:
            cuda.lock_all(pids, 0.5)
        assert caught.value.stuck == {}
        assert "NCCL" in (caught.value.mend or "")
    assert bench.world.states() == dict.fromkeys(pids, State.RUNNING)


def test_managed_memory_is_refused_with_what_to_do_and_all_run_on(bench: DoubleBench, cuda: Cuda) -> None:
    pids = bench.pids(2)
    cuda.lock_all(pids, 5.0)
    bench.world.fail("checkpoint", "refuse", pid=pids[1], code=NOT_SUPPORTED)
    with pytest.raises(CudaError, match=r"\(801\)") as caught:
        cuda.checkpoint_all(pids)
    assert "managed memory" in (caught.value.mend or "")
    cuda.unlock_all(pids)
    assert bench.world.states() == dict.fromkeys(pids, State.RUNNING)


def test_an_instance_of_a_gpu_is_refused_before_anything_is_done(bench: DoubleBench, cuda: Cuda) -> None:
    pid = bench.pids(1)[0]
    bench.world.cut(UUID)
    with pytest.raises(MisfitError, match="MIG") as caught:
        cuda.lock_all([pid], 5.0)
    assert caught.value.exit_code == 3
    assert bench.world.calls() == []


class TestMemory:
    def test_too_little_free_is_seen_before_anything_is_done(self, bench: DoubleBench, cuda: Cuda) -> None:
        pid = bench.victim(mib=50_000).pid
        needed = cuda.used_bytes([pid])
        assert needed == {UUID: 50_000 << 20}
        cuda.lock_all([pid], 5.0)
        cuda.checkpoint_all([pid])
        hog = bench.victim(mib=40_000)
        with pytest.raises(RetryError, match="40000 MiB free, and 50000 MiB are needed"):
            cuda.restore_all([pid], needed_bytes=needed)
        assert ("restore", pid) not in bench.world.calls()
        hog.end()
        cuda.restore_all([pid], needed_bytes=needed)
        cuda.unlock_all([pid])

    def test_a_restore_that_ran_out_of_memory_can_only_be_ended(self, bench: DoubleBench, cuda: Cuda) -> None:
        small, large = bench.victim(mib=1000).pid, bench.victim(mib=50_000).pid
        cuda.lock_all([small, large], 5.0)
        cuda.checkpoint_all([small, large])
        hog = bench.victim(mib=40_000)
        with pytest.raises(CudaError) as caught:
            cuda.restore_all([small, large])
        assert caught.value.result == OUT_OF_MEMORY
        assert caught.value.stuck == {large: "checkpointed"}
        assert bench.world.states()[small] is State.CHECKPOINTED
        hog.end()
        with pytest.raises(CudaError) as again:
            cuda.restore_all([large])
        assert again.value.result == OPERATING_SYSTEM
        cuda.restore_all([small])

    def test_a_checkpointed_process_holds_nothing(self, bench: DoubleBench, cuda: Cuda) -> None:
        pid = bench.victim(mib=1000).pid
        before = cuda.devices()[0].free_bytes
        cuda.lock_all([pid], 5.0)
        cuda.checkpoint_all([pid])
        assert cuda.devices()[0].free_bytes == before + (1000 << 20)
        assert cuda.used_bytes([pid]) == {}


class TestOtherGpus:
    @pytest.fixture
    def bench(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DoubleBench]:
        with double_bench(tmp_path, monkeypatch, {UUID: 1000, SECOND: 2000}) as one:
            yield one

    def test_pairs_move_a_process_and_the_check_looks_at_the_gpu_it_goes_to(
        self, bench: DoubleBench, cuda: Cuda
    ) -> None:
        pid = bench.victim(mib=900).pid
        needed = cuda.used_bytes([pid])
        cuda.lock_all([pid], 5.0)
        cuda.checkpoint_all([pid])
        bench.victim(mib=500)  # on the first
        swapped = [(UUID, SECOND), (SECOND, UUID)]
        with pytest.raises(RetryError, match=UUID):
            cuda.restore_all([pid], needed_bytes=needed)
        cuda.restore_all([pid], swapped, needed_bytes=needed)
        assert cuda.used_bytes([pid]) == {SECOND: 900 << 20}

    def test_pairs_that_leave_a_gpu_out_are_refused(self, bench: DoubleBench, cuda: Cuda) -> None:
        pid = bench.victim(mib=100).pid
        bring(bench.world, [pid], State.CHECKPOINTED)
        with pytest.raises(CudaError, match="INVALID_VALUE"):
            cuda.restore_all([pid], [(UUID, SECOND)])
        assert bench.world.states() == {pid: State.CHECKPOINTED}

    @pytest.mark.parametrize("moves", [True, False])
    def test_whether_the_driver_moves_processes_is_asked_of_it(
        self, bench: DoubleBench, cuda: Cuda, moves: bool
    ) -> None:
        bench.world.become({UUID: "Double"}, moves=moves)
        assert cuda.moves() is moves

    def test_a_gpu_that_is_not_here_is_not_ours_to_judge(self, bench: DoubleBench, cuda: Cuda) -> None:
        cuda.require_free({"GPU-33333333-2222-3333-4444-555555555555": 1 << 60})


class TestHelper:
    def test_it_ends_with_the_one_that_started_it(self, bench: DoubleBench) -> None:
        code = (
            "import sys, signal; from checkpoint.cuda_helper import Cuda;"
            "cuda = Cuda(sys.argv[1]); print(cuda._helper.pid, flush=True); signal.pause()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", code, cuda_double.MODULE], stdout=subprocess.PIPE, text=True
        ) as owner:
            assert owner.stdout is not None
            pid = int(owner.stdout.readline())
            descriptor = os.pidfd_open(pid)
            assert os.getsid(pid) == pid
            owner.send_signal(signal.SIGKILL)
        try:
            assert _ended(descriptor)
        finally:
            os.close(descriptor)

    def test_it_ends_when_closed_and_another_comes_when_asked(self, bench: DoubleBench, cuda: Cuda) -> None:
        cuda.close()
        assert not os.path.exists(f"/proc/{bench.world.helpers()[0]}")
        assert cuda.devices()[0].uuid == UUID
        assert len(bench.world.helpers()) == 2

    def test_killed_while_it_idles_another_takes_its_place(self, bench: DoubleBench, cuda: Cuda) -> None:
        pid = bench.world.helpers()[0]
        descriptor = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        assert _ended(descriptor)
        os.close(descriptor)
        assert cuda.devices()[0].uuid == UUID
        assert len(bench.world.helpers()) == 2

    def test_killed_during_a_call_it_says_so(self, bench: DoubleBench) -> None:
        pid = bench.pids(1)[0]
        bench.world.fail("state", "die", pid=pid)
        with bench.cuda() as cuda:
            with pytest.raises(HelperLostError, match=f"state of process {pid}: the CUDA helper process is gone"):
                cuda.find([pid])
            assert cuda.find([pid]) == [pid]

    def test_a_call_that_nobody_waits_for_any_more_is_not_taken_for_the_next_ones_answer(
        self, bench: DoubleBench, cuda: Cuda
    ) -> None:
        pids = bench.pids(2)
        bench.world.set(pids[0], busy=True)
        main = threading.get_ident()
        interrupt = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            cuda.lock_all(pids, 1.0)
        interrupt.join()
        assert cuda.states(pids) == dict.fromkeys(pids, State.RUNNING)
        bench.world.set(pids[0], busy=False)
        cuda.lock_all(pids, 5.0)
        assert len(bench.world.helpers()) == 1

    def test_it_can_not_be_interrupted_from_the_terminal(self, bench: DoubleBench, cuda: Cuda) -> None:
        os.kill(bench.world.helpers()[0], signal.SIGINT)
        assert cuda.devices()[0].uuid == UUID

    def test_a_driver_that_can_not_be_opened_says_why_when_it_is_asked(self, bench: DoubleBench) -> None:
        bench.world.fail("open", "refuse", code=NO_DEVICE)
        with bench.cuda() as cuda:
            with pytest.raises(CudaError) as caught:
                cuda.find([1])
            assert caught.value.result == NO_DEVICE
            assert not os.path.exists(f"/proc/{bench.world.helpers()[0]}")
            assert cuda.find([1]) == []  # by another, whose driver opens

    @pytest.mark.parametrize("deed", ["die", "hang"])
    def test_a_driver_that_does_not_open(self, bench: DoubleBench, deed: Deed) -> None:
        bench.world.fail("open", deed)
        cuda = bench.cuda(Deadlines(open_s=2.0 if deed == "hang" else 30.0))
        with cuda, pytest.raises(HelperLostError, match="opening the driver"):
            cuda.version()
        assert not os.path.exists(f"/proc/{bench.world.helpers()[0]}")

    def test_it_opens_the_driver_while_its_client_does_something_else(self, bench: DoubleBench) -> None:
        with bench.cuda():
            deadline = time.monotonic() + 30
            while not bench.world.helpers() and time.monotonic() < deadline:
                time.sleep(0.01)
            assert len(bench.world.helpers()) == 1

    def test_one_that_is_not_needed_is_not_waited_for(self, bench: DoubleBench) -> None:
        bench.world.fail("open", "hang")
        cuda = bench.cuda()
        started = time.monotonic()
        cuda.close()
        assert time.monotonic() - started < 20, "and opening may take 120 s"

    def test_one_that_hangs_does_not_hold_up_the_end(self, bench: DoubleBench) -> None:
        pid = bench.pids(1)[0]
        bench.world.set(pid, busy=True)
        cuda = bench.cuda()
        interrupt = threading.Timer(1.0, signal.pthread_kill, (threading.get_ident(), signal.SIGINT))
        assert cuda.find([pid]) == [pid]
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            cuda.lock_all([pid], 60.0)
        interrupt.join()
        started = time.monotonic()
        cuda.close()
        assert time.monotonic() - started < 20
        assert not os.path.exists(f"/proc/{bench.world.helpers()[0]}")

    def test_it_prints_nothing_where_our_document_goes(self, bench: DoubleBench) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs, bench.cuda() as cuda:
            assert cuda.devices()
            assert os.readlink(f"/proc/{bench.world.helpers()[0]}/fd/1") == "/dev/null"

    def test_it_sees_every_gpu(self, bench: DoubleBench, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        with bench.cuda() as cuda:
            cuda.version()
            environment = Path(f"/proc/{bench.world.helpers()[0]}/environ").read_bytes()
        assert b"CUDA_VISIBLE_DEVICES" not in environment


class TestDetection:
    @pytest.fixture(autouse=True)
    def _files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda_helper, "_CONTROL_FILE", str(tmp_path / "nvidiactl"))
        monkeypatch.setattr(cuda_helper, "_GPU_FILES", str(tmp_path / "nvidia[0-9]*"))

    def test_without_a_driver_there_is_none_and_it_says_why(self) -> None:
        assert Cuda.detect() is None
        assert "no Nvidia driver" in (cuda_helper.absence() or "")

    def test_without_a_gpu_there_is_none_and_it_says_why(self, tmp_path: Path) -> None:
        (tmp_path / "nvidiactl").touch()
        assert Cuda.detect() is None
        assert "no GPU" in (cuda_helper.absence() or "")

    def test_with_both_it_is_there(self, bench: DoubleBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "nvidiactl").touch()
        (tmp_path / "nvidia3").touch()
        monkeypatch.setattr(cuda_helper, "REAL_DRIVER", cuda_double.MODULE)
        found = Cuda.detect()
        assert found is not None
        with found:
            assert found.devices()[0].name == "Double"


def _ended(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 10.0)[0])


def test_a_helper_that_can_not_be_started_leaves_nothing_open(
    bench: DoubleBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(CudaError, match="can't be started: Resource temporarily unavailable"):
        cuda_channel.Helper("tests.helpers.cuda_double", 1.0)
    assert len(os.listdir("/proc/self/fd")) == before
