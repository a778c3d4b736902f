"""Comparisons over data sets, methods and seeds: what ``tools/run_study.py`` runs and sums up."""

from .plan import Run, Study, load_study
from .runner import run_study
from .summary import summarize

__all__ = ["Run", "Study", "load_study", "run_study", "summarize"]
