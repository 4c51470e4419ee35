"""The ways of sharding that come with the project: the files of ds_configs/, wherever they were installed."""

from pathlib import Path

from everest_ds.train.engine import Systems, load_systems

PACKAGE = Path(__file__).resolve().parents[1]
# In an installed package, and in a checkout of the source.
FOLDERS = (PACKAGE / "ds_configs", PACKAGE.parent / "ds_configs")


def shipped_files() -> dict[str, Path]:
    """Return the systems files by name, in the order zero0 to zero3_offload; those below this folder, if they are.

    Raises:
        FileNotFoundError: The installation lacks them.
    """
    folder = next((folder for folder in (Path("ds_configs"), *FOLDERS) if (folder / "zero0.json").is_file()), None)
    if folder is None:
        raise FileNotFoundError(f"no ds_configs in {' or '.join(map(str, FOLDERS))}")
    return {path.stem: path for path in sorted(folder.glob("zero*.json"))}


def shipped_systems() -> dict[str, Systems]:
    """Return what the files say, by name."""
    return {name: load_systems(path) for name, path in shipped_files().items()}
