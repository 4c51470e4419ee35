"""How many clips a second the loader of a run delivers, by the clock on the wall."""

import math
import time
from collections.abc import Callable, Sequence

from everest_ds.data.clips.dataset import make_loader
from everest_ds.data.clips.sampling import GlobalBatchSampler
from everest_ds.data.lists.video_list import VideoRow
from everest_ds.train.tasks import Task

# Batches of each loader process that are timed, after one that is not.
_TIMED_BATCHES = 4


def loader_clips_per_s(
    task: Task,
    rows: Sequence[VideoRow],
    *,
    batch_size: int,
    now: Callable[[], float] = time.perf_counter,
) -> float:
    """Run the loader of a task, with the processes of its configuration, and take batches as fast as they come.

    The clock starts when as many batches as there are processes have come: all of them are at work then.

    Args:
        task: The run's.
        rows: Videos that can be read; taken over and over.
        batch_size: Clips of a batch; the nearest number below that the repeats, and mixing in pairs, allow.
        now: Seconds so far.
    """
    workers, repeats = task.config.data.num_workers, task.config.data.repeats
    dataset = task.make_dataset(rows)
    unit = math.lcm(repeats, 2 if dataset.mixer else 1)
    batch_size = max(batch_size // unit, 1) * unit
    if len(rows) * repeats < batch_size:
        dataset = task.make_dataset([*rows] * math.ceil(batch_size / (len(rows) * repeats)))
    sampler = GlobalBatchSampler(
        num_samples=len(dataset),
        repeats=repeats,
        global_size=batch_size,
        micro_size=batch_size,
        rank=0,
        world_size=1,
        seed=task.config.run.seed,
        end_step=workers * (1 + _TIMED_BATCHES),
    )
    began, clips = now(), 0
    for number, batch in enumerate(make_loader(dataset, sampler, micro_size=batch_size, pin_memory=False), start=1):
        batch.require_whole()
        if number > workers:
            clips += len(batch.index_B)
        else:
            began = now()
    return clips / (now() - began)
