"""Seals: a list of a folder's files with sizes and checksums, written last. All ranks share the work.

A folder is valid only if it is sealed and its files match the seal.
"""

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from everest_ds import distributed
from everest_ds.distributed import World
from everest_ds.errors import escaped
from everest_ds.files import parse_json, sha256, sync, write_json

SEAL = "complete.json"
FileRecord = dict[str, int | str]


def is_sealed(folder: Path) -> bool:
    """Return whether a folder has a seal; `find_damage` says whether its files match."""
    try:
        return (folder / SEAL).is_file()
    except OSError:  # the folder cannot be read
        return False


def seal(folder: Path, world: World, **more: str) -> None:
    """Flush every file of a folder to disk and write its seal; all ranks take part.

    Args:
        folder: A folder that is no longer written to.
        world: This rank and the number of ranks.
        more: Further entries of the seal.

    Raises:
        OSError: On every rank if one could not flush or read its share; on rank zero if the seal cannot be written.
    """
    # Use rank zero's listing: on a network file system the others may not see every file yet.
    names = distributed.gather_objects(_files(folder) if world.is_main else [])[0]
    records, fault = {}, None
    try:
        records = _records(folder, _share_of(names, world))
    except OSError as error:
        fault = str(error)
    fault = distributed.agree(fault)
    if fault:
        raise OSError(fault)
    parts = distributed.gather_objects(records)
    if world.is_main:
        write_seal(folder, {name: record for part in parts for name, record in sorted(part.items())}, **more)


def write_seal(folder: Path, files: Mapping[str, FileRecord], **more: str) -> None:
    """Write the seal of a folder whose files are flushed.

    Raises:
        OSError: It cannot be written.
    """
    write_json(folder / SEAL, {**more, "files": files})


def record_of(path: Path) -> FileRecord:
    """Return a file's entry in a seal: its size and checksum."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def find_damage(folder: Path, world: World) -> str | None:
    """Compare this rank's share of a folder's files with its seal; return the first difference, or None."""
    try:
        files: dict[str, FileRecord] = parse_json((folder / SEAL).read_text())["files"]
        if not all(record.keys() >= {"size", "sha256"} for record in files.values()):
            raise ValueError("it has a file without a size or a checksum")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{SEAL} cannot be read: {escaped(str(error))}"
    odd = next((name for name in files if Path(name).is_absolute() or ".." in Path(name).parts), None)
    if odd is not None:
        return f"{SEAL} names {escaped(odd)}, outside of the folder"
    for name in _share_of(sorted(files), world):
        try:
            fault = _compare(folder / name, files[name])
        except (OSError, ValueError) as error:
            fault = f"{{}} cannot be read: {escaped(str(error))}"
        if fault is not None:
            return fault.replace("{}", escaped(name))
    return None


def _compare(path: Path, expected: FileRecord) -> str | None:
    """Return how a file differs from its entry in a seal, with {} for its name; None if it does not."""
    if not path.is_file():
        return "{} is missing"
    if path.stat().st_size != expected["size"]:
        return f"{{}} has {path.stat().st_size} bytes, expected {expected['size']}"
    return None if sha256(path) == expected["sha256"] else "the checksum of {} differs"


def try_together(action: Callable[[], object]) -> str | None:
    """Run an action on every rank; return the first error of a disk, or None, on all of them."""
    fault = None
    try:
        action()
    except OSError as error:
        fault = str(error)
    except RuntimeError as error:  # torch's writer reports a full disk by it
        fault = f"RuntimeError: {error}"
    return distributed.agree(fault)


def remove_sealed(folder: Path) -> None:
    """Rename a folder, then remove it, so that an interrupted removal leaves nothing that looks complete.

    The remains have the name of an unfinished save, and the next save removes them.
    """
    if folder.is_symlink() or not folder.is_dir():
        return
    doomed = folder.with_name(f"tmp-removed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _files(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != SEAL
    )


def _share_of(names: Sequence[str], world: World) -> Sequence[str]:
    return names[world.rank :: world.size]


def _records(folder: Path, names: Sequence[str]) -> dict[str, FileRecord]:
    for name in names:
        sync(folder / name)
    return {name: record_of(folder / name) for name in names}
