"""Files of a run's checkpoints/ that name one of them: `latest`, and `best` by validation score."""

from pathlib import Path

from everest_ds.errors import UserError
from everest_ds.train.seal import is_sealed, sync_folder, write_durably

LATEST, BEST = "latest", "best"


def folder_of(run_dir: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return run_dir / "checkpoints"


def read_latest(run_dir: Path) -> Path:
    """Return the checkpoint that a run's pointer to the newest one names; see `read_pointer`."""
    return read_pointer(run_dir, LATEST)


def find_best(run_dir: Path) -> Path | None:
    """Return the checkpoint with the highest validation score; None without scores; see `read_pointer`."""
    return read_pointer(run_dir, BEST) if (folder_of(run_dir) / BEST).is_file() else None


def read_pointer(run_dir: Path, name: str) -> Path:
    """Return the checkpoint that a pointer of a run names.

    Raises:
        UserError: There is no pointer, or it is empty, or names no complete checkpoint.
    """
    pointer = folder_of(run_dir) / name
    try:
        target = pointer.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{pointer} cannot be read: {error}") from error
    if not target:
        raise UserError(f"{pointer} is empty")
    if Path(target).name != target or not is_sealed(pointer.parent / target):
        raise UserError(f"{pointer} names {target!r}, which is no complete checkpoint")
    return pointer.parent / target


def point_to_best(run_dir: Path, step: int | None) -> bool:
    """Make the pointer name the checkpoint of a step, or remove it; rank zero calls it.

    Returns:
        Whether the pointer names one: not without a step, nor where its checkpoint is gone, because the run goes on
        from an older one.
    """
    pointer = folder_of(run_dir) / BEST
    target = folder_of(run_dir) / f"step-{step or 0:08d}"
    if step is None or not is_sealed(target):
        pointer.unlink(missing_ok=True)
        return False
    point(pointer, target)
    return True


def point(pointer: Path, target: Path) -> None:
    """Make a pointer name a checkpoint, by rename."""
    temporary = pointer.with_name(f"{pointer.name}.tmp")
    write_durably(temporary, target.name + "\n")
    temporary.replace(pointer)
    sync_folder(pointer.parent)
