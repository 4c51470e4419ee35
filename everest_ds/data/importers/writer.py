"""Writing an import to a folder: lists, class names and summary.

Files: train.csv, val.csv, test.csv (those that have videos), classes.txt, missing.txt (``split TAB name``),
left_out.txt (``reason TAB name``), and summary.json last, with the checksums of the others. By the checksums, a
later import recognises the files that it may replace: those of an earlier import that were not changed since.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from everest_ds.data.importers.collector import UNLABELLED, Import
from everest_ds.data.lists.classes import NAMES_FILE
from everest_ds.data.lists.video_list import format_list
from everest_ds.errors import UserError
from everest_ds.files import write_atomically

SUMMARY_FILE, MISSING_FILE, LEFT_OUT_FILE = "summary.json", "missing.txt", "left_out.txt"
_WRITTEN_BY = "everest index"
_NUM_EXAMPLES = 5


def require_apart(source: Path, out: Path) -> None:
    """Check that the folder for the lists is not a file, and not inside the dataset's folder."""
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--out {out} is inside {source}, where nothing is written; name a folder outside of it")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is not a folder; name a folder, existing or new")


def write_import(found: Import, out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Write an import to a folder, replacing the files of an earlier one; return the content of summary.json.

    ``settings`` are dataset, source and options.

    Raises:
        UserError: A file of the same name was not written by an import or was changed since, the folder cannot be
            created, or a class name does not fit in one line.
    """
    out = out.resolve() if ".." in out.parts else out.absolute()
    texts = _texts(found, out)
    summary = {
        "written_by": _WRITTEN_BY,
        **settings,
        **_account(found),
        "files": {name: _checksum(data) for name, data in texts.items()},
    }
    written = _written_before(out)
    stale = [name for name in written if name not in texts]
    for name in [*texts, *stale]:
        _require_ours(out / name, written.get(name), texts.get(name))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {out}: {error.strerror}; name another by --out") from error
    for name in stale:
        (out / name).unlink(missing_ok=True)
    texts[SUMMARY_FILE] = _encode(json.dumps(summary, indent=2, ensure_ascii=False, default=str) + "\n")
    for name, data in texts.items():
        write_atomically(out / name, data)
    return summary


def _texts(found: Import, out: Path) -> dict[str, bytes]:
    texts = {f"{split}.csv": format_list(out / f"{split}.csv", rows) for split, rows in found.rows.items()}
    if found.class_names:
        for name in found.class_names:
            if name.splitlines() != [name.strip()]:
                raise UserError(f"the class name {name!r} does not fit in a line of {NAMES_FILE}; rename the class")
        texts[NAMES_FILE] = "".join(f"{name}\n" for name in found.class_names)
    if found.missing:
        texts[MISSING_FILE] = "".join(f"{split}\t{name}\n" for split, name in found.missing)
    if found.left_out:
        lines = (f"{reason}\t{name}\n" for reason, names in found.left_out.items() for name in names)
        texts[LEFT_OUT_FILE] = "".join(lines)
    return {name: _encode(text) for name, text in texts.items()}


def _account(found: Import) -> dict[str, Any]:
    return {
        "classes": len(found.class_names),
        "splits": {
            split: {
                "videos": len(rows),
                "classes": len({row.label for row in rows} - {UNLABELLED}),
                "unlabelled": sum(row.label == UNLABELLED for row in rows),
                "windows": sum(row.start_s is not None for row in rows),
            }
            for split, rows in found.rows.items()
        },
        "missing": {
            "count": len(found.missing),
            "by_split": Counter(split for split, _ in found.missing),
            "examples": [name for _, name in found.missing[:_NUM_EXAMPLES]],
        },
        "left_out": {
            reason: {"count": len(names), "examples": names[:_NUM_EXAMPLES]}
            for reason, names in found.left_out.items()
        },
        "notes": found.notes,
    }


def _written_before(out: Path) -> dict[str, str]:
    """Return the checksums of an earlier import's files by name; empty if there was no import."""
    path = out / SUMMARY_FILE
    if not path.exists():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        files = dict(summary["files"])
        ours = summary["written_by"] == _WRITTEN_BY and all(Path(name).name == name for name in files)
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise UserError(f"{path} was not written by {_WRITTEN_BY}; name another folder by --out")
    return files


def _require_ours(path: Path, written: str | None, wanted: bytes | None) -> None:
    """Check that a file may be replaced or removed: an import wrote it, or would write the same content."""
    if not path.exists() and not path.is_symlink():
        return
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be replaced: {error.strerror}; name another folder by --out") from error
    if data != wanted and _checksum(data) != written:
        fault = f"was not written by {_WRITTEN_BY}" if written is None else "was changed since it was written"
        raise UserError(f"{path} {fault}; move it away, or name another folder by --out")


def _encode(text: str) -> bytes:
    """Return text as UTF-8; surrogates, which JSON names of missing videos may contain, are escaped."""
    return text.encode("utf-8", errors="backslashreplace")


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
