"""A plan under random changes says of every page what a dictionary of pages says."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from checkpoint.filling import PIECE_BYTES, cut
from checkpoint.page_plan import Plan, Run

PAGES = 40
spans = st.tuples(st.integers(0, PAGES - 1), st.integers(1, PAGES)).map(lambda one: (one[0], one[0] + one[1]))


@st.composite
def runs(draw: st.DrawFn) -> list[Run]:
    at, found = 0, []
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 8)), max_size=6)):
        at += gap
        found.append(Run(at, at + length, 1000 + draw(st.integers(0, 500))))
        at += length
    return found


changes = st.lists(
    st.one_of(
        st.tuples(st.just("remove"), spans, st.just(0)),
        st.tuples(st.just("move"), spans, st.integers(100, 160)),
        st.tuples(st.just("back"), spans, st.integers(0, PAGES)),
        st.tuples(st.just("copy"), spans, st.just(0)),
    ),
    max_size=8,
)


def pages(found: tuple[Run, ...] | list[Run]) -> dict[int, int]:
    return {page: run.offset + page - run.start for run in found for page in range(run.start, run.end)}


@given(first=runs(), then=changes, asked=st.lists(spans, max_size=5))
def test_a_plan_is_a_dictionary_of_pages(
    first: list[Run], then: list[tuple[str, tuple[int, int], int]], asked: list[tuple[int, int]]
) -> None:
    plan, model = Plan(first), pages(first)
    for what, (start, end), to in then:
        if what == "remove":
            taken = pages(plan.remove(start, end))
            assert taken == {page: model.pop(page) for page in list(model) if start <= page < end}
        elif what == "copy":
            other = plan.copy()
            other.remove(start, end)
        else:
            low = start + 100 if what == "back" else start
            high = low + end - start
            if what == "back" and to + end - start > 100:
                continue
            if low < to + end - start and to < high:
                continue  # mremap(2) refuses what overlaps
            taken_away = {page: model.pop(page) for page in list(model) if low <= page < high}
            for page in range(to, to + end - start):
                model.pop(page, None)
            moved = {page - low + to: offset for page, offset in taken_away.items()}
            model |= moved
            assert pages(plan.move(low, high, to)) == moved
        assert pages(plan.runs) == model
        assert list(plan.runs) == sorted(plan.runs)
        assert all(run.start < run.end for run in plan.runs)
    for start, end in asked:
        found = plan.first(start, end)
        inside = [page for page in sorted(model) if start <= page < end]
        if found is None:
            assert not inside
        else:
            assert found.start == inside[0]
            assert found.end <= end
            assert pages([found]).items() <= model.items()


@given(start=st.integers(0, 5 * PIECE_BYTES), nbytes=st.integers(1, 5 * PIECE_BYTES), offset=st.integers(0, 1 << 40))
def test_pieces_are_aligned_and_whole(start: int, nbytes: int, offset: int) -> None:
    run = Run(start, start + nbytes, offset)
    pieces = list(cut(run))
    assert pieces[0].start == run.start
    assert pieces[-1].end == run.end
    for one, following in itertools.pairwise(pieces):
        assert one.end == following.start
        assert one.end % PIECE_BYTES == 0
    for one in pieces:
        assert 0 < one.end - one.start <= PIECE_BYTES
        assert one.offset - offset == one.start - start
