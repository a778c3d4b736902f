"""Evaluators, multi-scale and tiled inference, dense CRF, reports, the Predictor and export."""

from .build import EVALUATORS, build_evaluator, check_test_sets, evaluate
from .inference import Inference
from .predictor import Predictor
from .sem_seg import SemSegEvaluator
from .volume import VolumeEvaluator

__all__ = [
    "EVALUATORS",
    "Inference",
    "Predictor",
    "SemSegEvaluator",
    "VolumeEvaluator",
    "build_evaluator",
    "check_test_sets",
    "evaluate",
]
