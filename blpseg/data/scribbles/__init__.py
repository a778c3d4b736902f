"""Scribbles: stroke files, rasterising, simulating, checking."""

from .convert import ConversionReport, convert_annotations, convert_xml_folder
from .rasterize import UNANNOTATED, rasterize_strokes
from .simulate import simulate_scribble
from .vocabulary import CONTEXT_NAMES, VOC_NAMES, Vocabulary, load_vocabulary

__all__ = [
    "CONTEXT_NAMES",
    "UNANNOTATED",
    "VOC_NAMES",
    "ConversionReport",
    "Vocabulary",
    "convert_annotations",
    "convert_xml_folder",
    "load_vocabulary",
    "rasterize_strokes",
    "simulate_scribble",
]
