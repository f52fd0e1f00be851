"""The driver double answers as the real driver did on a GPU machine: `tests/gpu/facts.json`, call by call."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import scenarios
from tests.gpu.scenarios import MODELLED, OBSERVED, Trace, compared, intact
from tests.helpers.cuda_bench import double_bench

FACTS = Path(scenarios.__file__).with_name("facts.json")


@pytest.mark.parametrize("scenario", MODELLED)
def test_it_answers_as_the_driver_did(
    scenario: Callable[[Trace], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts: dict[str, Any] = json.loads(FACTS.read_text(encoding="utf-8"))
    with double_bench(tmp_path, monkeypatch) as bench:
        trace = Trace(bench)
        scenario(trace)
    assert compared(trace.calls) == compared(facts["traces"][scenario.__name__])


def test_every_scenario_is_recorded_and_left_memory_as_it_was() -> None:
    traces: dict[str, Any] = json.loads(FACTS.read_text(encoding="utf-8"))["traces"]
    assert traces.keys() == {one.__name__ for one in (*MODELLED, *OBSERVED)}
    assert all(intact(calls) for calls in traces.values())
