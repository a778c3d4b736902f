"""What ours is measured against: METHOD's formulas taken literally, as the published code does, and plain loops."""

from __future__ import annotations

import os
from xml.dom import minidom

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from PIL import Image

from blpseg.modeling import BLPSeg, Targets
from blpseg.scribbles.vocabulary import VOC_NAMES
from blpseg.utils.labels import IGNORED


def literal_blp_loss(
    logits: torch.Tensor, annotation_logits: torch.Tensor, target: torch.Tensor, gamma: float
) -> torch.Tensor:
    """METHOD section 4's sums over x and c as N x C x H x W tensors; arguments as :func:`blpseg.modeling.blp_loss`."""
    classes = logits.shape[1]
    log_p = F.log_softmax(_at_size(logits, target), dim=1)
    q = torch.softmax(_at_size(annotation_logits.detach(), target), dim=1)[:, :classes]
    supervised = torch.where((target >= 0) & (target < classes), target, classes)
    one_hot = F.one_hot(supervised, classes + 1)[..., :classes].permute(0, 3, 1, 2)
    weight = one_hot * (1 - q * log_p.detach().exp()) ** gamma
    return ((-weight * log_p).sum(dim=(1, 2, 3)) / (weight.sum(dim=(1, 2, 3)) + 1e-7)).mean()


def _at_size(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.interpolate(logits.float(), size=target.shape[-2:], mode="bilinear", align_corners=False)


class LiteralBLPSeg(BLPSeg):
    """:class:`BLPSeg` with the dense local aggregation and losses at image size."""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        cfg = cfg.clone()
        cfg.MODEL.BLPSEG.LAM.IMPL = "dense"
        return super().from_config(cfg)

    def compute_losses(self, outputs, targets, images):
        logits, scribble, target = outputs.logits, targets.scribble, targets.scribble
        if self.self_training:
            p = torch.softmax(_at_size(logits.detach(), scribble), dim=1) * targets.image_classes[:, :, None, None]
            confidence, label = p.max(dim=1)
            target = torch.where(confidence < self.self_training_threshold, IGNORED, label)
            target = torch.where(scribble == self.num_classes, target, scribble)
        annotation = _at_size(outputs.annotation_logits, scribble)
        weight = logits.new_ones(self.num_classes + 1, dtype=torch.float32)
        weight[-1] = self.losses["loss_annotation"].unannotated_weight
        gamma = self.losses["loss_seg"].gamma
        return {
            "loss_seg": literal_blp_loss(logits, outputs.annotation_logits, target, gamma),
            "loss_annotation": F.cross_entropy(annotation, scribble, weight, ignore_index=IGNORED),
        }

    def _targets(self, outputs, scribble, image_classes):
        return Targets(scribble, image_classes, scribble)


@torch.no_grad()
def plain_inference(model: torch.nn.Module, image: torch.Tensor, scales, flip: bool) -> torch.Tensor:
    """METHOD section 7 as a loop, a forward for each view: (3, H, W) in 0..255 -> (C, H, W) averaged logits."""
    height, width = image.shape[-2:]
    views = []
    for scale in scales:
        size = round(height * scale), round(width * scale)
        scaled = F.interpolate(image[None].float(), size=size, mode="bicubic", align_corners=False)[0]
        for mirrored in (False, True) if flip else (False,):
            (output,) = model([{"image": scaled.flip(-1) if mirrored else scaled}])
            logits = output["sem_seg"].flip(-1) if mirrored else output["sem_seg"]
            views.append(F.interpolate(logits[None], size=(height, width), mode="bilinear", align_corners=True)[0])
    return torch.stack(views).mean(dim=0)


def write_stroke_files(folder: str, count: int, seed: int = 0) -> None:
    """Made-up files of PASCAL-Scribble's form: 500 x 375 pixels, a handful of strokes as a mouse reports them."""
    rng = np.random.default_rng(seed)
    os.makedirs(folder, exist_ok=True)
    for number in range(count):
        text = "<annotation>\n<size>\n<width>500</width>\n<height>375</height>\n<depth>3</depth>\n</size>\n"
        for _ in range(rng.integers(3, 8)):
            heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.15, rng.integers(20, 120)))
            steps = rng.uniform(2, 6, len(heading))[:, None] * np.stack([np.cos(heading), np.sin(heading)], axis=1)
            points = (rng.uniform((50, 50), (450, 325)) + np.cumsum(steps, axis=0)).astype(int)
            body = "".join(f"<point>\n<X>{x}</X>\n<Y>{y}</Y>\n</point>\n" for x, y in points)
            text += f"<polygon>\n<tag>{VOC_NAMES[rng.integers(len(VOC_NAMES))]}</tag>\n{body}</polygon>\n"
        with open(os.path.join(folder, f"{number:06d}.xml"), "w") as file:
            file.write(text + "</annotation>\n")


def convert_plainly(xml_dir: str, output_dir: str) -> None:
    """Convert stroke files (METHOD section 8) the obvious way: minidom, loops over pixels, one file after the other."""
    os.makedirs(output_dir)

    def number(node, tag, limit):
        return min(max(int(node.getElementsByTagName(tag)[0].firstChild.data), 0), limit)

    for file_name in sorted(os.listdir(xml_dir)):
        root = minidom.parse(os.path.join(xml_dir, file_name)).documentElement
        height, width = (number(root, tag, 100_000) for tag in ("height", "width"))
        label = np.full((height, width), 255, np.uint8)
        for polygon in root.getElementsByTagName("polygon"):
            class_id = VOC_NAMES.index(polygon.getElementsByTagName("tag")[0].firstChild.data)
            points = [
                (number(p, "Y", height - 1), number(p, "X", width - 1)) for p in polygon.getElementsByTagName("point")
            ]
            label[points[0]] = class_id
            for (r1, c1), (r2, c2) in zip(points, points[1:], strict=False):
                m = max(abs(r2 - r1), abs(c2 - c1))
                for i in range(m if m > 1 else 0):
                    label[int(r1 + i * ((r2 - r1) / m)), int(c1 + i * ((c2 - c1) / m))] = class_id
                label[r1, c1] = label[r2, c2] = class_id
        Image.fromarray(label).save(os.path.join(output_dir, os.path.splitext(file_name)[0] + ".png"))
