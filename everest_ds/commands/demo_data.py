"""`everest demo-data DIR`: make the demo dataset, with progress."""

import time
from pathlib import Path

from everest_ds.data.demo import DemoConfig, write_demo_data


def demo_data(folder: Path, config: DemoConfig) -> None:
    """Write the dataset and say what is there."""
    started = time.perf_counter()

    def show(done: int, total: int) -> None:
        if done % 100 == 0 or done == total:
            left_s = (time.perf_counter() - started) / done * (total - done)
            print(f"{done}/{total} videos, {left_s:.0f} s left", flush=True)

    lists = write_demo_data(folder, config, on_progress=show)
    names = ", ".join(str(path) for path in lists)
    print(f"{len(config.class_names)} classes in {folder}: {names}")
