"""`everest check-data LIST`: finds bad videos of a list before a run does.

Every video is opened and sampled in a worker process, which is killed if it hangs. OUT/ contains

    findings.jsonl     one line for each video, in order of completion: a second call continues from them
    report.csv         one line for each row of the list
    clean.csv          the list without bad rows
    quarantine.csv     the bad rows as a list (empty if there are none), for --data.quarantine of a run
    summary.json       the number of rows of each kind
"""

import contextlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from everest_ds.commands.parsing import parse
from everest_ds.config.sections import MAX_PIXELS, ReaderName
from everest_ds.console.messages import say
from everest_ds.data.curation.probe import (
    DEFAULT_BAD,
    FaultName,
    Finding,
    Kind,
    ProbeSettings,
    open_record,
    probe_video,
    record_line,
)
from everest_ds.data.lists.video_list import VideoRow, format_list, read_list
from everest_ds.data.loading.pool import run_all
from everest_ds.data.readers.choice import choose_reader
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.files import write_atomically, write_csv, write_json
from everest_ds.progress import with_progress

FINDINGS, REPORT, CLEAN, QUARANTINE, SUMMARY = (
    "findings.jsonl", "report.csv", "clean.csv", "quarantine.csv", "summary.json",
)  # fmt: skip
_COLUMNS = ("row", "path", "start_s", "end_s", "label", "kind", "bad", "detail", "frames", "width", "height")


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Options of `everest check-data`."""

    out: Path | None = None
    """Folder for the results. Default: LIST without its suffix, with `-check`."""
    processes: int | None = None
    """Number of videos to check at the same time. Default: one for each CPU core."""
    timeout_s: float = 60.0
    """Seconds that a video may take before its process is killed."""
    samples: int = 8
    """Frames to decode of each video, spread over it, in addition to the last eight."""
    min_frames: int = 1
    """Frames that a clip needs: num_frames times sampling_stride of a recipe."""
    reader: ReaderName = "auto"
    """Library that reads the videos; use that of the run."""
    max_pixels: int = MAX_PIXELS
    """Most pixels (frames x height x width) to decode of a video at a time, and 16 times the most of one frame;
    data.max_pixels of the run. A larger video is unreadable."""
    bad: tuple[FaultName, ...] = DEFAULT_BAD
    """Kinds of faults that go into quarantine; the others are only in the report."""
    max_bad_share: float = 0.01
    """Share of the list that may be bad; with more, the exit code is 1."""

    def __post_init__(self) -> None:
        for name in ("processes", "samples", "min_frames", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if not self.timeout_s > 0:
            raise UserError(f"--timeout-s {self.timeout_s} must be above 0")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"--max-bad-share {self.max_bad_share} must be a share in [0, 1]")

    @property
    def settings(self) -> ProbeSettings:
        """The settings of the checks of each video."""
        return ProbeSettings(
            samples=self.samples, min_frames=self.min_frames, reader=self.reader, max_pixels=self.max_pixels
        )


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Open and sample every video of a list. The same command continues after an interruption.

    Writes report.csv, clean.csv and quarantine.csv. A video that hangs or crashes its process is named.
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="LIST")]
    """List of videos."""
    options: Annotated[CheckOptions, tyro.conf.arg(name="")] = field(default_factory=CheckOptions)


def main(words: list[str], world: World) -> int:
    """Parse, and check the list."""
    arguments = parse(Arguments, words, "everest check-data", world)
    return check_data(arguments.source, arguments.options)


def check_data(source: Path, options: CheckOptions) -> int:
    """Check the rows of a list that have no finding yet; return 1 if too many rows are bad, else 0."""
    rows = read_list(source)
    choose_reader(options.reader)
    out = options.out or source.with_name(f"{source.stem}-check")
    out.mkdir(parents=True, exist_ok=True)
    record = open_record(out / FINDINGS, options.settings)
    findings = record.read()
    todo = list({row.part: row for row in rows if row.part not in findings}.values())
    known = sum(row.part in findings for row in rows)
    if known:
        say(f"{known} of {len(rows)} rows are already checked")
    outcomes = run_all(
        partial(probe_video, settings=options.settings),
        todo,
        num_workers=options.processes or len(os.sched_getaffinity(0)),
        timeout_s=options.timeout_s,
    )
    with contextlib.closing(outcomes):
        for outcome in with_progress(outcomes, len(todo)):
            kind = Kind.HANGING if outcome.hung else Kind.CRASHING
            finding = outcome.result or Finding(kind=kind, detail=outcome.fault or "")
            findings[outcome.item.part] = finding
            record.append(record_line(outcome.item, finding))
            if finding.kind in options.bad:
                say(f"warning: {finding.kind}: {outcome.item.path}: {finding.detail}")
    return _conclude(source, out, rows, [findings[row.part] for row in rows], options)


def _conclude(
    source: Path, out: Path, rows: Sequence[VideoRow], findings: Sequence[Finding], options: CheckOptions
) -> int:
    """Write report, lists and summary, print the counts, and return the exit code."""
    is_bad = [finding.kind in options.bad for finding in findings]
    lines = [
        [number, row.path, row.start_s, row.end_s, row.label, found.kind, str(bad).lower(), found.detail,
         found.frames, found.width, found.height]
        for number, (row, found, bad) in enumerate(zip(rows, findings, is_bad, strict=True))
    ]  # fmt: skip
    write_csv(out / REPORT, _COLUMNS, lines)
    for name, wanted in ((CLEAN, False), (QUARANTINE, True)):
        chosen = [row for row, bad in zip(rows, is_bad, strict=True) if bad is wanted]
        # Written even if it is empty, so that scripts can always name it.
        write_atomically(out / name, format_list(out / name, chosen) if chosen else "")
    counts = Counter(finding.kind for finding in findings)
    share = sum(is_bad) / len(rows)
    summary = {
        "list": str(source),
        "rows": len(rows),
        "bad": sum(is_bad),
        "bad_kinds": list(options.bad),
        "kinds": {str(kind): counts[kind] for kind in Kind if counts[kind]},
        "duplicate_rows": len(rows) - len({row.part for row in rows}),
    }
    write_json(out / SUMMARY, summary)
    for kind in Kind:
        if counts[kind]:
            say(f"{counts[kind]:8} {kind}{' (bad)' if kind in options.bad else ''}")
    if summary["duplicate_rows"]:
        say(f"{summary['duplicate_rows']:8} rows repeat the video of an earlier row")
    say(f"{sum(is_bad)} of {len(rows)} rows are bad ({share:.2%}); {out / REPORT}")
    if any(is_bad):
        say(f"to leave them out, give --data.quarantine {out / QUARANTINE}, or train on {out / CLEAN}")
    if share > options.max_bad_share:
        say(f"warning: more than --max-bad-share {options.max_bad_share:.2%} are bad")
        return 1
    return 0
