"""Which reader is used. Needs none of the libraries to be imported."""

import importlib
from functools import cache
from pathlib import Path

from everest_ds.config.sections import ReaderName
from everest_ds.data.readers.base import PixelLimit, Reader, VideoReadError, first_line, require_file
from everest_ds.errors import UserError

READERS: dict[ReaderName, tuple[str, str]] = {
    "pyav": ("av", "pip install av"),
    "decord": ("decord", "pip install decord (Linux on x86-64 only)"),
    "torchcodec": ("torchcodec.decoders", "pip install 'everest_ds[torchcodec]', and FFmpeg's shared libraries"),
}
"""The module that each reader needs, and how to come by it; `auto` takes the first that can be imported."""


@cache
def obstacle(reader: ReaderName) -> str | None:
    """Return why a reader (one of `READERS`) cannot be used on this machine, or None where it can."""
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
    """Return the reader wanted, or for ``auto`` the first of `READERS` that can be imported.

    Raises:
        UserError: The one wanted cannot be imported, or none can.
    """
    if wanted != "auto":
        fault = obstacle(wanted)
        if fault is None:
            return wanted
        raise UserError(
            f"data.reader={wanted} cannot read videos here: {fault}; or use another reader, auto for instance "
            "(`everest doctor` lists those that work)"
        )
    faults: dict[ReaderName, str] = {}
    for name in READERS:
        fault = obstacle(name)
        if fault is None:
            return name
        faults[name] = fault
    listed = ", ".join(f"{name} {fault}" for name, fault in faults.items())
    raise UserError(f"data.reader=auto finds no reader of videos: {listed}")


def open_reader(path: Path, wanted: ReaderName, limit: PixelLimit | None = None) -> Reader:
    """Open a video.

    Raises:
        VideoReadError: The file is missing, is no video, has no frame to show, or is of a kind that the reader
            is not known to read correctly.
        UserError: The reader wanted cannot be imported.
    """
    chosen, limit = choose_reader(wanted), limit or PixelLimit()
    require_file(path)
    fault = obstacle("pyav")
    if fault is not None:
        raise VideoReadError(path, f"{chosen} needs PyAV to look at the file first, and PyAV is {fault}")
    if chosen == "decord":
        from everest_ds.data.readers.decord import DecordReader

        return DecordReader(path, limit)
    if chosen == "pyav":
        from everest_ds.data.readers.pyav import PyavReader

        return PyavReader(path, limit)
    from everest_ds.data.readers.torchcodec import TorchcodecReader

    return TorchcodecReader(path, limit)
