"""The order in which a model is read, and how its loader changes it."""

from __future__ import annotations

import itertools

import pytest

from prefetch.course import CHUNK_BYTES, RUN_BYTES, Course, Lookout
from prefetch.plan import Extent

MIB = 1 << 20
PLAN = [Extent("a", 400 * MIB, 100 * MIB), Extent("a", 0, 100 * MIB), Extent("b", 0, 50 * MIB)]


class Memory:
    """What is in memory of files: MiB by MiB."""

    def __init__(self) -> None:
        self.held: set[tuple[str, int]] = set()

    def read(self, file: str, first_mib: int, mib: int) -> None:
        self.held |= {(file, number) for number in range(first_mib, first_mib + mib)}

    def resident(self, extent: Extent) -> int:
        return sum(MIB for at in range(extent.offset // MIB, extent.end // MIB) if (extent.file, at) in self.held)


@pytest.fixture
def memory() -> Memory:
    return Memory()


def test_parts_end_where_their_multiples_do() -> None:
    parts = list(Course([Extent("f", CHUNK_BYTES - 4096, CHUNK_BYTES + 8192)]))
    assert [(one.offset, one.nbytes) for one in parts] == [
        (CHUNK_BYTES - 4096, 4096),
        (CHUNK_BYTES, CHUNK_BYTES),
        (2 * CHUNK_BYTES, 4096),
    ]


def test_it_goes_on_in_the_order_of_the_files_where_it_is_led() -> None:
    course = Course(PLAN)
    assert next(course) == Extent("a", 400 * MIB, CHUNK_BYTES)
    course.lead(Extent("a", 70 * MIB, 0))
    assert course.left() == [
        Extent("a", 70 * MIB, 30 * MIB),
        Extent("a", 404 * MIB, 96 * MIB),
        Extent("b", 0, 50 * MIB),
        Extent("a", 0, 70 * MIB),
    ]


def test_reads_are_larger_once_the_first_layers_were_read() -> None:
    course = Course([Extent("f", 0, 100 * MIB)], 5 * MIB)
    assert [one.nbytes // MIB for one in itertools.islice(course, 4)] == [4, 4, 8, 16]
    assert next(Course([Extent("f", 0, 100 * MIB)], 0)).nbytes == RUN_BYTES


def test_what_is_put_back_comes_next() -> None:
    course = Course(PLAN, 0)
    first = next(course)
    course.put_back(Extent(first.file, first.offset + CHUNK_BYTES, first.nbytes - CHUNK_BYTES))
    assert next(course) == Extent("a", 404 * MIB, first.nbytes - CHUNK_BYTES)


def test_each_byte_is_read_once_wherever_it_is_led() -> None:
    for file, at in itertools.product("ab", range(0, 600, 50)):
        course = Course(PLAN)
        begun = [next(course), next(course)]
        course.lead(Extent(file, at * MIB + 3, 0))
        assert sum(one.nbytes for one in begun + list(course)) == 250 * MIB


def test_who_reads_elsewhere_is_found_behind_what_was_read(memory: Memory) -> None:
    course, lookout = Course(PLAN), Lookout(memory.resident)
    assert lookout.elsewhere(course.left()) is None
    memory.read("b", 8, 9)
    place = lookout.elsewhere(course.left())
    assert place is not None
    assert (place.file, place.offset) == ("b", 16 * MIB)
    course.lead(place)
    assert next(course) == Extent("b", 16 * MIB, CHUNK_BYTES)


def test_first_pages_of_tensors_lead_nowhere(memory: Memory) -> None:
    course, lookout = Course(PLAN), Lookout(memory.resident)
    lookout.elsewhere(course.left())
    for at in range(0, 100, 8):
        memory.read("a", at, 1)
    assert lookout.elsewhere(course.left()) is None


def test_what_was_there_before_leads_nowhere(memory: Memory) -> None:
    memory.read("b", 0, 50)
    course, lookout = Course(PLAN), Lookout(memory.resident)
    assert [lookout.elsewhere(course.left()) for _ in range(3)] == [None, None, None]


def test_where_it_is_going_anyway_it_is_not_led(memory: Memory) -> None:
    course, lookout = Course(PLAN), Lookout(memory.resident)
    lookout.elsewhere(course.left())
    memory.read("a", 400, 12)
    assert lookout.elsewhere(course.left()) is None


def test_the_place_with_most_of_it_counts(memory: Memory) -> None:
    course, lookout = Course(PLAN), Lookout(memory.resident)
    lookout.elsewhere(course.left())
    memory.read("a", 0, 4)
    memory.read("b", 0, 50)
    place = lookout.elsewhere(course.left())
    assert place == Extent("b", 50 * MIB, 0)
