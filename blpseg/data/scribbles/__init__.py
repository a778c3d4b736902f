"""Scribbles: stroke files, rasterising, simulating, checking."""

from .rasterize import UNANNOTATED, rasterize_strokes
from .simulate import simulate_scribble

__all__ = ["UNANNOTATED", "rasterize_strokes", "simulate_scribble"]
