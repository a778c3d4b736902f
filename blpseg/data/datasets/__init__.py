"""Data sets, one file each; importing registers their splits. Registering never touches the disk."""

from ...utils.paths import data_root
from . import acdc, camvid, pascal_context, pascal_voc, synthetic  # noqa: F401  (register)
from .folder import register_folder
from .splits import Split, load_records, register_split, splits

__all__ = ["Split", "data_root", "load_records", "register_folder", "register_split", "splits"]
