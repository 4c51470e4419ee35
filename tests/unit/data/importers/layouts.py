"""Miniature copies of datasets: empty files, annotations, and the expected rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from everest_ds.data.importers.collector import Import


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def rows_of(found: Import, root: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Return rows as (path below the root, label), followed by the window if a row has one."""
    return {
        split: [
            (str(row.path.relative_to(root)), row.label, *(() if row.start_s is None else (row.start_s, row.end_s)))
            for row in rows
        ]
        for split, rows in found.rows.items()
    }
