"""`everest convert`: weights of a run as one file."""

from pathlib import Path
from typing import Literal

from everest_ds import distributed

Target = Literal["deepspeed-fp32"]


def convert(source: Path, target: Path) -> None:
    """Write the consolidated float32 weights of a run or checkpoint to a safetensors file, and say what was read.

    Raises:
        UserError: The source holds no sound checkpoint, or the target cannot be written.
    """
    distributed.select_accelerator()
    from everest_ds.train.consolidated import export_fp32

    checkpoint = export_fp32(source, target)
    print(f"float32 weights of {checkpoint} -> {target} ({target.stat().st_size / 2**20:.1f} MiB)")
