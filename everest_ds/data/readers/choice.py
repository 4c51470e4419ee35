"""Which reader serves here. Needs none of the libraries to be imported."""

import importlib
from functools import cache
from pathlib import Path

from everest_ds.config.sections import ReaderName
from everest_ds.data.readers.base import Reader, first_line, require_file
from everest_ds.errors import UserError

READERS: dict[ReaderName, tuple[str, str]] = {
    "decord": ("decord", "pip install decord (Linux on x86-64 only)"),
    "pyav": ("av", "pip install av"),
    "torchcodec": ("torchcodec.decoders", "pip install 'everest_ds[torchcodec]', and FFmpeg's shared libraries"),
}
"""The module that each reader needs, and how to come by it; `auto` takes the first that serves."""


@cache
def obstacle(reader: ReaderName) -> str | None:
    """Return why a reader (one of `READERS`) cannot serve on this machine, or None where it can."""
    module, way_out = READERS[reader]
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.split(".")[0] == error.name.split(".")[0]:
            return f"not installed; {way_out}"
        return f"does not import: {first_line(error)}; {way_out}"
    except Exception as error:  # a package may fail to import in any way; that is the finding
        return f"does not import: {type(error).__name__}: {first_line(error)}; {way_out}"
    return None


def choose_reader(wanted: ReaderName) -> ReaderName:
    """Return the reader that serves: the one wanted, or for ``auto`` decord, and where it does not serve PyAV.

    Raises:
        UserError: The one wanted cannot serve here, or none can.
    """
    if wanted != "auto":
        fault = obstacle(wanted)
        if fault is None:
            return wanted
        raise UserError(
            f"data.reader={wanted} cannot read videos here: {fault}; or take another reader, auto for instance "
            "(`everest doctor` lists those that serve)"
        )
    faults = {name: obstacle(name) for name in ("decord", "pyav")}
    for name, fault in faults.items():
        if fault is None:
            return name  # type: ignore[return-value]
    listed = ", ".join(f"{name} {fault}" for name, fault in faults.items())
    raise UserError(f"data.reader=auto finds no reader of videos: {listed}")


def open_reader(path: Path, wanted: ReaderName) -> Reader:
    """Open a video.

    Raises:
        VideoReadError: The file is missing, is no video, or has no frame to show.
        UserError: The reader wanted cannot serve here.
    """
    chosen = choose_reader(wanted)
    require_file(path)
    if chosen == "decord":
        from everest_ds.data.readers.with_decord import DecordReader

        return DecordReader(path)
    if chosen == "pyav":
        from everest_ds.data.readers.with_pyav import PyavReader

        return PyavReader(path)
    from everest_ds.data.readers.with_torchcodec import TorchcodecReader

    return TorchcodecReader(path)
