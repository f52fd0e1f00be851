"""Copies pass a gate together; a change has it to itself, and does not starve them."""

from __future__ import annotations

import threading

from checkpoint.gate import Gate

_WAIT_S = 10.0


def test_copies_pass_together_and_a_change_waits_for_all() -> None:
    gate = Gate()
    both = threading.Barrier(2)
    inside = 0
    go_on = threading.Event()
    lock = threading.Lock()

    def copy() -> None:
        nonlocal inside
        with gate.copying():
            with lock:
                inside += 1
            both.wait(_WAIT_S)
            assert go_on.wait(_WAIT_S)
            with lock:
                inside -= 1

    copiers = [threading.Thread(target=copy) for _ in range(2)]
    for one in copiers:
        one.start()
    seen = []

    def change() -> None:
        with gate.changing():
            seen.append(inside)

    changer = threading.Thread(target=change)
    changer.start()
    changer.join(0.05)
    assert changer.is_alive()
    go_on.set()
    for one in [*copiers, changer]:
        one.join(_WAIT_S)
    assert seen == [0]


def test_changes_one_after_the_other_let_waiting_copies_in_between() -> None:
    gate = Gate()
    copied = threading.Event()
    tried = threading.Event()

    def copy() -> None:
        tried.set()
        with gate.copying():
            copied.set()

    copier = threading.Thread(target=copy)
    with gate.changing():
        copier.start()
        assert tried.wait(_WAIT_S)
        while not gate._waiting:
            pass
        assert not copied.is_set()
    with gate.changing():
        assert copied.is_set()
    copier.join(_WAIT_S)
