from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from everest_ds.data.lists import node_sharing
from everest_ds.data.lists.node_sharing import read_on_node
from everest_ds.data.lists.packed_rows import PackedRows
from everest_ds.data.lists.video_list import read_list
from everest_ds.distributed import World
from everest_ds.errors import UserError


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(node_sharing, "_LEAST_BYTES", 0)
    (tmp_path / "list.csv").write_text("a.mp4 0\nb.mp4 1 0.5 2.0\n")
    return tmp_path / "list.csv"


def read_on_three(source: Path, read: Callable[[int], PackedRows]) -> list[Future[PackedRows]]:
    """Call a reader as three ranks of a node, with the rank's number as its argument."""
    with ThreadPoolExecutor(3) as ranks:
        return [ranks.submit(read_on_node, [source], partial(read, rank), world(rank)) for rank in range(3)]


def world(rank: int) -> World:
    return World(rank=rank, local_rank=rank, size=3, local_size=3)


def test_one_rank_reads_and_the_others_map_its_memory(source: Path) -> None:
    readers = []

    def read(rank: int) -> PackedRows:
        readers.append(rank)
        return read_list(source)

    rows = [found.result() for found in read_on_three(source, read)]
    assert readers == [0]
    assert rows[0] == rows[1] == rows[2] == read_list(source)
    assert len({os.fstat(one.memory[0]).st_ino for one in rows}) == 1
    assert rows[1][1].path == source.with_name("b.mp4")


def test_rank_that_is_given_nothing_reads_itself(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks read the list themselves if the first rank fails or never starts."""
    monkeypatch.setattr(node_sharing, "_WAIT_S", 0.2)

    def read(rank: int) -> PackedRows:
        if rank == 0:
            raise UserError("refused")
        return read_list(source)

    first, *others = read_on_three(source, read)
    assert isinstance(first.exception(), UserError)
    assert [found.result() for found in others] == [read_list(source)] * 2
    assert read_on_node([source], lambda: read_list(source), world(1)) == read_list(source)


def test_lists_of_other_users_are_not_taken(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_sharing, "_WAIT_S", 0.2)
    readers = []

    def read(rank: int) -> PackedRows:
        readers.append(rank)
        return read_list(source)

    monkeypatch.setattr(node_sharing, "_is_ours", lambda other: False)
    assert len(read_on_three(source, read)) == len(readers) == 3
