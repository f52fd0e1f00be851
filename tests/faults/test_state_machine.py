"""Random operations on a source and its mount, daemons killed and replaced in between, against a plain model.

The mount asks the source each time (nothing is watched, nothing believed), so the model is exact. All examples share
one mount and have a folder each. `HYPOTHESIS_PROFILE=soak` runs many more; `tools/soak.py` runs the same for hours.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.helpers.models import write
from tests.helpers.mounting import ENGINES, Mount, Mounter, weightfs
from tests.helpers.world import World
from tests.helpers.world_changes import CHANGES
from tests.helpers.world_uses import USES

FEW = settings(
    max_examples=80,
    stateful_step_count=150,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # shrinking would take minutes; the steps are printed
    suppress_health_check=list(HealthCheck),
)
MANY = settings(FEW, max_examples=2000, stateful_step_count=300, derandomize=False)
_RARELY_S = 2.0
"""A daemon that dies younger than a second is followed after a pause."""
CHOSEN = st.integers(0, (1 << 32) - 1)


class Machine(RuleBasedStateMachine):
    """One example, in a folder of its own."""

    mount: Mount
    count = 0
    operations = 0
    disturbed_at = 0.0

    def __init__(self) -> None:
        super().__init__()
        type(self).count += 1
        name = f"example-{self.count}"
        os.mkdir(os.path.join(self.mount.source, name))
        self.world = World(
            os.path.join(self.mount.source, name),
            self.mount.path(name),
            patience_s=0,
            cuts_are_stale=self.mount.engine == "portable",
        )

    @rule(kind=st.sampled_from(CHANGES), number=CHOSEN)
    def change(self, kind: str, number: int) -> None:
        self.world.do(kind, random.Random(number))

    @rule(kind=st.sampled_from(CHANGES), number=CHOSEN)
    def change_again(self, kind: str, number: int) -> None:
        self.world.do(kind, random.Random(number))

    @rule(kind=st.sampled_from(USES), number=CHOSEN)
    def use(self, kind: str, number: int) -> None:
        self.world.do(kind, random.Random(number))

    @rule(kind=st.sampled_from(USES), number=CHOSEN)
    def use_again(self, kind: str, number: int) -> None:
        self.world.do(kind, random.Random(number))

    @rule(number=st.integers(0, 7))
    def disturb(self, number: int) -> None:
        if time.monotonic() - Machine.disturbed_at < _RARELY_S:
            return
        if number == 0:
            self.mount.kill_daemon()
            Machine.disturbed_at = time.monotonic()
        elif number == 1:
            done = weightfs(
                "mount", "--replace", self.mount.source, self.mount.mountpoint, "--engine", self.mount.engine,
                "--state-dir", self.mount.state_dir, *self.options,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            Machine.disturbed_at = time.monotonic()

    options: tuple[str, ...] = ()

    @invariant()
    def serves(self) -> None:
        assert not self.mount.supervisor.has_ended()

    def teardown(self) -> None:
        try:
            self.world.compare_all()
        finally:
            Machine.operations += sum(map(len, self.world.latencies.values()))
            self.world.close()


@pytest.fixture(scope="module", params=ENGINES)
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = str(tmp_path_factory.mktemp("machine"))
    os.mkdir(f"{folder}/source")
    options = ("--config", write(f"{folder}/exact.toml", b'attribute_timeout_s = 0\nwatch = "off"\n'))
    with Mounter(folder) as mounts:
        mount = mounts(f"{folder}/source", request.param, *options)
        yield type("Example", (Machine,), {"mount": mount, "options": options})


def test_any_sequence_of_operations(machine: type[Machine]) -> None:
    run_state_machine_as_test(machine, settings=MANY if os.environ.get("HYPOTHESIS_PROFILE") == "soak" else FEW)
    assert machine.operations > 500
    print(machine.operations)
    live = machine.mount.live()
    assert live["open_inodes"] == 1
    assert live["requests_expired"] == live["requests_poisoned"] == 0
