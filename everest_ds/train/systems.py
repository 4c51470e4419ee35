"""The ways of sharding that come with the project: the files of ds_configs/, wherever they were installed."""

from pathlib import Path

from everest_ds.train.engine import Systems, load_systems

PACKAGE = Path(__file__).resolve().parents[1]
# In an installed package, and in a checkout of the source.
FOLDERS = (PACKAGE / "ds_configs", PACKAGE.parent / "ds_configs")


def shipped_systems() -> dict[str, Systems]:
    """Return the systems files by name, in the order zero0 to zero3_offload.

    Raises:
        FileNotFoundError: The installation lacks them.
    """
    folder = next((folder for folder in FOLDERS if folder.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"no ds_configs in {' or '.join(map(str, FOLDERS))}")
    return {path.stem: load_systems(path) for path in sorted(folder.glob("*.json"))}
