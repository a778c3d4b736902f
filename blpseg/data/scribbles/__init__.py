"""Scribbles: stroke files, rasterising, simulating, checking."""
