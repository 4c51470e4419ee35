from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from everest_ds.data.clips.batch import ClipBatch
from everest_ds.train.step import device_feed as feeding
from everest_ds.train.step.device_feed import DeviceFeed


def batch(number: int, *, pin: bool = False) -> ClipBatch:
    """Return a batch whose content is its number, large enough for a slow copy."""
    clips = torch.full((8, 3, 16, 112, 112), number % 256, dtype=torch.uint8, pin_memory=pin)
    label = torch.tensor([number])
    none = torch.zeros(0)
    return ClipBatch(clips_BCTHW=clips, frames_BT=none, noise_BS=none, label_B=label, index_B=label)


def move(batch: ClipBatch, device: torch.device) -> tuple[Tensor, ...]:
    return (batch.clips_BCTHW.to(device, non_blocking=True),)


def test_batches_come_in_order_and_looking_ahead_takes_none_without_a_gpu() -> None:
    source = iter([batch(number) for number in range(3)])
    feed = DeviceFeed(source, move, torch.device("cpu"))
    for number in range(3):
        found, (clips,) = feed.next()
        assert found.label_B.item() == clips[0, 0, 0, 0, 0].item() == number
        feed.look_ahead()
    with pytest.raises(StopIteration):
        feed.next()


def test_time_spent_waiting_for_the_loader_is_counted_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.5, 20.0, 22.0])
    monkeypatch.setattr(feeding.time, "perf_counter", lambda: next(clock))
    feed = DeviceFeed(iter([batch(0), batch(1)]), move, torch.device("cpu"))
    feed.next()
    assert feed.waited_s == 0.5
    feed.next()
    assert feed.waited_s == 2.5


class ReadyStream:
    """A fake of the loader's stream, whose next batch is ready or not."""

    def __init__(self) -> None:
        self.numbers: Iterator[int] = iter(range(100))
        self.is_ready = True

    def __next__(self) -> ClipBatch:
        return batch(next(self.numbers), pin=True)


@pytest.mark.gpu
def test_next_batch_is_copied_on_another_stream_and_read_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of forty batches is summed right after `next` on a busy device: no sum may see a partial copy."""
    monkeypatch.setattr(feeding, "BatchIterator", ReadyStream)
    device = torch.device("cuda", torch.cuda.current_device())
    streams: list[torch.cuda.Stream] = []

    def move_and_note(batch: ClipBatch, device: torch.device) -> tuple[Tensor, ...]:
        streams.append(torch.cuda.current_stream(device))
        return move(batch, device)

    source = ReadyStream()
    feed = DeviceFeed(source, move_and_note, device)  # type: ignore[arg-type]
    work = torch.randn(2048, 2048, device=device)
    sums = []
    for number in range(40):
        source.is_ready = number % 5 != 4  # sometimes no batch is ready for the look-ahead
        found, (clips,) = feed.next()
        assert found.label_B.item() == number
        sums.append(clips.sum(dtype=torch.int64))
        for _ in range(5):
            work = torch.tanh(work @ work)
        feed.look_ahead()
    expected = [number * 8 * 3 * 16 * 112 * 112 for number in range(40)]
    assert [int(value) for value in sums] == expected
    looked_ahead = [stream != torch.cuda.default_stream(device) for stream in streams]
    assert looked_ahead == [number % 5 != 0 for number in range(40)]
