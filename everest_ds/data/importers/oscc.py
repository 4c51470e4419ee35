"""Ego4D object state change classification (OSCC): clips of 8 s as windows of videos, which are not re-encoded.

Files: fho_oscc-pnr_train.json, fho_oscc-pnr_val.json and fho_oscc-pnr_test_unannotated.json. Each is an object with
the list ``clips`` (or the list itself), whose objects have ``unique_id``, ``video_uid``, and ``parent_start_sec``
and ``parent_end_sec`` in seconds of the canonical video; except in the test file, ``state_change``, true or false;
and optionally ``clip_uid``, and ``clip_start_sec`` and ``clip_end_sec`` in seconds of that clip.

A row is the first of these files that exists: UNIQUE_ID.mp4, already cut; VIDEO_UID.mp4 (full_scale) with a window;
CLIP_UID.mp4 (clips) with a window. Class 0 is no change of state, 1 a change; -1 if the file does not say.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everest_ds.data.importers.collector import UNLABELLED, Collector, Import
from everest_ds.data.importers.source_tree import SourceTree, annotations_of, read_entries
from everest_ds.errors import UserError

CLASS_NAMES = ("no state change", "state change")
_FILES = {
    "train": (r"fho_oscc-pnr_train\.json", "fho_oscc-pnr_train.json"),
    "val": (r"fho_oscc-pnr_val\.json", "fho_oscc-pnr_val.json"),
    "test": (r"fho_oscc-pnr_test(?:_unannotated)?\.json", "fho_oscc-pnr_test_unannotated.json"),
}
_KEYS = ("unique_id", "video_uid", "parent_start_sec", "parent_end_sec")
_CLIP_KEYS = ("clip_start_sec", "clip_end_sec")


@dataclass(frozen=True, kw_only=True)
class OsccOptions:
    """Options of `everest index oscc`."""

    annotations: Path | None = None
    """Folder of the files fho_oscc-pnr_*.json, if it is not below SRC."""


def collect(source: SourceTree, options: OsccOptions) -> Import:
    """Return the clips of the splits that have a file."""
    annotations = annotations_of(source, options.annotations)
    collector = Collector(source)
    kinds: Counter[str] = Counter()
    for split, path in collector.find_split_files(annotations, _FILES).items():
        for place, clip in read_entries(path, "clips", *_KEYS, *(() if split == "test" else ("state_change",))):
            kind, video, window = _find(source, clip, place)
            kinds[kind] += video is not None
            collector.add(split, str(clip["unique_id"]), video, _label_of(clip, place), window)
    used = [f"{count} {kind}" for kind, count in kinds.items() if count]
    if used:
        collector.note(f"clips found: {', '.join(used)}")
    return collector.finish(CLASS_NAMES)


def _find(
    source: SourceTree, clip: dict[str, Any], place: str
) -> tuple[str, Path | None, tuple[float | None, float | None]]:
    """Return how a clip was found, its video (None if missing), and its window in seconds."""
    cut = source.find_video(str(clip["unique_id"]))
    if cut is not None:
        return "cut already", cut, (None, None)
    whole = source.find_video(str(clip["video_uid"]))
    if whole is None and clip.get("clip_uid") and all(key in clip for key in _CLIP_KEYS):
        part = source.find_video(str(clip["clip_uid"]))
        if part is not None:
            return "in clips by seconds", part, _window(clip, *_CLIP_KEYS, place)
    return "in whole videos by seconds", whole, _window(clip, "parent_start_sec", "parent_end_sec", place)


def _window(clip: dict[str, Any], start: str, end: str, place: str) -> tuple[float, float]:
    try:
        return float(clip[start]), float(clip[end])
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}: {start}={clip[start]!r} and {end}={clip[end]!r}; expected seconds") from error


def _label_of(clip: dict[str, Any], place: str) -> int:
    if "state_change" not in clip:
        return UNLABELLED
    if not isinstance(clip["state_change"], bool):
        raise UserError(f"{place}: state_change={clip['state_change']!r}; expected true or false")
    return int(clip["state_change"])
