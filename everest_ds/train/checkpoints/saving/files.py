"""Files of a checkpoint besides DeepSpeed's shards, written immediately or later by another process."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from everest_ds.model.weights.export import save_safetensors

NamedTensors = Iterable[tuple[str, Tensor]]


class CheckpointFiles(ABC):
    """Takes the files that a callback adds to a checkpoint."""

    @abstractmethod
    def add_tensors(self, name: str, tensors: NamedTensors, notes: dict[str, str]) -> None:
        """Add a safetensors file; tensors may be on any device, and are read once, in order.

        Raises:
            OSError: It cannot be written, or there is no memory for a copy.
        """


class FilesInFolder(CheckpointFiles):
    """Writes files immediately; until then, whole tensors are in host memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add_tensors(self, name: str, tensors: NamedTensors, notes: dict[str, str]) -> None:
        write_tensors(self._folder / name, {key: tensor.cpu() for key, tensor in tensors}, notes)


def write_tensors(path: Path, tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: It cannot be written.
    """
    try:
        save_safetensors(tensors, path, notes)
    except SafetensorError as error:
        raise OSError(str(error)) from error
