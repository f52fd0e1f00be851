"""What all GPU tests share: skipped where there is no GPU, and no process outlives its test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from checkpoint.cuda_helper import Cuda, absence
from tests.gpu.bench import RealBench, real_bench


@pytest.fixture(autouse=True)
def gpu() -> None:
    if lacking := absence():
        pytest.skip(f"this machine lacks a GPU: {lacking}")


@pytest.fixture
def bench() -> Iterator[RealBench]:
    with real_bench() as one:
        yield one


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    found = Cuda.detect()
    assert found is not None
    with found:
        yield found
