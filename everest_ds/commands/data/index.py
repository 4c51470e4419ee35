"""`everest index DATASET SRC --out DIR`: makes lists, classes and a summary from a dataset's own split files."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from everest_ds.commands.parsing import parse, say, usage
from everest_ds.console import messages
from everest_ds.data.importers.registry import IMPORTERS
from everest_ds.data.importers.source_tree import SourceTree
from everest_ds.data.importers.writer import LEFT_OUT_FILE, MISSING_FILE, SUMMARY_FILE, require_apart, write_import
from everest_ds.distributed import World
from everest_ds.errors import UserError, nearest_hint

Options = TypeVar("Options")


@dataclass(frozen=True, kw_only=True)
class Arguments(Generic[Options]):
    """Write the lists that the dataset has (train.csv, val.csv, test.csv), classes.txt and summary.json."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """Folder of the dataset as downloaded; nothing is written there."""
    out: Path
    """Folder for the lists, made if missing; only files of an earlier index are replaced."""
    options: Annotated[Options, tyro.conf.arg(name="")]


def main(words: list[str], world: World) -> int:
    """Parse the options of the dataset that the first word names, and write its lists."""
    dataset = words[0] if words else ""
    if dataset in ("-h", "--help"):
        layouts = {name: importer.layout for name, importer in IMPORTERS.items()}
        say(usage("everest index DATASET", "SRC --out DIR", layouts), world, to_stdout=True)
        return 0
    if dataset not in IMPORTERS:
        raise UserError(f"unknown dataset {dataset!r}{nearest_hint(dataset, IMPORTERS)}")
    if world.size > 1:
        raise UserError("everest index runs in one process; start it without a launcher")
    options = IMPORTERS[dataset].options
    arguments = parse(Arguments[options], words[1:], f"everest index {dataset}", world)  # type: ignore[valid-type]
    index(dataset, arguments.source, arguments.out, arguments.options)
    return 0


def index(dataset: str, source: Path, out: Path, options: Any) -> None:
    """Write the lists of a dataset, and print their counts, missing videos, and rows left out with reasons.

    ``options`` is an instance of the importer's dataclass.
    """
    require_apart(source, out)
    tree = SourceTree(source)
    found = IMPORTERS[dataset].collect(tree, options)
    settings = {"dataset": dataset, "source": str(tree.root), "options": asdict(options)}
    summary = write_import(found, out, settings)
    messages.say(_describe(summary, out))
    if summary["missing"]["count"] and messages.is_quiet():
        messages.say(f"warning: {summary['missing']['count']} videos are missing: {out / MISSING_FILE}")


def _describe(summary: dict[str, Any], out: Path) -> str:
    lines = [f"{summary['dataset']} in {summary['source']}: {summary['classes']} classes"]
    for split, counts in summary["splits"].items():
        windows = f", {counts['windows']} of them windows" if counts["windows"] else ""
        lines.append(
            f"  {split:<10}{counts['videos']} videos of {counts['classes']} classes{windows}: {out / split}.csv"
        )
    missing = summary["missing"]
    if missing["count"]:
        where = ", ".join(f"{count} of {split}" for split, count in missing["by_split"].items())
        lines.append(f"  missing   {missing['count']} videos ({where}): {out / MISSING_FILE}")
    for reason, left_out in summary["left_out"].items():
        lines.append(f"  left out  {left_out['count']}, {reason}, e.g. {left_out['examples'][0]}")
    if summary["left_out"]:
        lines.append(f"  left out  all are in {out / LEFT_OUT_FILE}")
    lines += [f"  note      {note}" for note in summary["notes"]]
    return "\n".join([*lines, f"  summary   {out / SUMMARY_FILE}"])
