"""`everest doctor`: what this machine has, and what is missing to train on it."""

import importlib
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from everest_ds import distributed
from everest_ds.errors import UserError

OK, OPTIONAL, MISSING = "ok", "--", "MISSING"
REQUIRED = ("torch", "torchvision", "timm", "deepspeed", "av", "einops", "tensorboard", "tyro")
Row = tuple[str, str, str]


def doctor() -> int:
    """Print one line for each finding; return 1 when something required is missing, else 0."""
    distributed.select_accelerator()
    rows: list[Row] = [(OK, "python", platform.python_version())]
    rows += [_package(name) for name in REQUIRED]
    for check in (_devices, _attention, _readers, _launcher):
        rows += _guarded(check)
    for state, what, finding in rows:
        print(f"{state:<8} {what:<22} {finding}")
    missing = [what for state, what, _ in rows if state == MISSING]
    print(f"\n{'missing: ' + ', '.join(missing) if missing else 'ready to train'}")
    return 1 if missing else 0


def _package(name: str) -> Row:
    try:
        found = version(name)
        importlib.import_module(name)
    except PackageNotFoundError:
        return MISSING, name, f"not installed; pip install {name}"
    except Exception as error:  # a package may fail to import in any way; that is the finding
        return MISSING, name, f"{found} does not import: {type(error).__name__}: {error}"
    return OK, name, found


def _guarded(check: Callable[[], list[Row]]) -> list[Row]:
    try:
        return check()
    except ImportError as error:
        return [(MISSING, check.__name__.strip("_"), str(error))]


def _devices() -> list[Row]:
    import torch

    if not torch.cuda.is_available():
        return [(OPTIONAL, "GPU", "none; training runs on the CPU with gloo")]
    rows = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        rows.append((OK, f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    return rows


def _attention() -> list[Row]:
    import torch

    from everest_ds.model.attention import BACKENDS, choose_backend

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    chosen = choose_backend("auto", device, dtype, 64).name
    rows: list[Row] = []
    for backend in BACKENDS.values():
        obstacle = backend.obstacle(device, dtype, 64)
        state = OPTIONAL if obstacle else OK
        rows.append(
            (state, f"attention {backend.name}", obstacle or ("auto" if backend.name == chosen else "serves"))
        )
    return rows


def _readers() -> list[Row]:
    """Encode a clip, decode it again with each reader, and look at the frames."""
    import tempfile
    from pathlib import Path

    from everest_ds.data.demo import DemoConfig, encode_h264, render_video
    from everest_ds.data.readers.choice import READERS, choose_reader, obstacle
    from everest_ds.data.video import Video, VideoReadError

    try:
        chosen = choose_reader("auto")
    except UserError as error:
        return [(MISSING, "reader of videos", str(error))]
    rows: list[Row] = []
    frames = render_video(DemoConfig(num_frames=4), "train", 0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.mp4"
        encode_h264(path, frames)
        for name in READERS:
            fault = obstacle(name)
            if fault:
                rows.append((OPTIONAL, f"reader {name}", fault))
                continue
            try:
                decoded = Video(path, reader=name).read([0, 3])
            except VideoReadError as error:
                state = MISSING if name == chosen else OPTIONAL
                rows.append((state, f"reader {name}", f"decoding H.264: {error.reason}"))
                continue
            error_mean = abs(decoded.astype(int) - frames[[0, 3]].astype(int)).mean()
            role = "auto" if name == chosen else "serves"
            rows.append((OK, f"reader {name}", f"{role}; decoding H.264: mean error {error_mean:.1f} of 255"))
    return rows


def _launcher() -> list[Row]:
    import torch
    import torch.distributed as dist

    found = shutil.which("deepspeed")
    rows: list[Row] = [
        (OK, "deepspeed launcher", found)
        if found
        else (
            OPTIONAL,
            "deepspeed launcher",
            "not on PATH; activate the environment, or use torchrun -m everest_ds",
        )
    ]
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    available = dist.is_nccl_available() if backend == "nccl" else dist.is_gloo_available()
    rows.append(
        (OK if available else MISSING, f"communication {backend}", "available" if available else "not built in")
    )
    return rows
