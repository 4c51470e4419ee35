"""Choosing a reader and opening a video with it. Imports a library only when its reader is used."""

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
"""The module that each reader needs, and how to install it; `auto` takes the first that can be imported."""


@cache
def obstacle(reader: ReaderName) -> str | None:
    """Return why a reader (one of `READERS`) cannot be used on this machine; None if it can."""
    module, way_out = READERS[reader]
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.split(".")[0] == error.name.split(".")[0]:
            return f"not installed; {way_out}"
        return f"does not import: {first_line(error)}; {way_out}"
    except Exception as error:  # importing a broken package may raise anything; the reason is returned
        return f"does not import: {type(error).__name__}: {first_line(error)}; {way_out}"
    return None


def choose_reader(wanted: ReaderName) -> ReaderName:
    """Return the requested reader, or for ``auto`` the first of `READERS` that can be imported.

    Raises:
        UserError: The requested reader cannot be imported, or with ``auto`` none can.
    """
    if wanted != "auto":
        fault = obstacle(wanted)
        if fault is None:
            return wanted
        raise UserError(
            f"data.reader={wanted} is not available: {fault}; or use data.reader=auto (`everest doctor` lists the "
            "readers that work)"
        )
    faults: dict[ReaderName, str] = {}
    for name in READERS:
        fault = obstacle(name)
        if fault is None:
            return name
        faults[name] = fault
    listed = ", ".join(f"{name} {fault}" for name, fault in faults.items())
    raise UserError(f"data.reader=auto found no library that reads videos: {listed}")


def open_reader(path: Path, wanted: ReaderName, limit: PixelLimit | None = None) -> Reader:
    """Open a video.

    Raises:
        VideoReadError: The file is missing, is not a video, shows no frame, or is of a kind that the reader is not
            known to read correctly.
        UserError: The reader cannot be imported.
    """
    chosen, limit = choose_reader(wanted), limit or PixelLimit()
    require_file(path)
    fault = obstacle("pyav")
    if fault is not None:
        raise VideoReadError(path, f"{chosen} needs PyAV to inspect the file first, and PyAV is {fault}")
    if chosen == "decord":
        from everest_ds.data.readers.decord import DecordReader

        return DecordReader(path, limit)
    if chosen == "pyav":
        from everest_ds.data.readers.pyav import PyavReader

        return PyavReader(path, limit)
    from everest_ds.data.readers.torchcodec import TorchcodecReader

    return TorchcodecReader(path, limit)
