"""The network and its losses; importing registers them with Detectron2."""

from .backbone import build_narrow_resnet_backbone
from .blpseg import BLPSeg
from .local_aggregation import LocalAggregation, local_aggregation
from .losses import LOSS_REGISTRY, Loss, annotation_loss, blp_loss
from .outputs import Outputs, Targets
from .pseudo_labels import pseudo_labels
from .sem_seg_head import BLPSegHead
from .timm_backbone import build_timm_backbone, pretrained_features
from .transformers import build_swin_backbone, build_vit_backbone

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
    "build_swin_backbone",
    "build_timm_backbone",
    "build_vit_backbone",
    "local_aggregation",
    "pretrained_features",
    "pseudo_labels",
]
