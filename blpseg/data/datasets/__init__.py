"""Data sets, one file each; importing registers their splits."""
