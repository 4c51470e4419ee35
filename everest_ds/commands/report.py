"""`everest report RUN...`: write one HTML page about runs and evaluations; it opens without a network."""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from everest_ds import __version__
from everest_ds.commands.parsing import parse, say
from everest_ds.distributed import World
from everest_ds.errors import UserError
from everest_ds.files import write_atomically
from everest_ds.pictures.report.contents import ReportedRun
from everest_ds.pictures.report.page import PROLOGUE, draw_page
from everest_ds.train.checkpoints.listing import folder_of
from everest_ds.train.record.stored.evaluations import SUMMARY, read_evaluation, read_evaluations
from everest_ds.train.record.stored.run import is_run, read_run

_MOST_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write one page that compares runs: curves, scores, pictures, speed and memory against the plan, events,
    settings and environments. The page is one file and needs no network.
    """

    runs: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN...")]
    """Run directories in any state, and folders written by `everest evaluate`."""
    out: Path = Path("report.html")
    """File of the page. An existing file is replaced only if `everest report` wrote it."""


def main(words: list[str], world: World) -> int:
    """Write the page and return exit code 0."""
    arguments = parse(Arguments, words, "everest report", world)
    if world.is_main:
        report(arguments, world)
    return 0


def report(arguments: Arguments, world: World) -> None:
    """Read the runs and write the page.

    Raises:
        UserError: No run is named, a folder is not a run, or the page cannot be written.
    """
    if not arguments.runs:
        raise UserError("report needs a run: everest report RUN [RUN...] --out report.html")
    out = Path(os.path.realpath(arguments.out))  # write through a link instead of replacing it
    _require_own(arguments.out)
    found = {path.resolve(): path for path in reversed(arguments.runs)}
    runs = [_read(path) for path in reversed(found.values())]
    written = f"Written {time.strftime('%Y-%m-%d %H:%M')} by everest_ds {__version__}"
    page = draw_page(runs, written=written)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page)
    except OSError as error:
        raise UserError(f"--out {arguments.out} cannot be written: {error.strerror}; name another file") from error
    counted = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    say(
        f"{arguments.out}: {counted}, {len(page.encode()) / 2**20:.1f} MiB; open it in a browser\n",
        world,
        to_stdout=True,
    )


def _require_own(out: Path) -> None:
    """Refuse to replace a file that `everest report` did not write."""
    if not os.path.lexists(out) or (out.is_symlink() and not out.exists()):
        return
    own = False
    if out.is_file():
        with out.open("rb") as file:
            own = file.read(len(PROLOGUE)) == PROLOGUE.encode()
    if not own:
        raise UserError(f"--out {out} exists and was not written by `everest report`; name another file")


def _read(path: Path) -> ReportedRun:
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; expected a run directory or the folder of an evaluation")
    if (path / SUMMARY).is_file():
        return read_evaluation(path)
    run = next((above for above in path.resolve().parents[:2] if is_run(above)), None)
    if run is not None and (not is_run(path) or path.resolve().parent == folder_of(run)):
        raise UserError(f"{path} is inside the run {run}; name the run instead")
    if is_run(path):
        scores, faults = read_evaluations(path)
        found = read_run(path, scores)
        return replace(found, notes=[*found.notes, *faults])
    inner = [child for child in sorted(path.iterdir()) if child.is_dir() and is_run(child)]
    if inner:
        names = ", ".join(str(child) for child in inner[:_MOST_NAMED]) + (
            " ..." if len(inner) > _MOST_NAMED else ""
        )
        raise UserError(f"{path} is not a run but contains runs; name them: {names}")
    raise UserError(f"{path} is neither a run (no config.json of a run) nor an evaluation (no {SUMMARY})")
