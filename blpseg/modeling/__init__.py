"""The network and what it is trained with; importing registers them with Detectron2."""

from .backbone import build_narrow_resnet_backbone
from .blpseg import BLPSeg
from .local_aggregation import local_aggregation
from .losses import SEGMENTATION_LOSS_REGISTRY, annotation_loss, blp_loss
from .pixel_decoder import PIXEL_DECODER_REGISTRY, build_pixel_decoder
from .pseudo_labels import pseudo_labels
from .regularizers import REGULARIZER_REGISTRY

__all__ = [
    "BLPSeg",
    "PIXEL_DECODER_REGISTRY",
    "REGULARIZER_REGISTRY",
    "SEGMENTATION_LOSS_REGISTRY",
    "annotation_loss",
    "blp_loss",
    "build_narrow_resnet_backbone",
    "build_pixel_decoder",
    "local_aggregation",
    "pseudo_labels",
]
