from __future__ import annotations

import pytest
import torch

from everest_ds.data.loading.shared_memory import Layout, Slots


def test_slots_hold_what_fits_and_take_memory_only_where_written_to() -> None:
    slots = Slots(3, 4)
    square = Layout((2, 2), (2, 1))
    slots.view(1, square).copy_(torch.tensor([[1, 2], [3, 4]]))
    assert slots.view(1, square).tolist() == [[1, 2], [3, 4]]
    assert slots.view(1, Layout.of(torch.empty(2, 2).T)).tolist() == [[1, 3], [2, 4]]
    with pytest.raises(ValueError, match="5 bytes do not fit into a slot of 4"):
        slots.view(0, Layout((5,), (1,)))
    assert slots.view(2, square).tolist() == [[0, 0], [0, 0]]
    large = Slots(100, 2**30)
    large.view(99, Layout((3,), (1,))).fill_(7)
    assert large.view(99, square).tolist() == [[7, 7], [7, 0]]


def test_layout_is_that_of_a_dense_copy() -> None:
    whole = torch.arange(120).reshape(2, 3, 4, 5)
    assert Layout.of(whole) == ((2, 3, 4, 5), (60, 20, 5, 1))
    assert Layout.of(whole.permute(3, 0, 1, 2)) == ((5, 2, 3, 4), (1, 60, 20, 5))
    assert Layout.of(whole[:, :, 1:3]) == ((2, 3, 2, 5), (30, 10, 5, 1))
