"""What retention removes and keeps, whatever is in the store and whatever is asked for."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.retention import Kept, choose

NOW = 10**18
SNAPSHOTS = st.lists(
    st.builds(
        Kept,
        name=st.text("abc", min_size=1, max_size=4),
        created_ns=st.integers(NOW - 10**12, NOW + 10**10) | st.sampled_from([0, NOW, NOW - 10**11]),
        nbytes=st.integers(0, 1000),
    ),
    max_size=12,
    unique_by=lambda one: one.name,
)
KEEP = st.none() | st.integers(0, 14)
AGE = st.none() | st.floats(0, 2000)
MOST = st.none() | st.integers(0, 5000)


@settings(max_examples=500, deadline=None)
@given(snapshots=SNAPSHOTS, keep_last=KEEP, older_than_s=AGE, max_bytes=MOST)
def test_what_is_removed(
    snapshots: list[Kept], keep_last: int | None, older_than_s: float | None, max_bytes: int | None
) -> None:
    gone = choose(snapshots, keep_last=keep_last, older_than_s=older_than_s, max_bytes=max_bytes, now_ns=NOW)
    assert len(set(gone)) == len(gone)
    by_name = {one.name: one for one in snapshots}
    assert set(gone) <= set(by_name)
    stay = [one for one in snapshots if one.name not in gone]
    oldest_first = sorted(snapshots, key=lambda one: (one.created_ns, one.name))
    protected = oldest_first[max(0, len(snapshots) - (keep_last or 0)) :]
    assert not {one.name for one in protected} & set(gone)
    free = [one for one in stay if one not in protected]
    total = sum(one.nbytes for one in stay)
    if max_bytes is not None:
        assert total <= max_bytes or not free
    if older_than_s is not None:
        assert all(NOW - one.created_ns <= older_than_s * 10**9 for one in free)
    if keep_last is not None and older_than_s is None and max_bytes is None:
        assert free == []
    # Nothing goes without a reason, and the oldest go first.
    assert list(gone) == [one.name for one in oldest_first if one.name in gone]
    left = sum(one.nbytes for one in snapshots)
    for one in map(by_name.__getitem__, gone):
        too_old = older_than_s is not None and NOW - one.created_ns > older_than_s * 10**9
        too_much = max_bytes is not None and left > max_bytes
        only_number = keep_last is not None and older_than_s is None and max_bytes is None
        assert too_old or too_much or only_number
        left -= one.nbytes
    # And asked again, nothing more goes.
    assert choose(stay, keep_last=keep_last, older_than_s=older_than_s, max_bytes=max_bytes, now_ns=NOW) == ()


@given(snapshots=SNAPSHOTS)
def test_nothing_asked_for_nothing_removed(snapshots: list[Kept]) -> None:
    assert choose(snapshots, now_ns=NOW) == ()
    assert choose(snapshots, keep_last=len(snapshots), older_than_s=0, max_bytes=0, now_ns=NOW) == ()
