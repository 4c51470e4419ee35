"""The files below a folder: finding videos by name, and reading annotation files.

Place in the flow: downloaded folder -> `SourceTree` -> the importer of a dataset.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from everest_ds.data.lists.list_line import VIDEO_SUFFIXES
from everest_ds.errors import UserError


class SourceTree:
    """All files below a folder, at any depth, in the order of their paths.

    Hidden files and folders are skipped. Links to folders are followed, but no folder is visited twice.
    ``num_ambiguous`` counts how often `find_video` had to choose between equally good files.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve() if ".." in root.parts else root.absolute()
        self.num_ambiguous = 0

    @cached_property
    def files(self) -> list[Path]:
        """All files, found on first use; UserError if a folder cannot be read."""
        if not self.root.is_dir():
            raise UserError(f"{self.root} is not a folder; expected the folder of the dataset")
        return sorted(_walk(self.root))

    @cached_property
    def videos(self) -> list[Path]:
        return [path for path in self.files if path.suffix.lower() in VIDEO_SUFFIXES]

    def name_of(self, path: Path) -> str:
        return str(path.relative_to(self.root))

    def folders_of(self, path: Path) -> tuple[str, ...]:
        return path.relative_to(self.root).parts[:-1]

    def find_video(self, stem: str, *folders: str, others: Collection[str] = ()) -> Path | None:
        """Return the video with a name; suffixes are ignored, to find re-encoded copies. None if there is none.

        Of several, the one below most of ``folders`` wins, then the first by path. Videos below a folder of
        ``others`` are excluded: other classes may have a video of the same name. Case of folders is ignored.
        """
        wanted = {name.casefold() for name in folders}
        barred = {name.casefold() for name in others} - wanted
        above = {path: {name.casefold() for name in self.folders_of(path)} for path in self._by_stem.get(stem, ())}
        found = [path for path, names in above.items() if not names & barred]
        if not found:
            return None
        scores = [len(wanted & above[path]) for path in found]
        self.num_ambiguous += scores.count(max(scores)) > 1
        return found[scores.index(max(scores))]

    def find_files(self, pattern: str) -> list[Path]:
        """Return the files whose whole names match a pattern."""
        return [path for path in self.files if re.fullmatch(pattern, path.name)]

    @cached_property
    def _by_stem(self) -> dict[str, list[Path]]:
        by_stem = defaultdict(list)
        for path in self.videos:
            by_stem[path.stem].append(path)
        return by_stem


def annotations_of(source: SourceTree, elsewhere: Path | None) -> SourceTree:
    """Return the tree with the annotations: the folder that the user named, or the dataset's."""
    return source if elsewhere is None else SourceTree(elsewhere)


def one_file(tree: SourceTree, pattern: str, what: str) -> Path:
    """Return the one file whose name matches a pattern, or raise UserError."""
    found = tree.find_files(pattern)
    if not found:
        raise UserError(f"{tree.root} contains no {what}; download it, or name its folder by --annotations")
    if len(found) > 1:
        raise UserError(
            f"{tree.root} has {len(found)} files that may be {what}: {found[0]} and {found[1]}; name the folder "
            "of the right one by --annotations"
        )
    return found[0]


def read_lines(path: Path) -> list[tuple[int, str]]:
    """Return (number, text) of the non-blank lines of a text file, numbered from 1 and stripped."""
    lines = enumerate(read_text(path).splitlines(), start=1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or raise UserError."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not JSON: {error.msg} in line {error.lineno}; download it again, it may be incomplete"
        ) from error


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file without a byte order mark, or raise UserError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason}; download it again") from error


def read_entries(path: Path, what: str, *keys: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place for messages, entry) for each entry of a JSON file: a list, or an object with the list ``what``.

    Raises:
        UserError: The file has no such list, or an entry lacks one of the keys.
    """
    entries = read_json(path)
    if isinstance(entries, dict) and what in entries:
        entries = entries[what]
    if not isinstance(entries, list):
        given = f" without {what!r}" if isinstance(entries, dict) else ""
        raise UserError(f"{path}: expected a list of {what}, got {type(entries).__name__}{given}")
    expected = ", ".join(keys)
    for number, entry in enumerate(entries, start=1):
        place = f"{path}, entry {number}"
        if not isinstance(entry, dict):
            raise UserError(f"{place}: expected an object with {expected}, got {entry!r:.80}")
        for key in keys:
            if key not in entry:
                raise UserError(f"{place} has no {key!r}; expected {expected}, got {', '.join(entry)}")
        yield place, entry


def _walk(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    visited = set()
    for parent, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent) / name for name in names if not name.startswith("."))
