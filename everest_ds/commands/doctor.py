"""`everest doctor`: what this machine has, and what is missing to train on it."""

import importlib
import platform
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from everest_ds import distributed

OK, OPTIONAL, MISSING = "ok", "--", "MISSING"
REQUIRED = ("torch", "torchvision", "timm", "deepspeed", "decord", "av", "einops", "tensorboard", "tyro")
Row = tuple[str, str, str]


def doctor() -> int:
    """Print one line for each finding; return 1 when something required is missing, else 0."""
    distributed.select_accelerator()
    rows: list[Row] = [(OK, "python", platform.python_version())]
    rows += [_package(name) for name in REQUIRED]
    for check in (_devices, _attention, _decoder, _launcher):
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


def _decoder() -> list[Row]:
    """Encode a clip, decode it again, and look at the frames."""
    import tempfile
    from pathlib import Path

    from everest_ds.data.demo import DemoConfig, encode_h264, render_video
    from everest_ds.data.video import Video, VideoReadError

    frames = render_video(DemoConfig(num_frames=4), "train", 0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.mp4"
        encode_h264(path, frames)
        try:
            decoded = Video(path).read([0, 3])
        except VideoReadError as error:
            return [(MISSING, "decoding H.264", error.reason)]
    error_mean = abs(decoded.astype(int) - frames[[0, 3]].astype(int)).mean()
    return [(OK, "decoding H.264", f"mean error {error_mean:.1f} of 255 after encoding")]


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
