"""Orders to a rank's writer: the files to write, and on rank zero also to seal and publish the checkpoint."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from everest_ds.files import parse_json, sync, write_json
from everest_ds.train.checkpoints.owner import Owner, find_loss
from everest_ds.train.checkpoints.save import Keeping, keep_within, publish
from everest_ds.train.checkpoints.saving.copies import Copies, Unpacker
from everest_ds.train.checkpoints.saving.files import CheckpointFiles, NamedTensors, write_tensors
from everest_ds.train.checkpoints.seal import FileRecord, record_of, write_seal

_LOOK_EVERY_S = 0.02


@dataclass(frozen=True, kw_only=True)
class PackedFile:
    """A file to write; its tensors are copies.

    Attributes:
        name: Its name in the checkpoint's folder.
        kind: A pickle of torch, a safetensors file, or plain bytes.
        content: From `Copies.pack`; for a safetensors file one for each tensor, by name.
        notes: Metadata of a safetensors file.
    """

    name: str
    kind: Literal["shard", "tensors", "bytes"]
    content: Any
    notes: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What rank zero's writer does after all ranks have written.

    Attributes:
        run_dir: The run directory.
        final: The checkpoint's final folder.
        world_size: Number of ranks that write.
        owner: The process that must still own the run; None to skip that check.
        keeping: Which checkpoints are kept.
    """

    run_dir: Path
    final: Path
    world_size: int
    owner: Owner | None
    keeping: Keeping


@dataclass(frozen=True, kw_only=True)
class Order:
    """One rank's part of a save.

    Attributes:
        folder: The unfinished checkpoint.
        rank: The rank.
        files: The files to write.
        publication: What to do afterwards; on rank zero only.
    """

    folder: Path
    rank: int
    files: tuple[PackedFile, ...]
    publication: Publication | None

    def write(self, unpacker: Unpacker) -> None:
        """Write and flush this rank's files, and write a note with their checksums for rank zero's writer.

        Raises:
            OSError, RuntimeError: The files cannot be written.
        """
        records: dict[str, FileRecord] = {}
        for file in self.files:
            path = self.folder / file.name
            _write(file, path, unpacker)
            sync(path)
            records[file.name] = record_of(path)
        write_json(_note_of(self.folder, self.rank), records)

    def publish(self) -> None:
        """Wait for all ranks' notes, seal the folder, rename it, and remove checkpoints that are not kept.

        Raises:
            OSError: The disk cannot be written to, or the run has another owner now.
        """
        publication = self.publication
        if publication is None:
            return
        records = dict(_collect_notes(self.folder, publication.world_size))
        if publication.owner is not None and (loss := find_loss(publication.run_dir, publication.owner)):
            raise OSError(loss)
        write_seal(self.folder, records)
        publish(self.folder, publication.final)
        keep_within(publication.run_dir, publication.keeping)


class OrderedFiles(CheckpointFiles):
    """Collects the files of a save as copies."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self.files: list[PackedFile] = []

    def add_shard(self, name: str, content: Any) -> None:
        """Add the content of a file of torch.save."""
        self.files.append(PackedFile(name=name, kind="shard", content=self._copies.pack(content), notes={}))

    def add_tensors(self, name: str, tensors: NamedTensors, notes: dict[str, str]) -> None:
        packed = {key: self._copies.pack(tensor) for key, tensor in tensors}
        self.files.append(PackedFile(name=name, kind="tensors", content=packed, notes=notes))

    def add_bytes(self, name: str, content: bytes) -> None:
        self.files.append(PackedFile(name=name, kind="bytes", content=content, notes={}))


def _write(file: PackedFile, path: Path, unpacker: Unpacker) -> None:
    if file.kind == "shard":
        torch.save(unpacker.unpack(file.content), path)
    elif file.kind == "tensors":
        write_tensors(path, {key: unpacker.unpack(packed) for key, packed in file.content.items()}, file.notes)
    else:
        path.write_bytes(file.content)


def _note_of(folder: Path, rank: int) -> Path:
    return folder / f".written-by-{rank}.json"


def _collect_notes(folder: Path, world_size: int) -> Iterator[tuple[str, FileRecord]]:
    """Yield the names and checksums of all ranks' files, rank by rank, and remove the notes."""
    for rank in range(world_size):
        note = _note_of(folder, rank)
        while not note.is_file():
            os.listdir(folder)  # makes a network file system look for new files
            time.sleep(_LOOK_EVERY_S)
        yield from sorted(parse_json(note.read_text()).items())
        note.unlink()
