from __future__ import annotations

import itertools
import json
import threading
from typing import Any

import pytest

from prefetch.timeline import LOADS, OPENS, SAMPLES, Timeline

ZERO = 1_700_000_000.0  # 2023-11-14T22:13:20Z
LAYERS = [("embedding", 100), ("0", 300)]


def resident(load: dict[str, Any]) -> list[tuple[float, list[int]]]:
    """Samples as a reader of the document adds them up."""
    now = [0] * len(load["layers"])
    found = []
    for sample in load["samples"]:
        for number, nbytes in sample["changed"]:
            now[number] = nbytes
        found.append((sample["at_s"], list(now)))
    return found


def test_a_load_is_told_in_seconds_since_its_trigger() -> None:
    timeline = Timeline(ZERO)
    load = timeline.begin("llama", "config.json", 10.0, LAYERS)
    load.submitted(10.004)
    load.opened(10.0, "config.json")
    load.sample(10.1, [40, 0])
    load.sample(10.2, [100, 0])
    load.sample(10.3, [100, 0])
    load.first_demand_wait(10.25, 0.002)
    load.finished(10.4, "read")
    document = json.loads(json.dumps(timeline.document()))
    assert document["schema"] == 1
    (said,) = document["loads"]
    assert said["samples"] == [
        {"at_s": 0.1, "changed": [[0, 40]]},
        {"at_s": 0.2, "changed": [[0, 100]]},
        {"at_s": 0.3, "changed": []},
    ]
    assert {key: said[key] for key in said if key != "samples"} == {
        "model": "llama",
        "trigger": "config.json",
        "started": "2023-11-14T22:13:30.000+00:00",
        "layers": [{"label": "embedding", "bytes": 100}, {"label": "0", "bytes": 300}],
        "opens": [{"at_s": 0.0, "file": "config.json"}],
        "opens_left_out": 0,
        "submitted_s": 0.004,
        "first_demand_wait": {"at_s": 0.25, "waited_s": 0.002},
        "finished_s": 0.4,
        "outcome": "read",
    }


def test_what_was_not_observed_is_null() -> None:
    timeline = Timeline(ZERO)
    timeline.begin("llama", "warm", 1.0, LAYERS)
    (said,) = timeline.document()["loads"]
    assert [said[key] for key in ("submitted_s", "first_demand_wait", "finished_s", "outcome")] == [None] * 4
    assert said["samples"] == said["opens"] == []


def test_what_is_told_twice_counts_once() -> None:
    timeline = Timeline(ZERO)
    load = timeline.begin("llama", "warm", 0.0, LAYERS)
    for at_s in (1.0, 2.0):
        load.submitted(at_s)
        load.first_demand_wait(at_s, at_s)
        load.finished(at_s, f"at {at_s:g}")
    (said,) = timeline.document()["loads"]
    assert (said["submitted_s"], said["finished_s"], said["outcome"]) == (1.0, 1.0, "at 1")
    assert said["first_demand_wait"] == {"at_s": 1.0, "waited_s": 1.0}


def test_the_last_loads_are_kept() -> None:
    timeline = Timeline(ZERO)
    for number in range(LOADS + 5):
        timeline.begin(f"model {number}", "warm", float(number), [])
    assert [load["model"] for load in timeline.document()["loads"]] == [f"model {n}" for n in range(5, LOADS + 5)]


def test_opens_beyond_the_bound_are_counted() -> None:
    timeline = Timeline(ZERO)
    load = timeline.begin("llama", "warm", 0.0, LAYERS)
    for number in range(OPENS + 3):
        load.opened(float(number), "config.json")
    (said,) = timeline.document()["loads"]
    assert (len(said["opens"]), said["opens_left_out"]) == (OPENS, 3)


@pytest.mark.parametrize("count", [SAMPLES, SAMPLES + 1, 2 * SAMPLES, 10 * SAMPLES + 7])
def test_a_long_load_is_thinned_evenly_and_still_adds_up(count: int) -> None:
    timeline = Timeline(ZERO)
    load = timeline.begin("llama", "warm", 0.0, LAYERS)
    for number in range(count):
        load.sample(number * 0.1, [number, number // 2])
    (said,) = timeline.document()["loads"]
    found = resident(said)
    assert len(found) <= SAMPLES
    assert found[0] == (0.0, [0, 0])
    assert found[-1][1] == [count - 1, (count - 1) // 2]
    for at_s, numbers in found:
        number = round(at_s * 10)
        assert numbers == [number, number // 2]
    gaps = [later[0] - earlier[0] for earlier, later in itertools.pairwise(found[:-1])]
    assert max(gaps) <= 4 * count * 0.1 / SAMPLES + 0.1


def test_a_sample_has_a_number_for_each_layer() -> None:
    load = Timeline(ZERO).begin("llama", "warm", 0.0, LAYERS)
    with pytest.raises(ValueError, match="1 numbers for 2 layers"):
        load.sample(0.1, [1])


def test_threads_tell_at_once() -> None:
    timeline = Timeline(ZERO)
    load = timeline.begin("llama", "warm", 0.0, LAYERS)

    def tell() -> None:
        for number in range(300):
            load.sample(number * 0.001, [number % 100, 7])
            timeline.document()

    threads = [threading.Thread(target=tell) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (said,) = timeline.document()["loads"]
    assert 1 < len(said["samples"]) <= SAMPLES
    assert resident(said)[-1][1][1] == 7
