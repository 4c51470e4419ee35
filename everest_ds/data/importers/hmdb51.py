"""HMDB51: videos by class, and the official testTrainMulti_7030_splits.

Files: CLASS_test_splitN.txt with a line ``VIDEO.avi TAG`` for every video of the class; tag 1 is train, 2 is test,
0 is not used in this split. Labels follow the order of the class names.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from everest_ds.data.importers.collector import Collector, Import, resolve_names
from everest_ds.data.importers.source_tree import SourceTree, annotations_of, read_lines
from everest_ds.errors import UserError

_SPLITS = {"1": "train", "2": "test"}
_UNUSED = "not used in this split (tag 0)"


@dataclass(frozen=True, kw_only=True)
class Hmdb51Options:
    """Options of `everest index hmdb51`."""

    split: Literal[1, 2, 3] = 1
    """Which official split."""
    annotations: Path | None = None
    """Folder of the files CLASS_test_splitN.txt, if it is not below SRC."""
    class_names: Path | None = None
    """File with one class name a line, in the order of the labels; without it, labels follow the order of names."""


def collect(source: SourceTree, options: Hmdb51Options) -> Import:
    """Return the training and test videos of a split."""
    paths = _files_by_class(annotations_of(source, options.annotations), options.split)
    class_names = resolve_names(paths.keys(), options.class_names)
    labels = {name: label for label, name in enumerate(class_names)}
    collector = Collector(source)
    for class_name, path in sorted(paths.items()):
        for number, line in read_lines(path):
            name, _, tag = line.rpartition(" ")
            name = name.strip()
            if not name or tag not in ("0", "1", "2"):
                raise UserError(f"{path}, line {number}: {line!r}; expected `VIDEO.avi TAG` with tag 0, 1 or 2")
            video = source.find_video(PurePosixPath(name).stem, class_name, others=class_names)
            if tag == "0":
                collector.leave_out(_UNUSED, f"{class_name}/{name}", video)
            else:
                collector.add(_SPLITS[tag], f"{class_name}/{name}", video, labels[class_name])
    return collector.finish(class_names)


def _files_by_class(annotations: SourceTree, split: int) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for path in annotations.find_files(rf".+_test_split{split}\.txt"):
        class_name = path.name.removesuffix(f"_test_split{split}.txt")
        if class_name in paths:
            raise UserError(
                f"{annotations.root} contains {path.name} twice, as {paths[class_name]} and {path}; name the "
                "folder of the right ones by --annotations"
            )
        paths[class_name] = path
    if not paths:
        raise UserError(
            f"{annotations.root} contains no CLASS_test_split{split}.txt; unpack testTrainMulti_7030_splits, or "
            "name its folder by --annotations"
        )
    return paths
