"""Scribbles: stroke files, rasterising, simulating, checking."""

from ..utils.labels import UNANNOTATED
from ..utils.parallel import FileReport
from .convert import convert_annotations
from .rasterize import rasterize_strokes
from .simulate import simulate_scribble
from .simulate_folder import file_seed, simulate_folder
from .vocabulary import CONTEXT_NAMES, VOC_NAMES, Vocabulary, load_vocabulary

__all__ = [
    "CONTEXT_NAMES",
    "UNANNOTATED",
    "VOC_NAMES",
    "FileReport",
    "Vocabulary",
    "convert_annotations",
    "file_seed",
    "load_vocabulary",
    "rasterize_strokes",
    "simulate_folder",
    "simulate_scribble",
]
