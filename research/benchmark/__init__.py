"""What BLPSeg costs in time and memory, each figure beside that of the plain way to do the same."""

from .measure import Row, table
from .workloads import BENCHMARKS, Options

__all__ = ["BENCHMARKS", "Options", "Row", "table"]
