"""Data sets, one file each; importing registers their splits. Registering never touches the disk."""

from . import acdc, camvid, pascal_context, pascal_voc, scribbles4all, synthetic  # noqa: F401  (register)
from .folder import register_folder
from .held_out import register_held_out, split_records, test_sets
from .splits import Split, load_records, register_split, splits

__all__ = [
    "Split",
    "load_records",
    "register_datasets",
    "register_folder",
    "register_split",
    "split_records",
    "splits",
    "test_sets",
]


def register_datasets(cfg) -> None:
    """Enter what the config names, and no file here, into the catalogs: ``DATASETS.FOLDER`` and held-out images."""
    register_folder(cfg)
    register_held_out(cfg)
