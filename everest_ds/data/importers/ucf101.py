"""UCF101: videos by class, and the official ucfTrainTestlist.

Files: classInd.txt (``1 ApplyEyeMakeup``), trainlist01.txt (``ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1``),
testlist01.txt (the same without the number); 02 and 03 for the other splits. Labels are the numbers of classInd.txt
less 1.
"""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from everest_ds.data.importers.collector import Collector, Import
from everest_ds.data.importers.source_tree import SourceTree, annotations_of, one_file, read_lines
from everest_ds.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Ucf101Options:
    """Options of `everest index ucf101`."""

    split: Literal[1, 2, 3] = 1
    """Which official split."""
    annotations: Path | None = None
    """Folder of classInd.txt, trainlist0N.txt and testlist0N.txt, if it is not below SRC."""


def collect(source: SourceTree, options: Ucf101Options) -> Import:
    """Return the training and test videos of a split."""
    annotations = annotations_of(source, options.annotations)
    class_names = _read_classes(one_file(annotations, r"classInd\.txt", "classInd.txt"))
    labels = {name: label for label, name in enumerate(class_names)}
    collector = Collector(source)
    for split in ("train", "test"):
        file_name = f"{split}list{options.split:02d}.txt"
        path = one_file(annotations, re.escape(file_name), file_name)
        for number, line in read_lines(path):
            name, _, given = line.rpartition(" ")
            if not name or not given.isdecimal():
                name, given = line, ""
            name = name.strip()
            class_name = PurePosixPath(name).parent.name
            if class_name not in labels:
                raise UserError(
                    f"{path}, line {number}: the class of {name!r} is not in classInd.txt; expected CLASS/VIDEO.avi"
                )
            label = labels[class_name]
            if given and int(given) != label + 1:
                raise UserError(
                    f"{path}, line {number}: {name} has class {int(given)}, but {class_name} is number "
                    f"{label + 1} in classInd.txt; use annotation files of one release"
                )
            found = source.find_video(PurePosixPath(name).stem, class_name, others=class_names)
            collector.add(split, name, found, label)
    return collector.finish(class_names)


def _read_classes(path: Path) -> tuple[str, ...]:
    names: list[str] = []
    for number, line in read_lines(path):
        words = line.split()
        if len(words) != 2 or words[0] != str(len(names) + 1) or words[1] in names:
            raise UserError(f"{path}, line {number}: {line!r}; expected `{len(names) + 1} NAME`, each name once")
        names.append(words[1])
    return tuple(names)
