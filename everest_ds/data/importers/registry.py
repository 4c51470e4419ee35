"""The datasets that `everest index` can import, by name."""

from collections.abc import Callable
from typing import Any, NamedTuple

from everest_ds.data.importers import folder, hmdb51, kinetics, oscc, ssv2, ucf101
from everest_ds.data.importers.collector import Import
from everest_ds.data.importers.source_tree import SourceTree


class Importer(NamedTuple):
    """Importer of one dataset."""

    options: type[Any]
    collect: Callable[[SourceTree, Any], Import]
    """Raises UserError if annotations are missing or wrong, or there is no video."""
    layout: str
    """The expected layout, in one line."""


IMPORTERS = {
    "folder": Importer(
        folder.FolderOptions, folder.collect, "CLASS/video, or train, val and test with these; videos alone"
    ),
    "ucf101": Importer(ucf101.Ucf101Options, ucf101.collect, "CLASS/video.avi, and ucfTrainTestlist"),
    "hmdb51": Importer(hmdb51.Hmdb51Options, hmdb51.collect, "CLASS/video.avi, and testTrainMulti_7030_splits"),
    "kinetics": Importer(
        kinetics.KineticsOptions, kinetics.collect, "ID_START_END.mp4 or ID.mp4, and its CSV files"
    ),
    "ssv2": Importer(ssv2.Ssv2Options, ssv2.collect, "ID.webm, and labels, train, validation and test.json"),
    "oscc": Importer(oscc.OsccOptions, oscc.collect, "full_scale/VIDEO_UID.mp4, and fho_oscc-pnr_*.json"),
}
