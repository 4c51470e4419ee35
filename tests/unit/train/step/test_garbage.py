from __future__ import annotations

import gc
import weakref

import pytest

from everest_ds.train.step import garbage


class Node:
    """An object that refers to itself, so that only the garbage collector can free it."""

    def __init__(self) -> None:
        self.me = self


def make_garbage(count: int) -> list[weakref.ref[Node]]:
    return [weakref.ref(Node()) for _ in range(count)]


def test_garbage_waits_for_its_step_and_is_gone_after_it() -> None:
    assert gc.isenabled()
    with garbage.held():
        references = make_garbage(5000)  # enough to start an automatic collection
        for step in range(1, garbage.STEPS_BETWEEN):
            garbage.collect_after(step)
        assert all(reference() is not None for reference in references)
        garbage.collect_after(garbage.STEPS_BETWEEN)
        assert all(reference() is None for reference in references)
    assert gc.isenabled()


def test_collector_is_as_it_was_after_an_error_too() -> None:
    before = gc.get_freeze_count()
    with pytest.raises(RuntimeError), garbage.held():
        assert not gc.isenabled()
        assert gc.get_freeze_count() > before
        raise RuntimeError
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    gc.disable()
    try:
        with garbage.held():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
