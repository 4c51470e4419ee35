"""Checksums of weights: every bit counts, for any shape, and tensors that share memory are summed once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from everest_ds.train.watch.weights import held_by_all, sum_of_bits

CPU = torch.device("cpu")


def plain_sum(tensor: torch.Tensor, size: int) -> int:
    """Return the checksum in Python integers, from the bytes."""
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    bulk = len(data) - len(data) % 8
    numbers = [int.from_bytes(data[at : at + 8], "little", signed=True) for at in range(0, bulk, 8)]
    numbers += [int.from_bytes(data[at : at + size], "little", signed=True) for at in range(bulk, len(data), size)]
    return (sum(numbers) + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
@pytest.mark.parametrize("count", [1, 3, 8, 1001])
def test_checksum_is_the_sum_of_the_bits(dtype: torch.dtype, count: int) -> None:
    tensor = (torch.randn(count) * 100).to(dtype)
    assert int(sum_of_bits([tensor], CPU)) == plain_sum(tensor, tensor.element_size())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_single_bit_changes_the_checksum(dtype: torch.dtype) -> None:
    values = torch.randn(33).to(dtype)
    bits = values.view(torch.uint8).numpy()
    whole = int(sum_of_bits([values], CPU))
    for place in range(len(bits)):
        for bit in range(8):
            bits[place] ^= np.uint8(1 << bit)
            assert int(sum_of_bits([values], CPU)) != whole
            bits[place] ^= np.uint8(1 << bit)
    assert int(sum_of_bits([values], CPU)) == whole


def test_views_of_one_row_are_summed_once_and_whole() -> None:
    row = torch.randn(20)
    module = torch.nn.Module()
    module.a, module.b = torch.nn.Parameter(row[1:5]), torch.nn.Parameter(row[5:20].view(3, 5))
    module.register_buffer("empty", torch.empty(0))
    (found,) = held_by_all([*module.parameters(), *module.buffers()])
    assert torch.equal(found, row)


def test_unaligned_and_strided_tensors_have_a_checksum() -> None:
    row = torch.randn(9).bfloat16()
    assert int(sum_of_bits([row[1:]], CPU)) == plain_sum(row[1:], 2)
    strided = torch.randn(4, 6)[:, ::2]
    assert int(sum_of_bits([strided], CPU)) == plain_sum(strided, 4)
    assert int(sum_of_bits([], CPU)) == 0
