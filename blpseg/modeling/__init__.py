"""The network and what it is trained with; importing registers them with Detectron2."""

from .backbone import build_narrow_resnet_backbone
from .blpseg import BLPSeg
from .local_aggregation import LocalAggregation, local_aggregation
from .losses import LOSS_REGISTRY, Loss, annotation_loss, blp_loss
from .outputs import Outputs, Targets
from .pseudo_labels import pseudo_labels
from .sem_seg_head import BLPSegHead

__all__ = [
    "LOSS_REGISTRY",
    "BLPSeg",
    "BLPSegHead",
    "LocalAggregation",
    "Loss",
    "Outputs",
    "Targets",
    "annotation_loss",
    "blp_loss",
    "build_narrow_resnet_backbone",
    "local_aggregation",
    "pseudo_labels",
]
