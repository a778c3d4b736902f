"""The training losses, one a file; importing them registers them in :data:`LOSS_REGISTRY`."""

from .annotation import AnnotationLoss, annotation_loss
from .blp import BLPLoss, blp_loss
from .dense_crf import DenseCRF
from .entropy_minimization import EntropyMinimization
from .gated_crf import GatedCRF
from .loss import LOSS_REGISTRY, Loss, build_losses
from .mean_teacher import MeanTeacher
from .partial_dice import PartialDice
from .soft_self_labelling import SoftSelfLabelling
from .tree_energy import TreeEnergy

__all__ = [
    "LOSS_REGISTRY",
    "AnnotationLoss",
    "BLPLoss",
    "DenseCRF",
    "EntropyMinimization",
    "GatedCRF",
    "Loss",
    "MeanTeacher",
    "PartialDice",
    "SoftSelfLabelling",
    "TreeEnergy",
    "annotation_loss",
    "blp_loss",
    "build_losses",
]
