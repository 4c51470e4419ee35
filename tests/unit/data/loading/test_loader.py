"""The loader's workers: their batches, also when workers hang, crash or are killed."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from everest_ds.config import PretrainDataConfig
from everest_ds.data.clips.batch import Clip, ClipBatch
from everest_ds.data.clips.cuts import PretrainCut
from everest_ds.data.clips.dataset import ClipDataset, make_loader
from everest_ds.data.clips.sampling import GlobalBatchSampler, SampleKey
from everest_ds.data.lists.video_list import VideoRow, packed, read_list
from everest_ds.data.loading.loader import BatchIterator
from everest_ds.data.loading.pool import Mark
from everest_ds.data.readers.video import Video
from everest_ds.errors import UserError
from tests.conftest import REPOSITORY

CONFIG = PretrainDataConfig(num_frames=8, sampling_stride=2, image_size=32, num_workers=0)
GLOBAL = 8


class TroubledDataset(ClipDataset):
    """A dataset in which opening a video named hang, crash, kill-once or bug does what the name says."""

    def _open(self, index: int) -> Video:
        path = self.rows[index].path
        if path.stem == "hang":
            time.sleep(600)
        if path.stem == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if path.stem == "kill-once" and not path.with_suffix(".killed").exists():
            path.with_suffix(".killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if path.stem == "bug":
            raise ZeroDivisionError("a bug")
        return super()._open(index)


def make_dataset(
    rows: Sequence[VideoRow], config: PretrainDataConfig = CONFIG, kind: type[ClipDataset] = ClipDataset
) -> ClipDataset:
    return kind(rows, PretrainCut(config), seed=0, noise_length=5)


def load(
    dataset: ClipDataset, *, steps: int = 3, start: int = 0, world: int = 1, micro: int = 4
) -> list[ClipBatch]:
    """Return the micro-batches of all ranks, in the order of the global batches."""
    parts = []
    for rank in range(world):
        sampler = GlobalBatchSampler(
            num_samples=len(dataset), global_size=GLOBAL, micro_size=micro, rank=rank, world_size=world, seed=0,
            repeats=dataset.config.repeats, start_step=start, end_step=steps,
        )  # fmt: skip
        with closing(iter(make_loader(dataset, sampler, micro_size=micro, pin_memory=False))) as batches:
            parts.append(list(batches))
    return [batch for together in zip(*parts, strict=True) for batch in together]


def contents(batches: Sequence[ClipBatch]) -> dict[str, torch.Tensor]:
    names = ("clips_BCTHW", "frames_BT", "noise_BS", "label_B", "index_B")
    return {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}


def same(batches: Sequence[ClipBatch], others: Sequence[ClipBatch]) -> bool:
    assert [bad for batch in batches for bad in batch.bad] == [bad for batch in others for bad in batch.bad]
    expected = contents(others)
    return all(torch.equal(value, expected[name]) for name, value in contents(batches).items())


@pytest.fixture(scope="module")
def rows(demo_folder: Path) -> list[VideoRow]:
    """Twelve videos; two of the files are missing."""
    return with_video(read_list(demo_folder / "train.csv")[:12], demo_folder / "gone.mp4")


@pytest.fixture(scope="module")
def good(demo_folder: Path) -> list[VideoRow]:
    """Twelve videos."""
    return read_list(demo_folder / "train.csv")[:12]


def with_video(rows: Sequence[VideoRow], path: Path) -> list[VideoRow]:
    return [VideoRow(path, 0) if number in (2, 5) else row for number, row in enumerate(rows)]


@pytest.mark.parametrize(("repeats", "frames"), [(1, "shared"), (2, "own"), (4, "shared"), (4, "own")])
def test_global_batches_are_the_same_for_any_processes_and_after_a_resume(
    repeats: int, frames: str, demo_folder: Path
) -> None:
    """0, 1 and 3 workers per rank, 1 and 2 ranks, a start in mid-epoch, and bad files in the list."""
    rows = read_list(demo_folder / "train.csv")[:20]  # 2, 5 and 10 steps per epoch
    rows[::6] = [VideoRow(demo_folder / "gone.mp4", 0)] * 4
    config = replace(CONFIG, repeats=repeats, repeat_frames=frames)  # type: ignore[type-var]
    expected = load(make_dataset(rows, config), steps=5)
    assert sum(len(batch.bad) for batch in expected) >= repeats
    assert all(batch.num_lost == 0 for batch in expected)
    for workers, world, micro in ((1, 1, 8), (3, 2, 4), (0, 2, 2)):
        parallel = make_dataset(rows, replace(config, num_workers=workers))
        assert same(load(parallel, steps=5, world=world, micro=micro), expected)
    assert same(load(make_dataset(rows, replace(config, num_workers=2)), steps=5, start=3), expected[6:])


def test_clips_of_a_video_are_those_of_each_alone_from_one_decoding(
    rows: list[VideoRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    original = Video.of_row

    def count(row: VideoRow, reader: str, max_pixels: int) -> Video:
        opened.append(row.path)
        return original(row, reader, max_pixels)  # type: ignore[arg-type]

    monkeypatch.setattr(Video, "of_row", staticmethod(count))
    for frames in ("shared", "own"):
        dataset = make_dataset(rows, replace(CONFIG, repeats=3, repeat_frames=frames))  # type: ignore[type-var]
        keys = [SampleKey(1, index, repeat) for repeat in range(3) for index in (7, 9)]
        (request,) = dataset.requests(keys[:1] + keys[2:3] + keys[4:5])
        opened.clear()
        together = dataset(request, {}, lambda _: None)
        assert opened == [dataset.rows[7].path]
        for key, clip in zip(request, together, strict=True):
            alone = dataset[key]
            assert clip.pixels is not None
            assert torch.equal(clip.pixels, alone.pixels)  # type: ignore[arg-type]
            assert clip.frames_T.tolist() == alone.frames_T.tolist()
        drawn = {tuple(clip.frames_T.tolist()) for clip in together}
        assert (len(drawn) == 1) == (frames == "shared")
        assert len({clip.pixels.sum().item() for clip in together if clip.pixels is not None}) > 1  # crops differ


def test_packed_rows_are_the_rows_in_ninety_bytes_each() -> None:
    rows = [
        VideoRow(Path("a b/c,d.mp4"), 3, line=7),
        VideoRow(Path(os.fsdecode(b"not utf-8 \xff.avi")), -1),
        VideoRow(Path("/w/ü.mkv"), 0, start_s=0.1, end_s=12.25),
    ]
    again = pickle.loads(pickle.dumps(packed(rows)))
    assert list(again) == rows
    assert (len(again), again[-1], again[0:2]) == (3, rows[2], rows[:2])
    assert list(packed(rows[:2])) == rows[:2]
    with pytest.raises(IndexError):
        again[3]
    many = [VideoRow(Path(f"/data/videos/class {i % 400}/{i:032d}.mp4"), i % 400, i) for i in range(20_000)]
    in_bytes = pickle.dumps(packed(many))
    assert len(in_bytes) < 90 * len(many)
    assert list(pickle.loads(in_bytes)) == many


def test_requests_keep_the_clips_of_a_video_and_of_a_mixed_pair_together(rows: list[VideoRow]) -> None:
    dataset = make_dataset(rows)
    a0, b0, a1, b1, c0, d0 = (SampleKey(0, i, r) for i, r in ((0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0)))
    assert dataset.requests([a0, b0, c0]) == [[a0], [b0], [c0]]
    assert dataset.requests([a0, b0, a1, b1, c0, d0]) == [[a0, b0, a1, b1], [c0], [d0]]
    dataset.mixer = object()  # type: ignore[assignment]
    assert dataset.requests([a0, b0, a1, b1, c0, d0]) == [[a0, b0, a1, b1], [c0, d0]]
    assert dataset.requests([a0, b0, c0, d0]) == [[a0, b0], [c0, d0]]


@pytest.mark.parametrize("trouble", ["hang", "crash"])
@pytest.mark.parametrize("repeats", [1, 2])
def test_video_that_hangs_or_ends_its_process_is_a_bad_one_as_any_other(
    repeats: int, trouble: str, rows: list[VideoRow], tmp_path: Path
) -> None:
    """The batches equal those of a run without the file; only the recorded reason differs."""
    expected = load(make_dataset(rows, replace(CONFIG, repeats=repeats)))
    config = replace(CONFIG, num_workers=2, timeout_s=2.0, repeats=repeats)
    began = time.monotonic()
    batches = load(make_dataset(with_video(rows, tmp_path / f"{trouble}.mp4"), config, TroubledDataset))
    assert time.monotonic() - began < 60
    found = contents(batches)
    assert all(torch.equal(value, found[name]) for name, value in contents(expected).items())
    reason = {"hang": "no answer within 2 s", "crash": "it ended its process (signal 11)"}[trouble]
    bad = [sample for batch in batches for sample in batch.bad]
    assert [(sample.epoch, sample.index, sample.repeat) for sample in bad] == [
        (sample.epoch, sample.index, sample.repeat) for batch in expected for sample in batch.bad
    ]
    assert {(sample.path, sample.reason) for sample in bad} == {(str(tmp_path / f"{trouble}.mp4"), reason)}


def test_process_that_is_killed_once_costs_no_sample(good: list[VideoRow], tmp_path: Path) -> None:
    (tmp_path / "kill-once.mp4").symlink_to(good[3].path)
    swapped = [replace(row, path=tmp_path / "kill-once.mp4") if row is good[3] else row for row in good]
    config = replace(CONFIG, num_workers=2)
    batches = load(make_dataset(swapped, config, TroubledDataset))
    assert (tmp_path / "kill-once.killed").exists()
    assert same(batches, load(make_dataset(good)))
    assert not any(batch.bad for batch in batches)


def test_processes_killed_from_outside_are_replaced_and_nothing_is_lost_or_doubled(good: list[VideoRow]) -> None:
    sampler = GlobalBatchSampler(
        num_samples=len(good), global_size=4, micro_size=4, rank=0, world_size=1, seed=0, end_step=30
    )
    dataset = make_dataset(good, replace(CONFIG, num_workers=2))
    batches = iter(make_loader(dataset, sampler, micro_size=4, pin_memory=False))
    assert isinstance(batches, BatchIterator)
    seen, killed = [], set()
    with closing(batches):
        for number, batch in enumerate(batches):
            seen.append(batch)
            if number % 10 == 2:
                pid = batches.pids[number % 2]
                killed.add(pid)
                os.kill(pid, signal.SIGKILL)
    assert len(killed) == 3
    alone = make_loader(make_dataset(good), sampler, micro_size=4, pin_memory=False)
    assert same(seen, list(alone))
    assert not any(batch.bad for batch in seen)


def test_file_that_goes_away_in_mid_run_is_replaced_from_then_on(good: list[VideoRow], tmp_path: Path) -> None:
    path = tmp_path / "here.mp4"
    path.write_bytes(good[3].path.read_bytes())
    swapped = [replace(row, path=path) if row is good[3] else row for row in good[:4]]
    sampler = GlobalBatchSampler(
        num_samples=4, global_size=4, micro_size=4, rank=0, world_size=1, seed=0, end_step=40
    )
    dataset = make_dataset(swapped, replace(CONFIG, num_workers=2))
    bad = []
    with closing(iter(make_loader(dataset, sampler, micro_size=4, pin_memory=False))) as batches:
        for number, batch in enumerate(batches):
            bad.append([sample.reason for sample in batch.bad])
            if number == 5:
                path.unlink()
    assert bad[:6] == [[]] * 6
    assert all(set(reasons) == {"no such file"} for reasons in bad[15:])


def test_bad_real_clips_neither_hang_nor_end_a_process(real_clips: Path, good: list[VideoRow]) -> None:
    """The list has all 28 broken or awkward files and as many good ones; each is drawn in every epoch."""
    awkward = sorted(path for path in (real_clips / "bad").iterdir() if path.suffix != ".csv")
    assert len(awkward) == 28
    rows = [VideoRow(path, 0) for path in awkward] + good + good + good[:4]
    sampler = GlobalBatchSampler(
        num_samples=56, global_size=8, micro_size=8, rank=0, world_size=1, seed=0, end_step=14
    )
    for reader in ("decord", "pyav"):
        dataset = make_dataset(rows, replace(CONFIG, num_workers=2, timeout_s=20.0, reader=reader))  # type: ignore[arg-type]
        stream = iter(make_loader(dataset, sampler, micro_size=8, pin_memory=False))
        assert isinstance(stream, BatchIterator)
        with closing(stream):
            pids = stream.pids
            batches = [next(stream) for _ in range(14)]
            assert stream.pids == pids
        assert all(batch.num_lost == 0 for batch in batches)
        bad = {Path(sample.path) for batch in batches for sample in batch.bad}
        assert bad <= set(awkward)
        assert {"audio_only.mp4", "html_404.mp4", "text.mp4"} <= {path.name for path in bad}
        reasons = [sample.reason for batch in batches for sample in batch.bad]
        assert not any("no answer" in reason or "ended its process" in reason for reason in reasons)


class DyingDataset(ClipDataset):
    """A dataset that ends its worker before it opens a video."""

    def __call__(self, request: Sequence[SampleKey], unreadable: Mapping[int, str], mark: Mark) -> list[Clip]:
        os._exit(5)


def test_processes_that_end_before_they_open_a_video_are_an_error(good: list[VideoRow]) -> None:
    with pytest.raises(RuntimeError, match=r"end before they open one: it ended its process \(exit code 5\)"):
        load(make_dataset(good, replace(CONFIG, num_workers=1), DyingDataset))


def test_thread_that_looks_after_processes_leaves_the_number_of_threads_as_it_is(good: list[VideoRow]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        load(make_dataset(good, replace(CONFIG, num_workers=1)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_bug_in_a_process_is_raised_with_its_traceback(rows: list[VideoRow], tmp_path: Path) -> None:
    config = replace(CONFIG, num_workers=1)
    with pytest.raises(RuntimeError, match=r"(?s)in a process that reads videos.*_open.*ZeroDivisionError: a bug"):
        load(make_dataset(with_video(rows, tmp_path / "bug.mp4"), config, TroubledDataset))


def test_batches_that_nobody_takes_are_made_ahead_up_to_a_bound(rows: list[VideoRow]) -> None:
    drawn: list[SampleKey] = []

    def endless() -> Iterator[list[SampleKey]]:
        for number in range(10**6):
            keys = [SampleKey(number, index) for index in range(4)]
            drawn.extend(keys)
            yield keys

    dataset = make_dataset(rows, replace(CONFIG, num_workers=2, prefetch_batches=3))
    loader = make_loader(dataset, endless(), micro_size=4, pin_memory=False)  # type: ignore[arg-type]
    with closing(iter(loader)) as batches:
        next(batches)
        time.sleep(2)
        # One batch was taken, one is ready, one is in the thread, three are ahead, two workers have two clips each,
        # and the batch of the next clip has been drawn.
        assert 4 * 6 <= len(drawn) <= 4 * 9


def test_closing_early_or_losing_the_stream_leaves_no_process(rows: list[VideoRow], tmp_path: Path) -> None:
    config = replace(CONFIG, num_workers=2)
    for close in (True, False):
        dataset = make_dataset(with_video(rows, tmp_path / "hang.mp4"), config, TroubledDataset)
        sampler = GlobalBatchSampler(
            num_samples=12, global_size=4, micro_size=4, rank=0, world_size=1, seed=0, end_step=30
        )
        stream = iter(make_loader(dataset, sampler, micro_size=4, pin_memory=False))
        assert isinstance(stream, BatchIterator)
        pids = stream.pids
        next(stream)
        if close:
            stream.close()
            with pytest.raises(StopIteration):
                next(stream)
        del stream
        assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_processes_leave_with_the_one_that_started_them(rows: list[VideoRow], tmp_path: Path) -> None:
    """Workers end with their parent, also a hanging worker, and also if the parent is killed."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "from pathlib import Path\n"
        "from dataclasses import replace\n"
        "from everest_ds.data.clips.dataset import make_loader\n"
        "from everest_ds.data.lists.video_list import VideoRow\n"
        "from everest_ds.data.clips.sampling import GlobalBatchSampler\n"
        "from tests.unit.data.loading.test_loader import CONFIG, TroubledDataset, make_dataset\n"
        "if __name__ == '__main__':\n"
        "    rows = [VideoRow(Path('hang.mp4'), 0)] * 4\n"
        "    sampler = GlobalBatchSampler(num_samples=4, global_size=4, micro_size=4, rank=0, world_size=1,\n"
        "                                 seed=0, end_step=3)\n"
        "    dataset = make_dataset(rows, replace(CONFIG, num_workers=2), TroubledDataset)\n"
        "    stream = iter(make_loader(dataset, sampler, micro_size=4, pin_memory=False))\n"
        "    time.sleep(4)\n"
        "    print(*stream.pids, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[1] == 'kill' else sys.exit(0)\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, script, how],
            cwd=REPOSITORY,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for how in ("kill", "exit")
    ]
    for ended in both:
        pids = [int(word) for word in ended.communicate(timeout=240)[0].split()]
        assert len(pids) == 2
        deadline = time.monotonic() + 20
        while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def private_kib(pid: int) -> int:
    """Return a process's private memory: without mapped files and shared memory."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1])


@pytest.mark.parametrize("total", [1000, pytest.param(5000, marks=pytest.mark.slow)])
def test_memory_of_processes_does_not_grow_from_clip_to_clip(total: int, good: list[VideoRow]) -> None:
    sampler = GlobalBatchSampler(
        num_samples=12, global_size=8, micro_size=8, rank=0, world_size=1, seed=0, end_step=total // 8
    )
    dataset = make_dataset(good, replace(CONFIG, num_workers=2))
    stream = iter(make_loader(dataset, sampler, micro_size=8, pin_memory=False))
    assert isinstance(stream, BatchIterator)
    clips, after_warm_up = 0, []
    with closing(stream):
        for batch in stream:
            clips += len(batch.clips_BCTHW)
            if clips == total // 5:
                pids = stream.pids
                after_warm_up = [private_kib(pid) for pid in pids]
            if clips == total - 8:
                growth = [private_kib(pid) / before for pid, before in zip(pids, after_warm_up, strict=True)]
    assert clips == total
    assert max(growth) < 1.05, growth


def test_crops_that_the_device_resizes_make_the_same_clips(rows: list[VideoRow]) -> None:
    expected = load(make_dataset(rows))
    for workers in (0, 2):
        batches = load(make_dataset(rows, replace(CONFIG, resize="device", num_workers=workers)))
        assert all(len(batch.crops) == 4 and not len(batch.clips_BCTHW) for batch in batches)
        clips = torch.cat([batch.clips_on(torch.device("cpu"), 32) for batch in batches])
        assert torch.equal(clips, contents(expected)["clips_BCTHW"])
    assert torch.equal(expected[0].clips_on(torch.device("cpu"), 32), expected[0].clips_BCTHW)


def test_crop_too_large_for_the_device_is_a_bad_sample_that_names_the_way_out(
    rows: list[VideoRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("everest_ds.data.clips.cuts._LARGEST_CROP_PX", 20)
    clip: Clip = make_dataset(rows, replace(CONFIG, resize="device"))[SampleKey(0, 0)]
    assert clip.pixels is None
    assert "pixels are too large for data.resize=device; use fast, or make the videos smaller" in clip.bad[0].reason


def test_reader_that_cannot_be_imported_is_refused_before_a_process_begins(
    rows: list[VideoRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("everest_ds.data.readers.choice.obstacle", {"torchcodec": "not installed; install it"}.get)
    with pytest.raises(UserError, match=r"data\.reader=torchcodec is not available: not installed"):
        make_dataset(rows, replace(CONFIG, reader="torchcodec", num_workers=2))
