from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError

from everest_ds.errors import UserError
from everest_ds.model.weights.export import write_whole


def test_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "weights.bin"
    write_whole(target, lambda path: path.write_bytes(b"whole") and None)
    assert target.read_bytes() == b"whole"
    assert [path.name for path in target.parent.iterdir()] == ["weights.bin"]


# A full disk raises OSError in Python's own writes, RuntimeError in torch's, SafetensorError in safetensors'.
@pytest.mark.parametrize("error", [OSError("full"), RuntimeError("full"), SafetensorError("full")])
@pytest.mark.parametrize("as_folder", [False, True])
def test_write_that_fails_is_named_and_leaves_nothing(error: Exception, as_folder: bool, tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        if as_folder:
            path.mkdir()
        (path / "part" if as_folder else path).write_bytes(b"half")
        raise error

    with pytest.raises(UserError, match=r"cannot write .*weights: full"):
        write_whole(tmp_path / "weights", fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("as_folder", [False, True])
def test_write_that_is_interrupted_leaves_nothing(as_folder: bool, tmp_path: Path) -> None:
    def interrupt(path: Path) -> None:
        if as_folder:
            path.mkdir()
        (path / "part" if as_folder else path).write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "weights", interrupt)
    assert not list(tmp_path.iterdir())
