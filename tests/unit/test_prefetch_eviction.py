"""What is evicted, and that it leaves the page cache."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefetch.eviction import Resident, choose
from prefetch.residency import drop
from tests.helpers.page_cache import resident_bytes

MODELS = st.lists(
    st.builds(
        Resident,
        key=st.text("abc", max_size=3),
        nbytes=st.integers(0, 100),
        last_wanted_s=st.integers(0, 5).map(float),
        in_use=st.booleans(),
        pinned=st.booleans(),
    ),
    max_size=12,
)


@given(models=MODELS, need_bytes=st.integers(-5, 600))
def test_what_always_holds(models: list[Resident], need_bytes: int) -> None:
    chosen = choose(models, need_bytes)
    freed = sum(model.nbytes for model in chosen)
    may_go = [model for model in models if not model.in_use and not model.pinned and model.nbytes]
    kept = list(may_go)
    for model in chosen:
        kept.remove(model)  # each at most once, and only such as may go
    assert freed >= need_bytes or not kept, "short of what is needed only when nothing is left to go"
    if chosen:
        assert freed - chosen[-1].nbytes < need_bytes, "no more than it takes"
        assert max(m.last_wanted_s for m in chosen) <= min((m.last_wanted_s for m in kept), default=9e9)
        assert [m.last_wanted_s for m in chosen] == sorted(m.last_wanted_s for m in chosen)
    assert chosen == choose(reversed(models), need_bytes), "the order they come in does not matter"


def test_of_two_wanted_at_once_the_larger_goes() -> None:
    small = Resident(key="a", nbytes=1, last_wanted_s=3)
    large = Resident(key="b", nbytes=9, last_wanted_s=3)
    assert choose([small, large], 1) == [large]


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """4 MiB, written to the disk and resident."""
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(4 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    assert resident_bytes(path) == 4 << 20
    return path


def test_a_file_leaves_the_page_cache(cached: Path) -> None:
    with cached.open("rb") as file:
        drop(file.fileno())
    assert resident_bytes(cached) == 0


def test_what_is_mapped_stays(cached: Path) -> None:
    """The kernel's own guard: a user that nobody saw loses nothing that it has touched."""
    with cached.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[: 4 << 20]
        drop(file.fileno())
        assert resident_bytes(cached) == 4 << 20


def test_no_file(cached: Path) -> None:
    reader, writer = os.pipe()
    with pytest.raises(OSError, match="Illegal seek"):
        drop(reader)
    os.close(reader)
    os.close(writer)
