"""An annotation head that learns where people scribble, and leaves the class to the segmentation head."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.nn.weight_init import c2_msra_fill
from torch import nn

from ..utils.geometry import boundary_distance
from .local_aggregation import ShallowEmbedding

FARTHEST = 64.0  # grid cells; a boundary farther away, or none at all, counts as this far


class PlaceHead(nn.Module):
    """Annotation logits whose softmax q is a product of place and class::

        q_c = a p_c    q_C = 1 - a    a = sigmoid(convolutions of [shallow features, ln(1 + d), ln(1 + t)])

    a is the probability that a position is annotated at all. It sees the image through features of its own, d, the
    distance of the position to the boundary of the predicted segment, and t, the greatest such distance in the 9 x 9
    cells around it, a measure of how thick the segment is there; both in grid cells. p is the segmentation head's
    softmax, without gradient. The published head, a classifier of C + 1 classes on the decoder's features, learns the
    class more than the place: its q is low where the class is uncertain, wherever that is.

    Args:
        channels: of the shallow features and of the hidden layer.
        patch_size: stride of the logits in pixels.
    """

    def __init__(self, channels: int, patch_size: int):
        super().__init__()
        self.shallow = ShallowEmbedding(channels, patch_size)
        self.hidden = nn.Conv2d(channels + 2, channels, 3, padding=1)
        self.place = nn.Conv2d(channels, 1, 1)
        c2_msra_fill(self.hidden)
        c2_msra_fill(self.place)

    def forward(self, images: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) normalised images, (N, C, h, w) segmentation logits -> (N, C + 1, h, w) annotation logits."""
        logits = logits.detach().float()
        shallow = self.shallow(images)
        if shallow.shape[-2:] != logits.shape[-2:]:
            shallow = F.interpolate(shallow, size=logits.shape[-2:], mode="bilinear", align_corners=False)
        x = torch.cat([shallow, _distances(logits).to(shallow)], dim=1)
        place = self.place(F.relu(self.hidden(x))).float()
        return torch.cat([logits.log_softmax(dim=1) + F.logsigmoid(place), F.logsigmoid(-place)], dim=1)


@torch.no_grad()
def _distances(logits: torch.Tensor) -> torch.Tensor:
    """(N, C, h, w) -> (N, 2, h, w): ln(1 + d) and ln(1 + t) of :class:`PlaceHead`."""
    labels = logits.argmax(dim=1).byte().cpu().numpy()
    distance = torch.from_numpy(np.stack([boundary_distance(label) for label in labels]))[:, None]
    distance = distance.clamp(max=FARTHEST)
    thickness = F.max_pool2d(distance, 9, stride=1, padding=4)
    return torch.cat([distance, thickness], dim=1).log1p().to(logits.device)
